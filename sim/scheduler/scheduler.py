"""Scheduler: decides what the next step computes, and keeps the jobs' places until it has."""

from __future__ import annotations

from allocator.config import BuildConfig
from allocator.manager import KVCacheManager
from sim.cost import StepCost
from sim.scheduler.alike import StepsAlike
from sim.scheduler.beams import beam_blocks
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.plan import Plan
from sim.scheduler.retention import Wishes


def require_batch_fits(build: BuildConfig) -> None:
    """Raise ValueError unless a step has a token for each sequence of a full batch."""
    if build.max_num_tokens < build.max_batch_size:
        raise ValueError(
            f"max_num_tokens ({build.max_num_tokens}) must be at least max_batch_size "
            f"({build.max_batch_size}): a step decodes the whole batch"
        )


class Scheduler(StepsAlike):
    """Continuous batching: every step gives each decoding job a token, then spends the rest of its token budget
    on prompts, running ones first and new ones after, in the order of the queue. Without `mixed_steps`, a step that
    finds prompts to compute does only that, and the decoding jobs wait.

    A step is `schedule`, which takes all its blocks, then `end_decodes`, which gives back those of finished jobs, and
    for each prompt that is complete `begin_decoding` or `finish`. When a step only decodes, `quiet_steps` says how
    many more like it follow, and `decode` takes them as one. `idle_steps` says it before anything is scheduled, where
    that is plain to see.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        build: BuildConfig,
        config: EngineConfig,
        cost: StepCost | None = None,
        wishes: Wishes | None = None,
    ) -> None:
        """Take the cost model, for its windows, and for `preemption` "cheaper", which asks it; and what requests say of
        how their blocks are to be kept, if they do.

        Raises ValueError for what cannot work.
        """
        require_batch_fits(build)
        super().__init__(manager, build, config, cost)
        self._build = build
        self.wishes = wishes
        # Up to so many tokens at its end, nothing is in the way of a job that decodes a single sample.
        fits = min(build.max_seq_len - 1, manager.num_blocks * manager.tokens_per_block)
        self._surely_fits = fits if config.enable_chunked_prefill and manager.window is None else 0

    # ---------------------------------------------------------------- what can be accepted at all

    def reject_cause(self, job: Job) -> str:
        """Return why a job can never run, or "". Sets its `final_blocks`."""
        manager = self.manager
        if job.final_tokens <= self._surely_fits and job.samples == 1:
            job.final_blocks = -(-job.final_tokens // manager.tokens_per_block)
            return ""
        job.final_blocks = job.blocks_at_end(manager.tokens_per_block, manager.window)
        if job.final_tokens >= self._build.max_seq_len:
            return "exceeds_max_seq_len"
        if job.samples > self.max_batch_size:
            return "exceeds_max_batch_size"
        if job.target > self._build.max_num_tokens and not self._config.enable_chunked_prefill:
            return "exceeds_max_num_tokens"
        least = (self._windowed or self._rule).least_blocks(job)
        if job.request.beam_width > 1:
            least = max(least, beam_blocks(job, manager))
        return "exceeds_pool" if least > manager.num_blocks else ""

    # ---------------------------------------------------------------- one step

    def schedule(self) -> Plan:
        """Choose what the next step computes and take the blocks for it: decoding first, then prompts.

        Where blocks are lacking, the jobs that started last are preempted; then nothing is admitted.
        """
        plan = Plan()
        if self.protection is not None:
            self.protection.update()
        if self._config.mixed_steps:
            if self._stalled:
                plan.resumes, self._stalled = True, False
            if self.decoding:
                self._schedule_decodes(plan)
            self._schedule_prefills(plan, self._build.max_num_tokens - plan.decoding)
        else:
            self._schedule_prefills(plan, self._build.max_num_tokens)
            if plan.chunks:
                self._stalled = bool(self.decoding)
            else:
                plan.resumes, self._stalled = self._stalled, False
                if self.decoding:
                    self._schedule_decodes(plan)
        if self._pool.tier is not None:
            self._move(plan)
        return plan

    def _schedule_decodes(self, plan: Plan) -> None:
        manager, batch, decoding = self.manager, self.batch, len(self.decoding)
        if self.beams.groups:
            self.beams.reorder(batch.tick)
        available = self._pool.available
        # At most, everybody takes a block and a copy; more closely, who starts a block, and who may have to copy.
        if 2 * decoding > available and len(batch.starting()) + len(batch.unready) > available:
            while self.decoding and manager.blocks_to_advance(batch) > manager.available_blocks:
                plan.out_of_blocks = True
                self._preempt(self._victim(), plan)
            decoding = len(self.decoding)
        if batch.unready:
            copies = manager.tables.cow_copies
            self.decode()
            plan.copied = manager.tables.cow_copies - copies
        elif self._named or self.window_keys is not None:
            self.decode()
        else:
            self.context += decoding
            manager.coast(batch, 1)
        plan.decoding, plan.context = decoding, self.context
        if self.window_keys is not None:
            self.count_keys(plan)

    def _schedule_prefills(self, plan: Plan, budget: int) -> None:
        if self._prefilling:
            budget = self._continue_prefills(plan, budget)
        if self.waiting and not plan.preempted:
            self._admit(plan, budget)
        if plan.completed and self._config.admission == "static_batch":
            self._closed = True

    # ---------------------------------------------------------------- prompts

    def _continue_prefills(self, plan: Plan, budget: int) -> int:
        """Compute more of the prompts that are begun; return what is left of the budget."""
        manager, prefilling = self.manager, self._prefilling
        for job in list(prefilling):
            if budget <= 0:
                break
            if job not in prefilling:
                continue  # preempted for an earlier one
            sequence = job.sequence
            assert sequence is not None
            computed = sequence.num_tokens
            left = job.target - computed
            chunk = left if left < budget else budget
            if self._windowed is not None or chunk > self._pool.available * manager.tokens_per_block:
                chunk = min(chunk, self._room(job, plan))
                if chunk <= 0:
                    break
            manager.prefill(sequence, chunk)
            if chunk == left:
                del prefilling[job]
                plan.completed.append(job)
            plan.chunks.append((chunk, computed + chunk))
            plan.prefilling.append(job)
            plan.prefill_tokens += chunk
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
            if last in self.decoding:
                return 0
            if last is job:
                if not (self.decoding or plan.chunks):  # nobody else will make room: it holds blocks twice
                    self._preempt(job, plan)
                return 0
            self._preempt(last, plan)

    def _batch_goes_on(self) -> bool:
        """Return whether a static batch that nobody may join any more is not done."""
        return bool(self.running)

    def _admit(self, plan: Plan, budget: int) -> None:
        """Let waiting jobs start, each with the first chunk of its prompt, while budget, batch and blocks last."""
        manager, waiting, running = self.manager, self.waiting, self.running
        if self._closed:
            if self._batch_goes_on():
                return
            self._closed = False
        while waiting and budget > 0 and self.sequences < self.max_batch_size:
            job = waiting.first  # which may have to look prompts up: not for a batch that is full
            if self.sequences + job.samples > self.max_batch_size:
                return
            if job.swapped:
                if not self._swap_in(job, plan):
                    return
                continue
            match = self._look_up(job)
            hits = match.hit_tokens
            left = job.target - hits
            chunk = left if left < budget else budget
            if chunk < left and not self._config.enable_chunked_prefill and not job.preemptions:
                return
            if self._windowed is not None:
                chunk = self._windowed.first_chunk(job, match, chunk, running)
                if not chunk:
                    return
            elif running or self.apart:
                if self._rule.blocks_for(job, match) > self._room_to_admit():
                    return
            elif not manager.can_admit(match, chunk):
                return
            waiting.pop_first()
            job.sequence = manager.admit(
                match.content,
                chunk,
                match,
                match.salt,
                readmission=job.preemptions > 0,
                retention=None if self.wishes is None else self.wishes.of(job, self._pool.now),
            )
            if self.protection is not None:
                self.protection.release(job)
            if job.written > hits:
                job.recomputed_tokens += job.written - hits
            self.final_blocks += job.final_blocks
            self.sequences += job.samples
            running[job] = None
            if chunk == left:
                plan.completed.append(job)
            else:
                self._prefilling[job] = None
            plan.admitted.append(job)
            plan.chunks.append((chunk, hits + chunk))
            plan.prefilling.append(job)
            plan.prefill_tokens += chunk
            budget -= chunk
