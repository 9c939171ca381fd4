"""Replica: scheduler, cache and clock of one engine, as a process that takes one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any

from sim.arrivals import NEVER, Arrivals
from sim.cost import StepBatch, StepCost, StepWork
from sim.recorder import Recorder
from sim.request import Request
from sim.scheduler.job import Job
from sim.scheduler.plan import Plan
from sim.scheduler.scheduler import Scheduler
from sim.stretch import Stretch, steps_until


class Replica:
    """One engine. `run` is its life; `arrivals` are the requests that it serves.

    There is no process for arrivals: whenever a step ends, the replica takes in what has arrived by then, in trace
    order.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        scheduler: Scheduler,
        recorder: Recorder,
        cost: StepCost,
        skipping: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.scheduler = scheduler
        self.recorder = recorder
        self.cost = cost
        self._skipping = skipping
        self._progress = progress
        self.done = 0  # requests that are finished or rejected
        self._needs_work: bool = getattr(cost, "needs_work", False)
        self._affine: dict[int, tuple[int, int] | None] = {}
        self._window_slopes: tuple[int, ...] = getattr(cost, "window_slopes", ())
        manager = scheduler.manager
        self._manager = manager
        self._pool = manager.pool
        self._tables = manager.tables
        self._events = manager.events
        self.retains = scheduler.wishes is not None
        self._expiry_ps = NEVER  # when the next retention is over, as known at the beginning of the step
        self._has_partial_reuse = manager.pool.partial is not None
        # Whether the cost of a step can depend on more than its tokens and keys.
        self._is_special = self._needs_work or self._has_partial_reuse or bool(self._window_slopes)
        self._append_row = recorder.timeline.append
        map_due_ps = recorder.map_due_ps
        self._map_due_ps = NEVER if map_due_ps is None else map_due_ps
        self.arrivals = Arrivals(requests, self._reject_turn)
        if scheduler.wishes is not None:
            scheduler.wishes.ended_ps = self.arrivals.ended_ps

    def run(self, timeout: Callable[[int], Any]) -> Generator[Any, Any, None]:
        """Step until every request is finished or rejected; yield a `timeout` for each step, or stretch of steps.

        Steps that are seen beforehand to do nothing but decode share one with what comes after them: in between,
        nobody else does anything.
        """
        scheduler, arrivals, pool, retains = self.scheduler, self.arrivals, self._pool, self.retains
        tells_time = retains or self._events is not None
        running, waiting, batch = scheduler.running, scheduler.waiting, scheduler.batch
        skipping = self._skipping
        now = clock = 0
        try:
            while True:
                if arrivals.next_ps <= now:
                    self.take_arrivals(now)
                if not running and not waiting:
                    next_ps = arrivals.next_ps
                    if next_ps == NEVER:
                        arrivals.close()
                        yield timeout(now - clock)
                        return
                    yield timeout(next_ps - clock)
                    now = clock = next_ps
                    self.set_clock(now)
                    continue
                if retains:
                    self._expiry_ps = self.next_expiry()
                plan = None
                end = self._coast(now) if skipping else None
                if end is not None:
                    now = end
                else:
                    plan = self.schedule(now)
                    first_ps = self.step_ps(plan)
                    if not plan.chunks and plan.is_quiet:  # the first says it, as a rule, and at once
                        stretch = Stretch(self, plan, now, first_ps)
                        if skipping:
                            stretch.skip()
                        yield timeout(stretch.end_ps - clock)
                        now = clock = stretch.end_ps
                        while not skipping and stretch.step():
                            yield timeout(stretch.end_ps - clock)
                            now = clock = stretch.end_ps
                        stretch.record()
                    else:
                        end = now + first_ps
                        yield timeout(end - clock)
                        self.record(plan, now, end, 1, first_ps, 0, None)
                        now = clock = end
                if tells_time:
                    self.set_clock(now)
                else:
                    pool.now = now
                if scheduler.end_tick == batch.tick:
                    self.end_decodes(now)
                if plan is not None and plan.completed:
                    self.end_prefills(plan, now)
                if now >= self._map_due_ps:
                    self.sample_map(now)
        except StopIteration as error:  # a policy's: compiled code would take it for the end of this
            raise RuntimeError("a StopIteration came up where steps are taken") from error

    # ---------------------------------------------------------------- time

    def set_clock(self, now_ps: int) -> None:
        """Tell the cache, and its log, what time it is: retentions that are over by now end."""
        if self.retains:
            self._pool.pass_time(now_ps)
        else:
            self._pool.now = now_ps
        if self._events is not None:
            self._events.move(now_ps)

    def next_expiry(self) -> int:
        """Return when the next retention is over, if nothing is released or evicted before; NEVER if none is."""
        self._pool.settle()
        next_ps = self._pool.expiries.next()
        return NEVER if next_ps is None else next_ps

    def steps_to_expiry(self, start_ps: int, steps: int, first_ps: int, increment_ps: int) -> int:
        """Return how many of `steps` steps from `start_ps` on begin before the next retention is over.

        That is the first that is over of those known before these steps and of those known now: one way of taking
        steps asks before it takes any, the other after the first, which may have evicted what was to be over.
        """
        expiry_ps = min(self._expiry_ps, self.next_expiry())
        if expiry_ps >= start_ps + steps * first_ps + increment_ps * (steps * (steps - 1) // 2):
            return steps
        return steps_until(expiry_ps - start_ps, first_ps, increment_ps)[0]

    # ---------------------------------------------------------------- arrivals

    def take_arrivals(self, now_ps: int) -> None:
        """Queue, or reject, every request that has arrived by `now_ps`."""
        arrivals, scheduler = self.arrivals, self.scheduler
        while arrivals.next_ps <= now_ps:
            arrival_ps, request = arrivals.pop()
            job = Job(request, request.num_sequences)
            job.arrival_ps = arrival_ps
            cause = scheduler.reject_cause(job)
            if cause:
                self._reject(request, arrival_ps, cause)
            else:
                scheduler.waiting.append(job)

    def _reject(self, request: Request, arrival_ps: int, cause: str) -> None:
        self.recorder.rejected(request, arrival_ps, cause)
        self._count_done()
        self.arrivals.rejected(request)

    def _reject_turn(self, turn: Request) -> None:
        self._reject(turn, turn.arrival_ps, "follows_rejected")

    def _count_done(self) -> None:
        self.done += 1
        if not self.done & 63:
            self.recorder.pack()
            if self._progress is not None:
                self._progress(self.done)

    # ---------------------------------------------------------------- steps

    def schedule(self, now_ps: int) -> Plan:
        """Return what the step that begins now computes."""
        plan = self.scheduler.schedule()
        if plan.admitted or plan.preempted:
            self._note_plan(plan, now_ps)
        if plan.chunks and not plan.decoding and self.scheduler.decoding:
            self._note_stall(now_ps)
        return plan

    def decode_affine(self, sequences: int) -> tuple[int, int] | None:
        """Return the cost model's answer, asked once for each batch size."""
        try:
            return self._affine[sequences]
        except KeyError:
            self._affine[sequences] = found = self.cost.decode_affine(sequences)
            return found

    def step_ps(self, plan: Plan) -> int:
        """Return how long a step takes that has just been scheduled."""
        batch = StepBatch(plan.decoding, plan.context, plan.chunks)
        if plan.copied or plan.moved or self._is_special:
            manager = self._manager
            copies = manager.pending_copies()
            if len(copies):
                batch.copied_tokens = int(copies[:, 2].sum())
            batch.swapped_tokens = plan.moved * manager.tokens_per_block
            batch.window_keys = plan.window_keys
            if self._needs_work:
                decoding = list(islice(self.scheduler.decoding, plan.decoding))
                batch.work = StepWork(decoding, plan.prefilling, copies)
        return self.cost.step(batch)

    def _coast(self, start: int) -> int | None:
        """Take steps in which there is plainly nothing to do but decode, if the next is one, and return their end.

        They end early with the first arrival that could be admitted.
        """
        scheduler, arrivals = self.scheduler, self.arrivals
        steps = scheduler.idle_steps()
        if not steps:
            return None
        decoding = len(scheduler.decoding)
        affine = self._affine.get(decoding) or self.decode_affine(decoding)
        if affine is None:
            return None
        base, slope = affine
        first, increment = self.coast_ps(base, slope)
        if self.retains:
            steps = self.steps_to_expiry(start, steps, first, increment)
        end = start + steps * first + increment * (steps * (steps - 1) // 2)
        if arrivals.next_ps < end and scheduler.accepts_arrivals():
            steps, taken = steps_until(arrivals.next_ps - start, first, increment)
            end = start + taken
        self.take_coast(start, end, steps, first, increment)
        return end

    def coast_ps(self, base: int, slope: int) -> tuple[int, int]:
        """Return how long the next step takes if it only decodes, and by how much those like it after it take longer.

        A step takes base + slope · context, so that s of them take s · first + increment · s (s − 1) / 2.
        """
        scheduler = self.scheduler
        increment = slope * len(scheduler.decoding)
        first = base + slope * scheduler.context + increment
        if scheduler.window_keys is not None:
            longer = self._weighted(scheduler.window_keys.growing)
            return first + self._weighted(scheduler.window_keys.keys) + longer, increment + longer
        return first, increment

    def step_increment(self, slope: int) -> int:
        """Return by how much a step of all decoding sequences takes longer than the one before, picoseconds."""
        return self.coast_ps(0, slope)[1]

    def _weighted(self, keys: Iterable[int]) -> int:
        """Return how long it takes to attend to so many keys in each of the cost's windows."""
        return sum(slope * count for slope, count in zip(self._window_slopes, keys, strict=True))

    def take_coast(self, start: int, end: int, steps: int, first: int, increment: int) -> None:
        """Take steps in which there is nothing to do but decode, and record them; the last one begins by now."""
        scheduler, manager, pool = self.scheduler, self._manager, self._pool
        later = scheduler.coast(steps)
        if self._has_partial_reuse:
            manager.end_step()
        last_start = end - first - increment * (steps - 1)
        if self.arrivals.next_ps <= last_start:
            self.take_arrivals(last_start)
        if pool.shared or self._tables.twinned:
            self._note_shared()
        free, evictable, evicted = pool.counts()
        self._append_row(
            (
                start,
                steps,
                len(scheduler.running),
                len(scheduler.waiting) + scheduler.waiting.packed,
                len(scheduler.decoding),
                0,
                0,
                first,
                increment if steps > 1 else 0,
                free,
                evictable,
                manager.logical_blocks,
                manager.logical_tokens,
                later,
                evicted,
            )
        )

    # ---------------------------------------------------------------- ends of steps

    def end_decodes(self, now_ps: int) -> None:
        """Account for the decoding jobs that have all their tokens now."""
        for job in self.scheduler.end_decodes():
            self._finish(job, now_ps)

    def end_prefills(self, plan: Plan, now_ps: int) -> None:
        """Account for the tokens sampled at the ends of prompts."""
        scheduler = self.scheduler
        for job in plan.completed:
            job.generated += 1
            if job.generated == 1 and job.first_ps < 0:
                job.first_ps = now_ps
            if job.last_ps >= 0:
                self.recorder.gap(now_ps - job.last_ps)
                job.last_ps = -1
            if job.generated == job.request.output_tokens:
                scheduler.finish(job)
                self._finish(job, now_ps)
            else:
                scheduler.begin_decoding(job)

    def _finish(self, job: Job, now_ps: int) -> None:
        if self.recorder.finished(job, now_ps):
            self.arrivals.finished(job.request, now_ps)
            self._count_done()

    # ---------------------------------------------------------------- what is noted of steps

    def sample_map(self, now_ps: int) -> None:
        """Look at who owns which block, if it is time to, as a step has just ended."""
        if now_ps >= self._map_due_ps:
            self.recorder.sample_map(now_ps, self.scheduler)
            self._map_due_ps = self.recorder.map_due_ps or 0

    def _note_plan(self, plan: Plan, now_ps: int) -> None:
        for job in plan.admitted:
            if job.preemptions:
                self.recorder.resumed(job, now_ps)
            else:  # only a request's first admission counts
                match = job.match
                assert match is not None
                job.admit_ps = now_ps
                job.query_blocks = match.query_blocks
                job.hit_blocks, job.hit_tokens = match.hit_blocks, match.hit_tokens
            if self._events is not None:
                self.recorder.started(job)
        for job in plan.preempted:  # also who came back in this very step
            self.recorder.paused(job, now_ps)
            has_sampled = job.generated or job.first_ps >= 0  # a beam search has forgotten what it generated
            if has_sampled and job.last_ps < 0:  # its last token came with the end of the step before
                job.last_ps = now_ps

    def _note_stall(self, now_ps: int) -> None:
        """Note when the batch, which has to wait while prompts are computed, had its last tokens."""
        for job in self.scheduler.decoding:
            if job.last_ps < 0:
                job.last_ps = now_ps

    def _end_stall(self, now_ps: int, decoded: int) -> int:
        """Note the gaps of those that had to wait; return how many of the `decoded` those are.

        They are among the first of the batch: who came back from host memory in this step decodes from the next on.
        """
        late = 0
        for job in islice(self.scheduler.decoding, decoded):
            if job.last_ps >= 0:
                late += 1
                self.recorder.gap(now_ps - job.last_ps)
                job.last_ps = -1
        return late

    def record(
        self,
        plan: Plan,
        start: int,
        end: int,
        steps: int,
        first: int,
        increment: int,
        at_first: tuple[int, int] | None,
    ) -> None:
        """Write the timeline row of steps that end now; `at_first` are referenced blocks and written slots then."""
        scheduler, manager, pool = self.scheduler, self._manager, self._pool
        decoding = plan.decoding
        free, evictable, evicted = pool.counts()
        later = 0
        if at_first is not None:
            later = pool.num_blocks - free - evictable - at_first[0]
        if (
            at_first
            or plan.resumes
            or plan.preempted
            or plan.out_of_blocks
            or pool.shared
            or self._tables.twinned
        ):
            late = self._end_stall(end, decoding) if plan.resumes else 0
            later_tokens = at_first[1] - manager.kv_tokens + (steps - 1) * decoding if at_first else 0
            # a prompt that waits for blocks waits through all of its steps
            self._note_shared(late, later_tokens, len(plan.preempted), steps if plan.out_of_blocks else 0)
        self._append_row(
            (
                start,
                steps,
                len(scheduler.running),
                len(scheduler.waiting) + scheduler.waiting.packed,
                decoding,
                len(plan.chunks),
                plan.prefill_tokens,
                first,
                increment if steps > 1 else 0,
                free,
                evictable,
                manager.logical_blocks,
                manager.logical_tokens,
                later,
                evicted,
            )
        )

    def _note_shared(
        self, late: int = 0, later_tokens: int = 0, preemptions: int = 0, out_of_blocks: int = 0
    ) -> None:
        """Note what the next row of the timeline is to say apart from its numbers."""
        manager, pool = self._manager, self._pool
        referenced, logical = pool.num_referenced, manager.logical_blocks
        unwritten = logical * manager.tokens_per_block - manager.logical_tokens
        shared_slots = manager.kv_tokens - (referenced * manager.tokens_per_block - unwritten)
        beside = manager.saved_blocks - (logical - referenced)
        self.recorder.timeline.note(late, shared_slots, later_tokens, beside, preemptions, out_of_blocks)
