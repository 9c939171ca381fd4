"""Scheduler: decides what the next step computes, and keeps the jobs' places until it has."""

from __future__ import annotations

from collections import deque
from collections.abc import KeysView
from dataclasses import dataclass, field
from heapq import heappop, heappush

from allocator.config import BuildConfig
from allocator.manager import KVCacheManager, PrefixMatch
from sim.scheduler.admission import make_admission
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job


@dataclass(slots=True)
class Plan:
    """What one step computes, beside one token for every decoding job."""

    prefills: list[tuple[Job, int]] = field(default_factory=list)
    """Job and tokens of each prefill chunk, in the order of scheduling."""
    admitted: list[Job] = field(default_factory=list)
    preempted: list[Job] = field(default_factory=list)
    out_of_blocks: bool = False
    """Whether decoding or a prefill chunk found too few blocks."""
    copied: int = 0
    """Blocks that decoding jobs had to copy before they could write."""

    @property
    def is_quiet(self) -> bool:
        """Return whether the step only decodes, so that the next may be like it."""
        return not (self.prefills or self.preempted or self.copied)


class Scheduler:
    """Continuous batching: every step gives each decoding job a token, then spends the rest of its token budget
    on prompts, running ones first and new ones after, first come first served.

    A step is `schedule`, which takes all its blocks, and `finish_step`, which gives back those of finished jobs.
    When a step only decodes, `quiet_steps` says how many more like it follow, and `decode` takes them as one.
    """

    def __init__(self, manager: KVCacheManager, build: BuildConfig, config: EngineConfig) -> None:
        if build.max_num_tokens < build.max_batch_size:
            raise ValueError(
                f"max_num_tokens ({build.max_num_tokens}) must be at least max_batch_size "
                f"({build.max_batch_size}): a step decodes the whole batch"
            )
        self.manager = manager
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}  # in the order of starting; the last is preempted first
        self.batch = manager.batch()
        self.context = 0  # tokens of all decoding sequences
        self._build = build
        self._chunked = config.enable_chunked_prefill
        self._rule = make_admission(config, manager)
        self._watermark = int(config.watermark * manager.num_blocks)
        self._prefilling: dict[Job, None] = {}
        self._sequences = 0  # running, the samples to come counted
        self._outstanding = 0  # blocks that running jobs will take until they finish
        self._named = 0  # decoding jobs whose output others may find in the cache
        self._ends: list[tuple[int, int, Job]] = []  # heap: batch tick of the last token, order of joining
        self._joined = 0
        self._decoding: dict[Job, int] = {}  # job -> its entry in the heap; entries of others are stale

    # ---------------------------------------------------------------- what can be accepted at all

    def reject_cause(self, job: Job) -> str:
        """Return why a job can never run, or ""."""
        request, build = job.request, self._build
        if request.prompt_tokens + request.output_tokens > build.max_seq_len:
            return "exceeds_max_seq_len"
        if request.num_samples > build.max_batch_size:
            return "exceeds_max_batch_size"
        if not self._chunked and request.prompt_tokens > build.max_num_tokens:
            return "exceeds_max_num_tokens"
        return "exceeds_pool" if self._rule.least_blocks(job) > self.manager.num_blocks else ""

    # ---------------------------------------------------------------- one step

    def schedule(self) -> Plan:
        """Choose what the next step computes and take the blocks for it: decoding first, then prompts.

        Where blocks are lacking, the jobs that started last are preempted; then nothing is admitted.
        """
        plan = Plan()
        manager, batch = self.manager, self.batch
        while batch and manager.blocks_to_advance(batch) > manager.available_blocks:
            plan.out_of_blocks = True
            self._preempt_last(plan)
        copies = manager.tables.cow_copies
        self.decode()
        plan.copied = manager.tables.cow_copies - copies
        budget = self._build.max_num_tokens - len(batch)
        if self._prefilling:
            budget = self._continue_prefills(plan, budget)
        if self.waiting and not plan.preempted:
            self._admit(plan, budget)
        return plan

    def decode(self, steps: int = 1) -> None:
        """Give every decoding job its token, `steps` times over."""
        if self.batch:
            self._outstanding -= self.manager.blocks_to_advance(self.batch, steps)
            self.manager.advance(self.batch, steps)
            self.context += steps * len(self.batch)

    def finish_step(self, plan: Plan) -> tuple[list[Job], list[Job]]:
        """Account for the tokens sampled; return the jobs that have just been prefilled, and those that finished.

        A job that finishes with its prefill is in both. Decoding jobs finish first, in the order in which they
        joined the batch; their blocks are given back.
        """
        finished: list[Job] = []
        while self._decoding and self._next_end() == self.batch.tick:
            job = heappop(self._ends)[2]
            self._leave_batch(job)
            self._finish(job)
            finished.append(job)
        prefilled: list[Job] = []
        for job, _ in plan.prefills:
            assert job.sequence is not None
            if job.sequence.num_tokens < job.target:
                continue
            del self._prefilling[job]
            job.generated += 1
            prefilled.append(job)
            if job.remaining_tokens:
                for branch in self._fork(job):
                    self._join_batch(branch)
            else:
                self._finish(job)
                finished.append(job)
        return prefilled, finished

    # ---------------------------------------------------------------- steps that are alike

    def quiet_steps(self) -> int:
        """Return how many steps like the one just scheduled, which only decodes, can follow it: until somebody
        finishes, the pool runs out, or something is cached or evicted that lets the first waiting job start.
        """
        steps = self._next_end() - self.batch.tick
        blocks = self.manager.available_blocks
        if self._could_start_first():
            if self._named:
                # a block can be hit in the very step that fills it, so that step is not like this one
                steps = min(steps, self.batch.ticks_until_fill() - 1)
            match = self.waiting[0].match
            if match is not None and match.repeated_blocks:
                # nor is one that evicts a block which the job would have held beside its own
                blocks = self.manager.pool.num_free
        if steps <= 0 or self._most_blocks(steps) <= blocks:
            return steps
        enough, too_many = 0, steps
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self._most_blocks(middle) <= blocks:
                enough = middle
            else:
                too_many = middle
        return enough

    def _most_blocks(self, steps: int) -> int:
        """Return by how many blocks `steps` more steps of decoding may lessen what is available.

        A block that repeats what is cached takes one for itself, and keeps the cached one from eviction. Within
        this bound the manager takes blocks in the order of the steps.
        """
        fills = min(self.batch.fills(steps), self.manager.pool.num_evictable)
        return self.manager.blocks_to_advance(self.batch, steps) + fills

    def _could_start_first(self) -> bool:
        """Return whether only blocks are lacking for the first waiting job."""
        return bool(self.waiting) and self._sequences + self.waiting[0].samples <= self._build.max_batch_size

    def decoding(self) -> KeysView[Job]:
        """Return the decoding jobs, in the order in which they joined the batch."""
        return self._decoding.keys()

    def accepts_arrivals(self) -> bool:
        """Return whether a job that arrives now could be admitted: none waits before it, and the batch has room."""
        return not self.waiting and self._sequences < self._build.max_batch_size

    # ---------------------------------------------------------------- prefill and admission

    def _continue_prefills(self, plan: Plan, budget: int) -> int:
        for job in list(self._prefilling):
            if budget <= 0:
                break
            if job not in self._prefilling:
                continue  # preempted for an earlier one
            sequence = job.sequence
            assert sequence is not None
            chunk = min(job.target - sequence.num_tokens, budget, self._room(job, plan))
            if chunk <= 0:
                break
            blocks = sequence.num_blocks
            self.manager.prefill(sequence, chunk)
            self._outstanding -= sequence.num_blocks - blocks
            plan.prefills.append((job, chunk))
            budget -= chunk
        return budget

    def _room(self, job: Job, plan: Plan) -> int:
        """Return how many more tokens a prefilling job finds blocks for; if none, at the cost of later prompts.

        Decoding jobs have their token for this step already, and will make room by finishing. A job that is left
        alone with too few blocks has computed what others cached before it, and keeps theirs beside its own: it is
        preempted itself, and finds them when it starts again.
        """
        manager, sequence = self.manager, job.sequence
        assert sequence is not None
        while True:
            capacity = (sequence.num_blocks + manager.available_blocks) * manager.tokens_per_block
            if capacity > sequence.num_tokens:
                return capacity - sequence.num_tokens
            plan.out_of_blocks = True
            last = next(reversed(self.running))
            if last in self._decoding:
                return 0
            if last is job:
                if not (self.batch or plan.prefills):  # nobody else will make room: it holds blocks twice
                    self._preempt_last(plan)
                return 0
            self._preempt_last(plan)

    def _admit(self, plan: Plan, budget: int) -> None:
        while self.waiting and budget > 0:
            job = self.waiting[0]
            if self._sequences + job.samples > self._build.max_batch_size:
                return
            match = self._look_up(job)
            left = job.target - match.hit_tokens
            chunk = min(left, budget)
            if chunk < left and not self._chunked and not job.preemptions:
                return
            if not self._fits(job, match, chunk):
                return
            self.waiting.popleft()
            self._start(job, match, chunk)
            plan.admitted.append(job)
            plan.prefills.append((job, chunk))
            budget -= chunk

    def _look_up(self, job: Job) -> PrefixMatch:
        if job.content is None:
            job.content = job.request.content()
        if job.match is None or not self.manager.is_current(job.match):
            job.match = self.manager.lookup(job.content, job.request.salt)
        return job.match

    def _fits(self, job: Job, match: PrefixMatch, chunk: int) -> bool:
        if not self.running:
            return self.manager.can_admit(match, chunk)
        promised = self._rule.blocks_promised(self._outstanding, self._unfinished_prompts())
        room = self.manager.available_blocks - promised - self._watermark
        return self._rule.blocks_for(job, match) <= room

    def _unfinished_prompts(self) -> int:
        size = self.manager.tokens_per_block
        return sum(
            -(-job.target // size) - job.sequence.num_blocks for job in self._prefilling if job.sequence
        )

    def _start(self, job: Job, match: PrefixMatch, chunk: int) -> None:
        assert job.content is not None
        job.sequence = self.manager.admit(
            job.content, chunk, match, job.request.salt, readmission=job.preemptions > 0
        )
        job.recomputed_tokens += max(0, job.written - match.hit_tokens)
        self._outstanding += job.final_blocks(self.manager.tokens_per_block) - job.sequence.num_blocks
        self._sequences += job.samples
        self._prefilling[job] = None
        self.running[job] = None

    # ---------------------------------------------------------------- fork, preemption, end

    def _fork(self, job: Job) -> list[Job]:
        """Return the jobs of all samples; the blocks they will need were counted when the job was admitted."""
        branches = [job]
        if job.samples > 1:
            assert job.sequence is not None
            for sample, sequence in enumerate(self.manager.fork(job.sequence, job.samples - 1), start=1):
                branch = Job(job.request, 1, sample)
                branch.generated = job.generated
                branch.sequence = sequence
                self.running[branch] = None
                branches.append(branch)
            job.samples = 1
        return branches

    def _join_batch(self, job: Job) -> None:
        assert job.sequence is not None
        self.batch.add(job.sequence)
        self.context += job.sequence.num_tokens
        self._named += job.request.named_tokens > job.request.prompt_tokens
        self._joined += 1
        self._decoding[job] = self._joined
        heappush(self._ends, (self.batch.tick + job.remaining_tokens, self._joined, job))

    def _leave_batch(self, job: Job) -> None:
        assert job.sequence is not None
        self.context -= job.sequence.num_tokens
        self._named -= job.request.named_tokens > job.request.prompt_tokens
        del self._decoding[job]
        # every tick since it joined gave it a token; what it has computed is one less than it has sampled
        job.generated = job.sequence.num_tokens - job.request.prompt_tokens + 1
        self.batch.remove(job.sequence)

    def _next_end(self) -> int:
        """Return the tick at which the next decoding job has its last token."""
        while True:
            tick, joined, job = self._ends[0]
            if self._decoding.get(job) == joined:
                return tick
            heappop(self._ends)

    def _preempt_last(self, plan: Plan) -> None:
        job = next(reversed(self.running))
        sequence = job.sequence
        assert sequence is not None
        if job in self._decoding:
            self._leave_batch(job)
            job.target = job.request.prompt_tokens + job.generated
            job.content = sequence.content(job.target)
        else:
            del self._prefilling[job]
        job.written = sequence.num_tokens
        job.preemptions += 1
        job.match = None
        self._retire(job)
        self._outstanding = sum(
            other.final_blocks(self.manager.tokens_per_block) - other.sequence.num_blocks
            for other in self.running
            if other.sequence
        ) + self.manager.tables.copies_needed(self.batch.unready)  # of tails that samples still share
        self.waiting.appendleft(job)
        plan.preempted.append(job)

    def _finish(self, job: Job) -> None:
        self._retire(job)
        job.content = job.match = None

    def _retire(self, job: Job) -> None:
        """Give back what a running job holds."""
        assert job.sequence is not None
        self.manager.release(job.sequence)
        job.cow_copies += job.sequence.cow_copies
        self._sequences -= job.samples
        del self.running[job]
