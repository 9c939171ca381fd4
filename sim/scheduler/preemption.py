"""Preemption: who runs has to go when blocks run out, by giving them up or by moving to host memory, and comes back."""

from __future__ import annotations

from allocator.manager import KVCacheManager
from sim.cost import StepBatch, StepCost
from sim.scheduler.beams import choose_with_beams
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.places import Places
from sim.scheduler.plan import Plan
from sim.scheduler.victims import VICTIMS
from sim.scheduler.windowed import WindowedRoom


class Preemption(Places):
    """The part of the scheduler that takes running jobs' blocks away, and lets swapped ones come back."""

    def __init__(self, manager: KVCacheManager, config: EngineConfig, cost: StepCost | None) -> None:
        super().__init__(manager, config, cost)
        window = manager.window
        self._windowed = None if window is None else WindowedRoom(manager, window, config)
        if config.preemption != "recompute" and manager.pool.tier is None:
            raise ValueError(
                f"preemption ({config.preemption}) needs host memory: host_cache_bytes for a block or more"
            )
        self._cost = cost
        # Of the batch, some have missed steps: they waited for prompts, or were swapped out.
        self._stalled = False

    def _victim(self) -> Job:
        """Return whom to preempt."""
        choose = VICTIMS[self._config.victim]
        if self.beams.began_anew:
            return choose_with_beams(choose, self.running, self.manager)
        return choose(self.running, self.manager)

    def _preempt(self, job: Job, plan: Plan) -> None:
        """Take a running job's blocks away; it computes again what it had when it starts next, or finds it swapped."""
        sequence = job.sequence
        assert sequence is not None
        if job.request.beam_width > 1:
            self.beams.began_anew = True
        if job in self.decoding:
            if job.request.beam_width > 1:
                self._preempt_beams(self.beams.leave(job), plan)
                return
            self._leave_batch(job)
            if self._config.preemption != "recompute" and self._is_worth_swapping(job):
                self._swap_out(job, plan)
                return
            job.target = job.request.prompt_tokens + job.generated
            job.content = sequence.content(job.target)
        else:
            del self._prefilling[job]
        job.written = sequence.num_tokens
        job.preemptions += 1
        self.finish(job)
        self.waiting.put_back(job)
        plan.preempted.append(job)

    def _preempt_beams(self, beams: list[Job], plan: Plan) -> None:
        """Take away the blocks of a beam search, which begins anew with its prompt when it starts next."""
        first, prompt = beams[0], beams[0].request.prompt_tokens
        for job in reversed(beams):
            assert job.sequence is not None
            self._leave_batch(job)
            first.recomputed_tokens += job.sequence.num_tokens - prompt
            self.finish(job)
            if job is not first:
                first.cow_copies += job.cow_copies
        first.generated, first.samples, first.written = 0, len(beams), prompt
        first.final_blocks = first.blocks_at_end(self.manager.tokens_per_block, self.manager.window)
        first.preemptions += 1
        self.waiting.put_back(first)
        plan.preempted.append(first)

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
        if self._config.preemption == "swap":
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
        self.final_blocks -= job.final_blocks
        self.sequences -= job.samples
        del self.running[job]
        self.waiting.put_back(job)
        plan.preempted.append(job)

    def _swap_in(self, job: Job, plan: Plan) -> bool:
        """Let the first waiting job, which is swapped out, decode from the next step on, if there is room."""
        manager, sequence = self.manager, job.sequence
        assert sequence is not None
        size = manager.tokens_per_block
        held = -(-sequence.context_len // size)
        needed = manager.blocks_to_swap_in(sequence)
        if self.running and self._windowed is not None:
            if not self._windowed.can_return(job, held, needed, self.running):
                return False
        elif self.running or self.apart:
            if self._rule.blocks_at_return(job, held, needed) > self._room_to_admit():
                return False
        elif needed + sequence.context_len // size + 1 - held > manager.available_blocks:
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
        self.final_blocks += job.final_blocks
        self.sequences += job.samples
        self.running[job] = None
        self._join_batch(job, sequence.num_tokens)
        self._stalled = True
        plan.admitted.append(job)
        return True

    def _move(self, plan: Plan) -> None:
        """Let what has to move between the tiers do so, ahead of all that the step computes."""
        transfers = self.manager.pending_swaps()
        plan.moved += len(transfers)
        self.manager.transfers_done(transfers)
