"""Scheduler: decides what the next step computes, and keeps the jobs' places until it has."""

from __future__ import annotations

from collections.abc import KeysView
from heapq import heappop, heappush

from allocator.config import BuildConfig
from allocator.manager import KVCacheManager, PrefixMatch
from sim.cost import StepBatch, StepCost
from sim.scheduler.admission import make_admission
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.victims import VICTIMS
from sim.scheduler.waiting import make_waiting
from sim.scheduler.window_keys import WindowKeys
from sim.scheduler.windowed import WindowedRoom


class Plan:
    """What one step computes, beside one token for every decoding job.

    prefills       job and tokens of each prefill chunk, in the order of scheduling
    admitted       jobs that start, or come back from host memory
    preempted      jobs that had to go
    out_of_blocks  whether decoding or a prefill chunk found too few blocks
    copied         blocks that decoding jobs had to copy before they could write
    moved          blocks that move between GPU and host memory before anything is computed
    decoding       sequences that decode; the others of the batch wait while prompts are computed
    context        keys that those attend to
    window_keys    those of them in each of the cost's windows, if it has any
    resumes        whether they waited so before this step
    """

    __slots__ = (
        "admitted",
        "context",
        "copied",
        "decoding",
        "moved",
        "out_of_blocks",
        "preempted",
        "prefills",
        "resumes",
        "window_keys",
    )

    def __init__(self) -> None:
        self.prefills: list[tuple[Job, int]] = []
        self.admitted: list[Job] = []
        self.preempted: list[Job] = []
        self.out_of_blocks = False
        self.copied = 0
        self.decoding = self.context = self.moved = 0
        self.window_keys: tuple[int, ...] = ()
        self.resumes = False

    @property
    def is_quiet(self) -> bool:
        """Return whether the step only decodes, so that the next may be like it."""
        return not (
            self.prefills or self.admitted or self.preempted or self.copied or self.moved or self.resumes
        )


class Scheduler:
    """Continuous batching: every step gives each decoding job a token, then spends the rest of its token budget
    on prompts, running ones first and new ones after, in the order of the queue. Without `mixed_steps`, a step that
    finds prompts to compute does only that, and the decoding jobs wait.

    A step is `schedule`, which takes all its blocks, then `end_decodes` and `end_prefills`, which give back those
    of finished jobs. When a step only decodes, `quiet_steps` says how many more like it follow, and `decode` takes
    them as one. `idle_steps` says it before anything is scheduled, where that is plain to see.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        build: BuildConfig,
        config: EngineConfig,
        cost: StepCost | None = None,
    ) -> None:
        """Take the cost model, for its windows, and for `preemption` "cheaper", which asks it.

        Raises ValueError for what cannot work.
        """
        if build.max_num_tokens < build.max_batch_size:
            raise ValueError(
                f"max_num_tokens ({build.max_num_tokens}) must be at least max_batch_size "
                f"({build.max_batch_size}): a step decodes the whole batch"
            )
        self.manager = manager
        self.waiting = make_waiting(config.queue_order, lambda job: self._look_up(job).hit_tokens)
        self.running: dict[Job, None] = {}  # in the order of starting; the last is preempted first
        self.batch = manager.batch()
        self.context = 0  # tokens of all decoding sequences
        windows: tuple[int, ...] = getattr(cost, "windows", ())
        self.window_keys = WindowKeys(windows) if windows else None
        self.sequences = 0  # running, the samples to come counted
        self.max_batch_size = build.max_batch_size
        self._max_num_tokens = build.max_num_tokens
        self._max_seq_len = build.max_seq_len
        self._chunked = config.enable_chunked_prefill
        self._rule = make_admission(config, manager)
        window = manager.window
        self._windowed = None if window is None else WindowedRoom(manager, window, config)
        self._static = config.admission == "static_batch"
        self._closed = False  # a static batch: one of its prompts is computed, and not all its jobs are done
        self._mixed = config.mixed_steps
        self._stalled = (
            False  # of the batch, some have missed steps: they waited for prompts, or were swapped out
        )
        self._tiered = manager.pool.tier is not None
        if config.preemption != "recompute" and not self._tiered:
            raise ValueError(
                f"preemption ({config.preemption}) needs host memory: host_cache_bytes for a block or more"
            )
        self._preemption = config.preemption
        self._cost = cost
        self._choose_victim = VICTIMS[config.victim]
        self._watermark = int(config.watermark * manager.num_blocks)
        self._prefilling: dict[Job, None] = {}
        self._final_blocks = 0  # that the running jobs hold at their end
        self._named = 0  # decoding jobs whose output others may find in the cache
        self._ends: list[tuple[int, int, Job]] = []  # heap: batch tick of the last token, order of joining
        self._joined = 0
        self._decoding: dict[Job, int] = {}  # job -> its entry in the heap; entries of others are stale

    # ---------------------------------------------------------------- what can be accepted at all

    def reject_cause(self, job: Job) -> str:
        """Return why a job can never run, or "". Sets its `final_blocks`."""
        job.final_blocks = job.blocks_at_end(self.manager.tokens_per_block, self.manager.window)
        if job.final_tokens >= self._max_seq_len:
            return "exceeds_max_seq_len"
        if job.samples > self.max_batch_size:
            return "exceeds_max_batch_size"
        if job.target > self._max_num_tokens and not self._chunked:
            return "exceeds_max_num_tokens"
        least = (self._windowed or self._rule).least_blocks(job)
        return "exceeds_pool" if least > self.manager.num_blocks else ""

    # ---------------------------------------------------------------- one step

    def schedule(self) -> Plan:
        """Choose what the next step computes and take the blocks for it: decoding first, then prompts.

        Where blocks are lacking, the jobs that started last are preempted; then nothing is admitted.
        """
        plan = Plan()
        if self._mixed:
            plan.resumes, self._stalled = self._stalled, False
            self._schedule_decodes(plan)
            self._schedule_prefills(plan, self._max_num_tokens - plan.decoding)
        else:
            self._schedule_prefills(plan, self._max_num_tokens)
            if plan.prefills:
                self._stalled = bool(self.batch)
            else:
                plan.resumes, self._stalled = self._stalled, False
                self._schedule_decodes(plan)
        if self._tiered:
            self._move(plan)
        return plan

    def _move(self, plan: Plan) -> None:
        """Let what has to move between the tiers do so, ahead of all that the step computes."""
        transfers = self.manager.pending_swaps()
        plan.moved += len(transfers)
        self.manager.transfers_done(transfers)

    def _untouched_blocks(self) -> int:
        """Return how many blocks steps may take and still be like the one before: evicting makes some move."""
        return self.manager.pool.num_free if self._tiered else self.manager.pool.available

    def _schedule_decodes(self, plan: Plan) -> None:
        manager, batch = self.manager, self.batch
        decoding = len(batch)
        if decoding:
            if 2 * decoding > manager.available_blocks:  # each takes one block at most, and one copy
                while batch and manager.blocks_to_advance(batch) > manager.available_blocks:
                    plan.out_of_blocks = True
                    self._preempt(self._choose_victim(self.running, manager), plan)
                decoding = len(batch)
            copies = manager.tables.cow_copies
            self.decode()
            plan.context = self.context
            if self.window_keys is not None:
                plan.window_keys = tuple(self.window_keys.keys)
            plan.copied = manager.tables.cow_copies - copies
            plan.decoding = decoding

    def _schedule_prefills(self, plan: Plan, budget: int) -> None:
        if self._prefilling:
            budget = self._continue_prefills(plan, budget)
        if self.waiting and not plan.preempted:
            self._admit(plan, budget)

    def decode(self, steps: int = 1) -> None:
        """Give every decoding job its token, `steps` times over. There must be blocks for it."""
        if self._decoding:
            self.context += steps * len(self._decoding)
            if self._named or (self.batch.unready and not self.manager.writes_in_place(self.batch)):
                self.manager.advance(self.batch, steps)
            else:
                self.manager.coast(self.batch, steps)
            if self.window_keys is not None:
                self.window_keys.advance(self.batch.tick, steps)

    def coast(self, steps: int) -> int:
        """Do what `decode` does, for steps that are idle; return how many blocks they take after the first."""
        self.context += steps * len(self._decoding)
        later = self.manager.coast(self.batch, steps)
        if self.window_keys is not None:
            self.window_keys.advance(self.batch.tick, steps)
        return later

    def end_decodes(self) -> list[Job]:
        """Return the jobs that have all their tokens now, in the order of joining; their blocks are given back."""
        finished: list[Job] = []
        while self._decoding and self.next_end() == self.batch.tick:
            job = heappop(self._ends)[2]
            self._leave_batch(job)
            self._finish(job)
            finished.append(job)
        return finished

    def end_prefills(self, plan: Plan) -> tuple[list[Job], list[Job]]:
        """Account for the tokens sampled at the ends of prompts; return the jobs that have just been prefilled, and
        those of them that finished with it.
        """
        finished: list[Job] = []
        prefilled: list[Job] = []
        for job, _ in plan.prefills:
            assert job.sequence is not None
            if job.sequence.num_tokens < job.target:
                continue
            del self._prefilling[job]
            job.generated += 1
            prefilled.append(job)
            self._closed = self._static
            if job.generated == job.request.output_tokens:
                self._finish(job)
                finished.append(job)
            else:
                if job.samples > 1:
                    self._fork(job)
                else:
                    self._join_batch(job)
        return prefilled, finished

    # ---------------------------------------------------------------- steps that are alike

    def idle_steps(self) -> int:
        """Return for how many steps there is nothing to do but decode, if that is plain to see; else 0.

        The answer is what `schedule` and `quiet_steps` would come to: blocks abound, nobody can start, nobody's
        prompt is unfinished, no member of the batch has to copy a block, and what it generates nobody else did.
        """
        decoding = len(self._decoding)
        if not decoding or self._named or self._prefilling or (self.waiting and self._may_start()):
            return 0
        if self._stalled:
            return 0
        manager, batch = self.manager, self.batch
        steps = self.next_end() - batch.tick
        if self._windowed is not None:
            steps = min(steps, manager.ticks_until_leave(batch))
        if self.window_keys is not None:
            even = self.window_keys.even_ticks(batch.tick)
            if even == 1:
                return 0  # the step after the next is not like it
            steps = min(steps, even)
        # a block started and one filled every tokens_per_block steps, and twice that for where they begin
        most = 2 * decoding * (steps // manager.tokens_per_block + 2)
        if most > self._untouched_blocks() or (batch.unready and not manager.writes_in_place(batch)):
            return 0
        return steps

    def _may_start(self) -> bool:
        """Return whether a waiting job finds a place in the batch, so that it depends on blocks."""
        if self._closed:
            return False
        if self.waiting.order_follows_cache:  # which one is first can change
            return self.sequences < self.max_batch_size
        return self.sequences + self.waiting.first.samples <= self.max_batch_size

    def quiet_steps(self) -> int:
        """Return how many steps like the one just scheduled, which only decodes, can follow it: until somebody
        finishes, the pool runs out, or something is cached or evicted that lets the first waiting job start.
        """
        steps = self.next_end() - self.batch.tick
        blocks = self._untouched_blocks()
        if self._windowed is not None:  # what leaves a window makes room
            steps = min(steps, self.manager.ticks_until_leave(self.batch))
        if self.window_keys is not None:  # beyond, who has reached a window attends to no more keys
            steps = min(steps, self.window_keys.even_ticks(self.batch.tick))
        if self.waiting and self._may_start():
            if self.manager.config.enable_partial_reuse:
                return 0  # what a step fills can be hit in part in the next
            match = self.waiting.first.match
            eviction_tells = (
                self.waiting.order_follows_cache
                or self._windowed is not None  # the next shorter hit may be on blocks that others hold
                or (match is not None and match.repeated_blocks)
            )
            if not self._mixed and (self._named or eviction_tells):
                return 0  # what this very step has cached or evicted, only the next one's admission sees
            if self._named:
                # a block can be hit in the very step that fills it, so that step is not like this one
                steps = min(steps, self.batch.ticks_until_fill() - 1)
            if eviction_tells:
                # nor is one that evicts a block which the job would have held beside its own, or be first for
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

    @property
    def num_decoding(self) -> int:
        """Return how many jobs decode."""
        return len(self._decoding)

    def decoding(self) -> KeysView[Job]:
        """Return the decoding jobs, in the order in which they joined the batch."""
        return self._decoding.keys()

    def accepts_arrivals(self) -> bool:
        """Return whether a job that arrives now could be admitted: none waits before it, and the batch has room."""
        if self.sequences >= self.max_batch_size or self._closed:
            return False
        return not self.waiting or self.waiting.arrivals_may_lead

    def next_end(self) -> int:
        """Return the batch's tick at which the next decoding job has its last token. Somebody must be decoding."""
        ends, decoding = self._ends, self._decoding
        while True:
            tick, joined, job = ends[0]
            if decoding.get(job) == joined:
                return tick
            heappop(ends)

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
            self.manager.prefill(sequence, chunk)
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
            if self._windowed is not None:
                room = self._windowed.next_chunk(job, self.running)
            else:
                room = manager.room(sequence)
            if room > 0:
                return room
            plan.out_of_blocks = True
            last = next(reversed(self.running))
            if last in self._decoding:
                return 0
            if last is job:
                if not (self.batch or plan.prefills):  # nobody else will make room: it holds blocks twice
                    self._preempt(job, plan)
                return 0
            self._preempt(last, plan)

    def _admit(self, plan: Plan, budget: int) -> None:
        waiting = self.waiting
        if not self.running:
            self._closed = False
        if self._closed:
            return
        while waiting and budget > 0:
            job = waiting.first
            if self.sequences + job.samples > self.max_batch_size:
                return
            if job.swapped:
                if not self._swap_in(job, plan):
                    return
                continue
            match = self._look_up(job)
            left = job.target - match.hit_tokens
            chunk = min(left, budget)
            if chunk < left and not self._chunked and not job.preemptions:
                return
            if self._windowed is not None:
                chunk = self._windowed.first_chunk(job, match, chunk, self.running)
                if not chunk:
                    return
            elif not self._fits(job, match, chunk):
                return
            waiting.pop_first()
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
        return self._rule.blocks_for(job, match) <= self._room_to_admit()

    def _room_to_admit(self) -> int:
        """Return how many blocks whoever starts beside the running jobs may count on."""
        # Of what the running jobs hold at their end, the blocks in their tables are all that they have, and the rest
        # is still to be taken. Whoever decodes in this step has a tail of its own already; who waits may share it.
        outstanding = self._final_blocks - self.manager.logical_blocks
        if not self._mixed:
            outstanding += self.manager.tables.copies_needed(self.batch.unready)
        promised = self._rule.blocks_promised(outstanding, self._unfinished_prompts())
        return self.manager.available_blocks - promised - self._watermark

    def _unfinished_prompts(self) -> int:
        size = self.manager.tokens_per_block
        blocks = 0
        for job in self._prefilling:
            if job.sequence is not None:
                blocks += -(-job.target // size) - job.sequence.num_blocks
        return blocks

    def _start(self, job: Job, match: PrefixMatch, chunk: int) -> None:
        assert job.content is not None
        job.sequence = self.manager.admit(
            job.content, chunk, match, job.request.salt, readmission=job.preemptions > 0
        )
        if job.written > match.hit_tokens:
            job.recomputed_tokens += job.written - match.hit_tokens
        self._final_blocks += job.final_blocks
        self.sequences += job.samples
        self._prefilling[job] = None
        self.running[job] = None

    # ---------------------------------------------------------------- fork, preemption, end

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
        self._final_blocks -= job.final_blocks
        for branch in branches:
            branch.final_blocks = branch.blocks_at_end(self.manager.tokens_per_block, self.manager.window)
            self._final_blocks += branch.final_blocks
            self._join_batch(branch)

    def _join_batch(self, job: Job) -> None:
        sequence, request, batch = job.sequence, job.request, self.batch
        assert sequence is not None
        self.context += sequence.num_tokens
        batch.add(sequence)
        self._named += request.named_tokens > request.prompt_tokens
        self._joined += 1
        self._decoding[job] = self._joined
        if self.window_keys is not None:
            self.window_keys.join(self._joined, sequence.num_tokens, batch.tick)
        heappush(self._ends, (batch.tick + request.output_tokens - job.generated, self._joined, job))

    def _leave_batch(self, job: Job) -> None:
        sequence, request = job.sequence, job.request
        assert sequence is not None
        tokens = sequence.num_tokens
        self.context -= tokens
        self._named -= request.named_tokens > request.prompt_tokens
        joined = self._decoding.pop(job)
        if self.window_keys is not None:
            self.window_keys.leave(joined, tokens)
        # every tick since it joined gave it a token; what it has computed is one less than it has sampled
        job.generated = tokens - request.prompt_tokens + 1
        self.batch.remove(sequence)

    def _preempt(self, job: Job, plan: Plan) -> None:
        """Take a running job's blocks away; it computes again what it had when it starts next, or finds it swapped."""
        sequence = job.sequence
        assert sequence is not None
        if job in self._decoding:
            self._leave_batch(job)
            if self._preemption != "recompute" and self._is_worth_swapping(job):
                self._swap_out(job, plan)
                return
            job.target = job.request.prompt_tokens + job.generated
            job.content = sequence.content(job.target)
        else:
            del self._prefilling[job]
        job.written = sequence.num_tokens
        job.preemptions += 1
        job.match = None
        self._retire(job)
        self.waiting.put_back(job)
        plan.preempted.append(job)

    def _is_worth_swapping(self, job: Job) -> bool:
        """Return whether the host has room for what a job holds, and moving it is wanted."""
        sequence = job.sequence
        assert sequence is not None
        tier = self.manager.host_tier
        blocks = self.manager.blocks_to_swap_out(sequence)
        if (
            blocks > tier.host.available or len(self.running) == 1
        ):  # alone, it would come back to the same shortage
            return False
        if self._preemption == "swap":
            return True
        assert self._cost is not None, "a cost model says what is cheaper"
        size, again = self.manager.tokens_per_block, job.request.prompt_tokens + job.generated
        swapped = self._cost.step(StepBatch(0, 0, swapped_tokens=(blocks + sequence.num_blocks) * size))
        return swapped < self._cost.step(StepBatch(0, 0, [(again, again)]))

    def _swap_out(self, job: Job, plan: Plan) -> None:
        assert job.sequence is not None
        self.manager.swap_out(job.sequence)
        self._move(plan)
        job.swapped = True
        job.preemptions += 1
        job.match = None
        self._forget(job)
        self.waiting.put_back(job)
        plan.preempted.append(job)

    def _swap_in(self, job: Job, plan: Plan) -> bool:
        """Let the first waiting job, which is swapped out, decode from the next step on, if there is room."""
        manager, sequence = self.manager, job.sequence
        assert sequence is not None
        size = manager.tokens_per_block
        held = -(-sequence.num_tokens // size)
        needed = manager.blocks_to_swap_in(sequence)
        if self.running:
            if self._rule.blocks_at_return(job, held, needed) > self._room_to_admit():
                return False
        elif needed + sequence.num_tokens // size + 1 - held > manager.available_blocks:
            # Alone, and still too large: it holds blocks of its own beside cached ones that say the same.
            job.target = job.request.prompt_tokens + job.generated
            job.content = sequence.content(job.target)
            job.written = sequence.num_tokens
            job.swapped = False
            manager.release(sequence)
            return True
        self.waiting.pop_first()
        manager.swap_in(sequence)
        self._move(plan)
        job.swapped = False
        self._final_blocks += job.final_blocks
        self.sequences += job.samples
        self.running[job] = None
        self._join_batch(job)
        self._stalled = True
        plan.admitted.append(job)
        return True

    def _finish(self, job: Job) -> None:
        self._retire(job)
        job.content = job.match = None

    def _retire(self, job: Job) -> None:
        """Give back what a running job holds."""
        assert job.sequence is not None
        self.manager.release(job.sequence)
        job.cow_copies += job.sequence.cow_copies
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """Count a job no longer among the running ones."""
        self._final_blocks -= job.final_blocks
        self.sequences -= job.samples
        del self.running[job]
