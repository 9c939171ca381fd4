"""The engine: one replica's life as a SimPy process. The only module that knows SimPy, and the one clock.

The process takes one step after the other (or one stretch of steps that are alike), each a single timeout. There
is no process for arrivals: whenever a step ends, the engine takes in what has arrived by then, in trace order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Iterable
from itertools import islice
from math import isqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import simpy

from allocator.config import BuildConfig, CacheConfig
from allocator.manager import KVCacheManager
from sim.arrivals import NEVER, Arrivals
from sim.cost import StepBatch, StepCost, StepWork
from sim.recorder import Recorder
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.scheduler import Plan, Scheduler


def simulate(
    requests: Collection[Request],
    build: BuildConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    *,
    num_blocks: int,
    cost: StepCost,
    num_host_blocks: int = 0,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> RunResult:
    """Replay requests through one engine replica and return all that happened.

    requests    sorted by arrival; request i has request_id i
    num_blocks  blocks of the KV pool (see MemoryBudget); without paging, their tokens are cut into pieces of
                max_seq_len
    cost        how long a step takes
    num_host_blocks
                blocks of host memory behind the pool
    progress    called now and then with the number of requests that are done with
    folder      where to keep the records of requests and steps, should they not fit in memory; the result reads
                from there. Requests that are made as they are walked through (a RequestStream) are held only
                while they wait or run.

    Raises ValueError if the configuration cannot work or the requests are not in order. A request that can never
    run is rejected, by cause, and the run goes on.
    """
    manager = make_manager(build, cache, num_blocks, num_host_blocks, engine.events)
    recorder = Recorder(requests, manager, engine.block_map_samples, folder)
    scheduler = Scheduler(manager, build, engine, cost)
    replica = Replica(requests, scheduler, recorder, cost, engine.event_skipping, progress)
    return recorder.result(run_clock(replica.run))


def run_clock(process: Callable[[simpy.Environment], Generator[simpy.Event, Any, None]]) -> float:
    """Let a SimPy process run until nothing happens any more; return the real seconds that it took."""
    environment = simpy.Environment()
    environment.process(process(environment))
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic garbage before the run ends, and scanning it all takes a third of the time
    start = perf_counter()
    try:
        environment.run()
    finally:
        if collecting:
            gc.enable()
    return perf_counter() - start


def make_manager(
    build: BuildConfig, cache: CacheConfig, num_blocks: int, num_host_blocks: int, events: bool
) -> KVCacheManager:
    """Return the cache of one replica. Raises ValueError if the configuration cannot work."""
    if build.enable_paged_kv_cache:
        return KVCacheManager(
            num_blocks,
            build.tokens_per_block,
            cache,
            num_host_blocks=num_host_blocks,
            lifetimes=True,
            events=events,
        )
    if num_host_blocks:
        raise ValueError(f"num_host_blocks ({num_host_blocks}) must be 0 when paging is off")
    whole = num_blocks * build.tokens_per_block // build.max_seq_len
    if whole < 1:
        raise ValueError(
            f"num_blocks ({num_blocks}) of {build.tokens_per_block} tokens must hold one sequence of max_seq_len "
            f"({build.max_seq_len}) when paging is off"
        )
    return KVCacheManager.contiguous(whole, build.max_seq_len, events=events)


class Replica:
    """Scheduler, cache and clock of one engine."""

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
        self._done = 0
        self._needs_work: bool = getattr(cost, "needs_work", False)
        self._affine: dict[int, tuple[int, int] | None] = {}
        self._window_slopes: tuple[int, ...] = getattr(cost, "window_slopes", ())
        self._evicted = 0
        self._events = scheduler.manager.events
        map_due_ps = recorder.map_due_ps
        self._map_due_ps = NEVER if map_due_ps is None else map_due_ps
        self.arrivals = Arrivals(requests, self._reject_turn)

    def run(self, environment: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        """Step until every request is finished or rejected."""
        scheduler, arrivals, pool = self.scheduler, self.arrivals, self.scheduler.manager.pool
        timeout = environment.timeout
        now = 0
        while True:
            if arrivals.next_ps <= now:
                self.take_arrivals(now)
            if not scheduler.running and not scheduler.waiting:
                next_ps = arrivals.next_ps
                if next_ps == NEVER:
                    arrivals.close()
                    return
                yield timeout(next_ps - now)
                now = next_ps
                continue
            pool.now = now
            if self._events is not None:
                self._events.move(now)
            idle = scheduler.idle_steps() if self._skipping else 0
            affine = self.decode_affine(scheduler.num_decoding) if idle else None
            if affine is not None:
                end = self._coast(now, idle, *affine)
                yield timeout(end - now)
                now = end
                if scheduler.next_end() == scheduler.batch.tick:
                    self._end_decodes(now)
            else:
                plan = scheduler.schedule()
                if plan.preempted or plan.admitted:
                    self._note_plan(plan, now)
                if plan.prefills and scheduler.batch and not plan.decoding:
                    self._note_stall(now)
                stretch = Stretch(self, plan, now)
                if self._skipping and plan.is_quiet:
                    stretch.skip()
                yield timeout(stretch.end_ps - now)
                while not self._skipping and plan.is_quiet and stretch.step():
                    yield timeout(stretch.end_ps - int(environment.now))
                now = stretch.end_ps
                stretch.record(self._end_stall(now, plan.decoding) if plan.resumes else plan.decoding)
                self._end_decodes(now)
                if plan.prefills:
                    self._end_prefills(plan, now)
            if now >= self._map_due_ps:
                self.recorder.sample_map(now, scheduler)
                self._map_due_ps = self.recorder.map_due_ps or 0

    # ---------------------------------------------------------------- arrivals

    def take_arrivals(self, now_ps: int) -> None:
        """Queue, or reject, every request that has arrived by `now_ps`."""
        arrivals, scheduler = self.arrivals, self.scheduler
        while arrivals.next_ps <= now_ps:
            arrival_ps, request = arrivals.pop()
            job = Job(request, request.num_samples)
            cause = scheduler.reject_cause(job)
            if cause:
                self._reject(request, arrival_ps, cause)
            else:
                job.arrival_ps = arrival_ps
                scheduler.waiting.append(job)

    def _reject(self, request: Request, arrival_ps: int, cause: str) -> None:
        self.recorder.rejected(request, arrival_ps, cause)
        self._count_done()
        self.arrivals.rejected(request)

    def _reject_turn(self, turn: Request) -> None:
        self._reject(turn, turn.arrival_ps, "follows_rejected")

    def newly_evicted(self) -> int:
        """Return how many blocks were evicted since this was asked last."""
        before, self._evicted = self._evicted, self.scheduler.manager.pool.evicted_blocks
        return self._evicted - before

    def _count_done(self) -> None:
        self._done += 1
        if not self._done & 63:
            self.recorder.pack()
            if self._progress is not None:
                self._progress(self._done)

    # ---------------------------------------------------------------- steps

    def _note_plan(self, plan: Plan, now_ps: int) -> None:
        for job in plan.preempted:
            self.recorder.paused(job, now_ps)
            if job.generated and job.last_ps < 0:  # its last token came with the end of the step before
                job.last_ps = now_ps
        for job in plan.admitted:
            if job.preemptions:
                self.recorder.resumed(job, now_ps)
            if self._events is not None:
                self.recorder.started(job)
            if job.admit_ps < 0 and job.origin is None:  # only a request's first admission counts
                match = job.match
                assert match is not None
                job.admit_ps = now_ps
                job.query_blocks = match.query_blocks
                job.hit_blocks, job.hit_tokens = match.hit_blocks, match.hit_tokens

    def _note_stall(self, now_ps: int) -> None:
        """Note when the batch, which has to wait while prompts are computed, had its last tokens."""
        for job in self.scheduler.decoding():
            if job.last_ps < 0:
                job.last_ps = now_ps

    def _end_stall(self, now_ps: int, decoded: int) -> int:
        """Note the gaps of those that had to wait; return how many of the `decoded` had not.

        They are the first of the batch: who came back from host memory in this step decodes from the next one on.
        """
        on_time = 0
        for job in islice(self.scheduler.decoding(), decoded):
            if job.last_ps < 0:
                on_time += 1
            else:
                self.recorder.gap(now_ps - job.last_ps)
                job.last_ps = -1
        return on_time

    def decode_affine(self, sequences: int) -> tuple[int, int] | None:
        """Return the cost model's answer, asked once for each batch size."""
        try:
            return self._affine[sequences]
        except KeyError:
            self._affine[sequences] = found = self.cost.decode_affine(sequences)
            return found

    def _step_increment(self, slope: int) -> int:
        """Return by how much a step of all decoding sequences takes longer than the one before, picoseconds."""
        scheduler = self.scheduler
        increment = slope * scheduler.num_decoding
        if scheduler.window_keys is not None:
            increment += self._weighted(scheduler.window_keys.growing)
        return increment

    def _weighted(self, keys: Iterable[int]) -> int:
        """Return how long it takes to attend to so many keys in each of the cost's windows."""
        return sum(slope * count for slope, count in zip(self._window_slopes, keys, strict=True))

    def _coast(self, start: int, steps: int, base: int, slope: int) -> int:
        """Take up to `steps` steps in which there is nothing to do but decode; record them, return their end.

        They end early with the first arrival that could be admitted. A step takes base + slope · context, so that
        s of them end after s · first + increment · s (s − 1) / 2.
        """
        scheduler, arrivals = self.scheduler, self.arrivals
        increment = self._step_increment(slope)
        first = base + slope * scheduler.context + increment
        if scheduler.window_keys is not None:
            first += self._weighted(scheduler.window_keys.keys)
        end = start + steps * first + increment * (steps * (steps - 1) // 2)
        if arrivals.next_ps < end and scheduler.accepts_arrivals():
            steps = steps_until(arrivals.next_ps - start, first, increment)
            end = start + steps * first + increment * (steps * (steps - 1) // 2)
        self.take_coast(start, end, steps, first, increment)
        return end

    def take_coast(self, start: int, end: int, steps: int, first: int, increment: int) -> None:
        """Take steps in which there is nothing to do but decode, and record them; the last one begins by now."""
        scheduler, manager, arrivals = self.scheduler, self.scheduler.manager, self.arrivals
        pool = manager.pool
        decoding = scheduler.num_decoding
        later = scheduler.coast(steps)
        manager.end_step()
        last_start = end - first - increment * (steps - 1)
        if arrivals.next_ps <= last_start:
            self.take_arrivals(last_start)
        evicted, self._evicted = self._evicted, pool.evicted_blocks
        free, evictable = pool.num_free, pool.num_evictable
        referenced = pool.num_blocks - free - evictable - len(pool.limbo)
        kv_tokens = manager.kv_tokens
        self.recorder.stretch(
            (
                start,
                end,
                steps,
                len(scheduler.running),
                len(scheduler.waiting),
                decoding,
                0,
                0,
                first,
                increment if steps > 1 else 0,
                decoding,
                free,
                evictable,
                referenced,
                manager.logical_blocks,
                kv_tokens,
                manager.logical_tokens,
                manager.saved_blocks,
                referenced - later,
                kv_tokens - (steps - 1) * decoding,
                0,
                0,
                self._evicted - evicted,
            )
        )

    def _end_decodes(self, now_ps: int) -> None:
        if self._events is not None:
            self._events.move(now_ps)
        for job in self.scheduler.end_decodes():
            self._finish(job, now_ps)

    def _end_prefills(self, plan: Plan, now_ps: int) -> None:
        prefilled, finished = self.scheduler.end_prefills(plan)
        for job in prefilled:
            if job.generated == 1:
                job.first_ps = now_ps
            if job.last_ps >= 0:
                self.recorder.gap(now_ps - job.last_ps)
                job.last_ps = -1
        for job in finished:
            self._finish(job, now_ps)

    def _finish(self, job: Job, now_ps: int) -> None:
        if self.recorder.finished(job, now_ps):
            self.arrivals.finished(job.request, now_ps)
            self._count_done()


def steps_until(time_ps: int, first_ps: int, increment_ps: int) -> int:
    """Return the fewest steps s, at least 1, with s · first + increment · s (s − 1) / 2 >= time, which is positive.

    That is s >= (sqrt(b² + 8 · increment · time) − b) / (2 · increment) with b = 2 · first − increment, at least
    increment itself, since the first step attends to a key for every sequence. Integers throughout: the root is
    rounded down, so s may be one short.
    """
    if not increment_ps:
        return max(1, -(-time_ps // first_ps))
    b = 2 * first_ps - increment_ps
    steps = max(1, (isqrt(b * b + 8 * increment_ps * time_ps) - b) // (2 * increment_ps))
    while steps * first_ps + increment_ps * (steps * (steps - 1) // 2) < time_ps:
        steps += 1
    return steps


class Stretch:
    """One step, or a run of steps that differ only in the lengths of what they decode: a row of the timeline.

    Skipping takes the run as one, with a closed form for its duration; stepping takes its steps one by one. Both
    end at the same step: with the first arrival that could be admitted, or where `Scheduler.quiet_steps` says.
    """

    def __init__(self, replica: Replica, plan: Plan, start_ps: int) -> None:
        self._replica = replica
        self._plan = plan
        self._scheduler = replica.scheduler
        self._sequences = plan.decoding
        self.start_ps = start_ps
        self.steps = 1
        self.first_ps = self._duration(plan.context, plan.window_keys)
        self.increment_ps = 0
        self.end_ps = start_ps + self.first_ps
        self._at_first: tuple[int, int] | None = None  # referenced blocks and written slots, if it goes on
        self._more: int | None = None  # steps that may still follow, once known

    def _duration(self, context: int, window_keys: tuple[int, ...]) -> int:
        """Return how long the scheduled step takes; `context` and `window_keys` are those of who decodes."""
        scheduler, replica = self._scheduler, self._replica
        manager = scheduler.manager
        batch = StepBatch(self._sequences, context, window_keys=window_keys)
        copies = manager.pending_copies()
        if len(copies):
            batch.copied_tokens = int(copies[:, 2].sum())
        batch.swapped_tokens = self._plan.moved * manager.tokens_per_block
        for job, tokens in self._plan.prefills:
            assert job.sequence is not None
            batch.prefills.append((tokens, job.sequence.num_tokens))
        if replica._needs_work:
            decoding = list(islice(scheduler.decoding(), self._sequences))
            batch.work = StepWork(decoding, [job for job, _ in self._plan.prefills], copies)
        return replica.cost.step(batch)

    def bound(self) -> int:
        """Return how many steps may follow the first, arrivals apart. Sets the increment."""
        affine = self._replica.decode_affine(self._sequences)
        if affine is None:
            return 0  # durations follow no formula: every step is a stretch
        self.increment_ps = self._replica._step_increment(affine[1])
        return self._scheduler.quiet_steps()

    def end_after(self, steps: int) -> int:
        """Return when so many steps of the stretch end."""
        return self.start_ps + steps * self.first_ps + self.increment_ps * (steps * (steps - 1) // 2)

    def _go_on(self, steps: int) -> None:
        """Take more steps."""
        if self._at_first is None:
            manager = self._scheduler.manager
            self._at_first = manager.pool.num_referenced, manager.kv_tokens
        self._scheduler.decode(steps)

    def _stop_ps(self) -> int:
        """Return the arrival that ends the stretch, if there is one."""
        return self._replica.arrivals.next_ps if self._scheduler.accepts_arrivals() else NEVER

    def skip(self) -> None:
        """Extend the stretch as far as it goes."""
        steps = 1 + self.bound()
        stop_ps = self._stop_ps()
        if stop_ps < self.end_after(steps):
            steps = self.steps_until(stop_ps)
        self.extend(steps)

    def steps_until(self, time_ps: int) -> int:
        """Return how many steps it takes, at least 1, to end at that time or later."""
        return steps_until(time_ps - self.start_ps, self.first_ps, self.increment_ps)

    def extend(self, steps: int) -> None:
        """Take so many steps in all as one; the last one begins by now."""
        if steps > 1:
            self._go_on(steps - 1)
            self._scheduler.manager.end_step()
            self.steps = steps
            self.end_ps = self.end_after(steps)
            self._replica.take_arrivals(self.end_after(steps - 1))

    def step(self) -> bool:
        """Take one more step, if one may follow; return whether it did."""
        if self._more is None:
            self._more = self.bound()
        if not self._more or self.end_ps >= self._stop_ps():
            return False
        self._more -= 1
        self._replica.take_arrivals(self.end_ps)
        self._go_on(1)
        self.steps += 1
        window_keys = self._scheduler.window_keys
        self.end_ps += self._duration(
            self._scheduler.context, () if window_keys is None else tuple(window_keys.keys)
        )
        return True

    def record(self, itl_tokens: int) -> None:
        """Write the timeline row; `itl_tokens` of a step's tokens come a step after the one before."""
        scheduler, plan = self._scheduler, self._plan
        manager = scheduler.manager
        pool = manager.pool
        referenced, kv_tokens = pool.num_referenced, manager.kv_tokens
        referenced_first, kv_tokens_first = self._at_first or (referenced, kv_tokens)
        prefill_tokens = 0
        for _, tokens in plan.prefills:
            prefill_tokens += tokens
        self._replica.recorder.stretch(
            (
                self.start_ps,
                self.end_ps,
                self.steps,
                len(scheduler.running),
                len(scheduler.waiting),
                self._sequences,
                len(plan.prefills),
                prefill_tokens,
                self.first_ps,
                self.increment_ps if self.steps > 1 else 0,
                itl_tokens,
                pool.num_free,
                pool.num_evictable,
                referenced,
                manager.logical_blocks,
                kv_tokens,
                manager.logical_tokens,
                manager.saved_blocks,
                referenced_first,
                kv_tokens_first,
                len(plan.preempted),
                # a prompt that waits for blocks waits through all of them
                self.steps if plan.out_of_blocks else 0,
                self._replica.newly_evicted(),
            )
        )
