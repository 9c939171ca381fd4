"""Places: where jobs are, from waiting through the batch in which they decode to their end."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from allocator.eviction.protecting import Protecting
from allocator.manager import KVCacheManager, PrefixMatch
from sim.cost import StepCost
from sim.scheduler.admission import make_admission
from sim.scheduler.beams import Beams
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.protection import Protection
from sim.scheduler.retention import Wishes
from sim.scheduler.waiting import make_waiting
from sim.scheduler.window_keys import WindowKeys

NO_TICK: Final = 1 << 80
"""Later than any tick of a batch."""


class Places:
    """The part of the scheduler that keeps the jobs' places.

    waiting    the jobs that are to start
    running    those that have started, in the order of starting
    apart      those that hold blocks but do not run: their KV is on its way from, or to, another replica
    decoding   those of them that decode, in the order of joining the batch, and each one's number in that order
    context    tokens of all decoding sequences
    sequences  running, the samples to come counted
    final_blocks
               blocks that the running jobs, and those apart, hold at their end
    window_keys
               keys that they attend to in each of the cost's windows, None if it has none
    beams      the beam searches among those that decode
    protection
               of what waiting jobs would hit, if it is wanted
    wishes     what requests say of how their blocks are to be kept, if they do
    end_tick   the batch's tick at which the next decoding job has its last token; NO_TICK if none decodes
    """

    wishes: Wishes | None = None

    def __init__(self, manager: KVCacheManager, config: EngineConfig, cost: StepCost | None) -> None:
        self.manager = manager
        self._pool = manager.pool
        self.batch = manager.batch()
        self.waiting = make_waiting(config.queue_order, lambda job: self._look_up(job).hit_tokens)
        self.running: dict[Job, None] = {}
        self.apart: dict[Job, None] = {}
        self.decoding: dict[Job, int] = {}
        self.context = 0
        self.sequences = self.final_blocks = 0
        windows: tuple[int, ...] = getattr(cost, "windows", ())
        self.window_keys = WindowKeys(windows) if windows else None
        self.beams = Beams(manager)
        self.protection: Protection | None = None
        if config.protect_waiting_hits and isinstance(manager.pool.policy, Protecting):
            self.protection = Protection(manager, manager.pool.policy, self.waiting, self._look_up)
        self.end_tick = NO_TICK
        self._config = config
        self._rule = make_admission(config, manager)
        self._prefilling: dict[Job, None] = {}  # whose prompts take further steps
        self._named = 0  # decoding jobs whose output others may find in the cache
        self._joined = 0
        # Heap: tick of the last token, number of joining, job. The first entry is of a job that decodes.
        self._ends: list[tuple[int, int, Job]] = []

    def _look_up(self, job: Job) -> PrefixMatch:
        """Return what is in the cache of a waiting job's prompt."""
        content, match = job.content, job.match
        if content is None:
            content = job.content = job.request.content()
        if match is None or not self.manager.is_current(match):
            match = job.match = self.manager.lookup(content, job.request.salt)
        return match

    # ---------------------------------------------------------------- decoding

    def begin_decoding(self, job: Job) -> None:
        """Let a job whose prompt is complete decode from the next step on, all its samples each by itself."""
        if job.samples == 1:
            self._join_batch(job, job.target)
        else:
            self._fork(job)

    def _fork(self, job: Job) -> None:
        """Let all samples of a job decode; the blocks they will need were counted when the job was admitted."""
        assert job.sequence is not None
        branches = [job]
        for sample, sequence in enumerate(self.manager.fork(job.sequence, job.samples - 1), start=1):
            branch = Job(job.request, 1, sample, job)
            branch.generated = job.generated
            branch.sequence = sequence
            self.running[branch] = None
            branches.append(branch)
        job.samples = 1
        self.final_blocks -= job.final_blocks
        for branch in branches:
            branch.final_blocks = branch.blocks_at_end(self.manager.tokens_per_block, self.manager.window)
            self.final_blocks += branch.final_blocks
            self._join_batch(branch, job.target)
        if job.request.beam_width > 1:
            self.beams.join(branches, self.batch.tick)

    def _join_batch(self, job: Job, tokens: int) -> None:
        """Let a job decode whose sequence has so many tokens."""
        sequence, request, batch = job.sequence, job.request, self.batch
        assert sequence is not None
        self.context += tokens
        batch.add(sequence)
        if request.named_tokens > request.prompt_tokens:
            self._named += 1
        self._joined = number = self._joined + 1
        self.decoding[job] = number
        if self.window_keys is not None:
            self.window_keys.join(number, tokens, batch.tick)
        end = batch.tick + request.output_tokens - job.generated
        heappush(self._ends, (end, number, job))
        if end < self.end_tick:
            self.end_tick = end

    def _leave_batch(self, job: Job) -> None:
        """Stop a job that has not all its tokens yet."""
        sequence, request = job.sequence, job.request
        assert sequence is not None
        tokens = sequence.num_tokens
        self._leave(job, tokens)
        # every tick since it joined gave it a token; what it has computed is one less than it has sampled
        job.generated = tokens - request.prompt_tokens + 1
        self.batch.remove(sequence)
        self._find_end()

    def _leave(self, job: Job, tokens: int) -> None:
        """Count a job no longer among those that decode, which has so many tokens."""
        self.context -= tokens
        number = self.decoding.pop(job)
        if job.request.named_tokens > job.request.prompt_tokens:
            self._named -= 1
        if self.window_keys is not None:
            self.window_keys.leave(number, tokens)
        if self.beams.groups and job.request.beam_width > 1:
            self.beams.leave(job)

    def _find_end(self) -> None:
        """Update `end_tick`."""
        ends, decoding = self._ends, self.decoding
        while ends:
            self.end_tick, number, job = ends[0]
            if decoding.get(job) == number:
                return
            heappop(ends)
        self.end_tick = NO_TICK

    def end_decodes(self) -> list[Job]:
        """Return the jobs that have all their tokens now, in the order of joining; their blocks are given back."""
        finished: list[Job] = []
        ends, decoding, tick = self._ends, self.decoding, self.batch.tick
        while self.end_tick == tick:
            job = heappop(ends)[2]
            job.generated = job.request.output_tokens
            self._leave(job, job.final_tokens)
            self.finish(job)
            finished.append(job)
            if ends and decoding.get(ends[0][2]) == ends[0][1]:
                self.end_tick = ends[0][0]
            else:
                self._find_end()
        return finished

    # ---------------------------------------------------------------- the end

    def finish(self, job: Job) -> None:
        """Give back what a running job holds, for good or, if it was preempted, for now."""
        sequence = job.sequence
        assert sequence is not None
        self.manager.release(sequence)
        if sequence.cow_copies:
            job.cow_copies += sequence.cow_copies
        job.match = None
        self.final_blocks -= job.final_blocks
        self.sequences -= job.samples
        del self.running[job]

    # ---------------------------------------------------------------- what running jobs were promised

    def _room_to_admit(self) -> int:
        """Return how many blocks whoever starts beside the running jobs may count on."""
        if self._rule.promises_the_end:
            # Of what the running jobs hold at their end, the blocks in their tables are all that they have, and the
            # rest is still to be taken. Whoever decodes in this step has a tail of its own already; who waits may
            # share it.
            promised = self.final_blocks - self.manager.logical_blocks
            if not self._config.mixed_steps:
                promised += self.manager.tables.copies_needed(self.batch.unready)
        else:
            promised = self._unfinished_prompts()
        return self._pool.available - promised - self._rule.watermark

    def _unfinished_prompts(self) -> int:
        size = self.manager.tokens_per_block
        blocks = 0
        for job in self._prefilling:
            if job.sequence is not None:
                blocks += -(-job.target // size) - job.sequence.num_blocks
        return blocks
