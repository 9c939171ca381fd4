"""The engine: one replica's life as a SimPy process. The only module that knows SimPy, and the one clock.

The process takes one step after the other (or one stretch of steps that are alike), each a single timeout. There
is no process for arrivals: whenever a step ends, the engine takes in what has arrived by then, in trace order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush
from time import perf_counter
from typing import Any

import simpy

from allocator.config import BuildConfig, CacheConfig
from allocator.manager import KVCacheManager
from sim.cost import StepBatch, StepCost, StepWork
from sim.recorder import Recorder
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.scheduler import Plan, Scheduler


def simulate(
    requests: Sequence[Request],
    build: BuildConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    *,
    num_blocks: int,
    cost: StepCost,
    progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Replay requests through one engine replica and return all that happened.

    requests    sorted by arrival; request i has request_id i
    num_blocks  blocks of the KV pool (see MemoryBudget); without paging, their tokens are cut into pieces of
                max_seq_len
    cost        how long a step takes
    progress    called now and then with the number of requests that are done with

    Raises ValueError if the configuration cannot work or the requests are not in order. A request that can never
    run is rejected, by cause, and the run goes on.
    """
    for row, request in enumerate(requests):
        if request.request_id != row:
            raise ValueError(
                f"request_id ({request.request_id}) must be the request's place in the trace ({row})"
            )
        if row and request.arrival_ps < requests[row - 1].arrival_ps:
            raise ValueError(
                f"arrival_ps ({request.arrival_ps}) of request {row} must not be before its predecessor's "
                f"({requests[row - 1].arrival_ps})"
            )
    manager = _make_manager(build, cache, num_blocks)
    replica = _Replica(requests, manager, Scheduler(manager, build, engine), engine, cost, progress)
    environment = simpy.Environment()
    environment.process(replica.run(environment))
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic garbage before the run ends, and scanning it all takes a third of the time
    start = perf_counter()
    try:
        environment.run()
    finally:
        if collecting:
            gc.enable()
    return replica.recorder.result(perf_counter() - start)


def _make_manager(build: BuildConfig, cache: CacheConfig, num_blocks: int) -> KVCacheManager:
    if build.enable_paged_kv_cache:
        return KVCacheManager(num_blocks, build.tokens_per_block, cache, lifetimes=True)
    whole = num_blocks * build.tokens_per_block // build.max_seq_len
    if whole < 1:
        raise ValueError(
            f"num_blocks ({num_blocks}) of {build.tokens_per_block} tokens must hold one sequence of max_seq_len "
            f"({build.max_seq_len}) when paging is off"
        )
    return KVCacheManager.contiguous(whole, build.max_seq_len)


class _Arrivals:
    """Requests in the order in which they arrive; the turns of a session once their predecessors are done."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._due: list[tuple[int, int, Request]] = []  # heap: time, place in the trace
        self._turns: dict[int, list[Request]] = {}
        for request in requests:
            if request.parent < 0:
                self._due.append((request.arrival_ps, request.request_id, request))
            else:
                self._turns.setdefault(request.parent, []).append(request)
        self._due.sort()

    def next_ps(self) -> int | None:
        """Return when the next request arrives, as far as is known."""
        return self._due[0][0] if self._due else None

    def pop(self) -> tuple[int, Request]:
        """Return the next request and when it arrives."""
        arrival_ps, _, request = heappop(self._due)
        return arrival_ps, request

    def turns_after(self, request: Request) -> list[Request]:
        """Return, once, the turns that follow a request."""
        return self._turns.pop(request.request_id, [])

    def finished(self, request: Request, now_ps: int) -> None:
        """Let the turns that follow a finished request arrive in their time."""
        for turn in self.turns_after(request):
            heappush(self._due, (max(turn.arrival_ps, now_ps + turn.think_ps), turn.request_id, turn))


class _Replica:
    """Scheduler, cache and clock of one engine."""

    def __init__(
        self,
        requests: Sequence[Request],
        manager: KVCacheManager,
        scheduler: Scheduler,
        config: EngineConfig,
        cost: StepCost,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.recorder = Recorder(requests, manager, config.block_map_samples)
        self.manager = manager
        self.scheduler = scheduler
        self._skipping = config.event_skipping
        self.cost = cost
        self._progress = progress
        self.arrivals = _Arrivals(requests)
        self._samples_left: dict[int, int] = {}
        self._last_token_ps: dict[Job, int] = {}  # of preempted jobs
        self._done = 0
        self._affine: dict[int, tuple[int, int] | None] = {}
        self._evicted = 0

    def run(self, environment: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        """Step until every request is finished or rejected."""
        scheduler, arrivals, manager = self.scheduler, self.arrivals, self.manager
        now = 0
        while True:
            self.take_arrivals(now)
            if not scheduler.waiting and not scheduler.running:
                next_ps = arrivals.next_ps()
                if next_ps is None:
                    return
                yield environment.timeout(next_ps - now)
                now = next_ps
                continue
            manager.now = now
            plan = scheduler.schedule()
            self._note_plan(plan, now)
            stretch = _Stretch(self, plan, now)
            if plan.is_quiet and self._skipping:
                stretch.skip()
            yield environment.timeout(stretch.end_ps - now)
            while plan.is_quiet and not self._skipping and stretch.step():
                yield environment.timeout(stretch.end_ps - int(environment.now))
            now = stretch.end_ps
            stretch.record()
            self._finish_step(plan, now)

    # ---------------------------------------------------------------- arrivals

    def take_arrivals(self, now_ps: int) -> None:
        """Queue, or reject, every request that has arrived by `now_ps`."""
        arrivals, scheduler = self.arrivals, self.scheduler
        while (next_ps := arrivals.next_ps()) is not None and next_ps <= now_ps:
            arrival_ps, request = arrivals.pop()
            self.recorder.arrived(request, arrival_ps)
            job = Job(request, request.num_samples)
            cause = scheduler.reject_cause(job)
            if cause:
                self._reject(request, cause)
            else:
                scheduler.waiting.append(job)

    def _reject(self, request: Request, cause: str) -> None:
        self.recorder.rejected(request, cause)
        self._count_done()
        for turn in self.arrivals.turns_after(request):
            self._reject(turn, "follows_rejected")

    def newly_evicted(self) -> int:
        """Return how many blocks were evicted since this was asked last."""
        before, self._evicted = self._evicted, self.manager.pool.evicted_blocks
        return self._evicted - before

    def _count_done(self) -> None:
        self._done += 1
        if self._progress is not None and self._done % 64 == 0:
            self._progress(self._done)

    # ---------------------------------------------------------------- steps

    def _note_plan(self, plan: Plan, now_ps: int) -> None:
        for job in plan.preempted:
            if job.generated:  # its last token came with the end of the step before
                self._last_token_ps.setdefault(job, now_ps)
        for job in plan.admitted:
            self.recorder.admitted(job, now_ps)

    def decode_affine(self, sequences: int) -> tuple[int, int] | None:
        """Return the cost model's answer, asked once for each batch size."""
        if sequences not in self._affine:
            self._affine[sequences] = self.cost.decode_affine(sequences)
        return self._affine[sequences]

    def _finish_step(self, plan: Plan, now_ps: int) -> None:
        prefilled, finished = self.scheduler.finish_step(plan)
        for job in prefilled:
            if job.generated == 1:
                self.recorder.first_token(job, now_ps)
            last_ps = self._last_token_ps.pop(job, None)
            if last_ps is not None:
                self.recorder.gap(now_ps - last_ps)
        for job in finished:
            self._finish(job, now_ps)
        self.recorder.sample_map(now_ps, self.scheduler)

    def _finish(self, job: Job, now_ps: int) -> None:
        request = job.request
        self.recorder.finished(job, now_ps)
        left = self._samples_left.pop(request.request_id, request.num_samples) - job.samples
        if left:
            self._samples_left[request.request_id] = left
            return
        self.arrivals.finished(request, now_ps)
        self._count_done()


class _Stretch:
    """One step, or a run of steps that differ only in the lengths of what they decode: a row of the timeline.

    Skipping takes the run as one, with a closed form for its duration; stepping takes its steps one by one. Both
    end at the same step: with the first arrival that could be admitted, or where `Scheduler.quiet_steps` says.
    """

    def __init__(self, replica: _Replica, plan: Plan, start_ps: int) -> None:
        self._replica = replica
        self._plan = plan
        self._scheduler = replica.scheduler
        self._sequences = len(replica.scheduler.batch)
        self.start_ps = start_ps
        self.steps = 1
        self.first_ps = self._duration()
        self.increment_ps = 0
        self.end_ps = start_ps + self.first_ps
        manager = replica.manager
        self._referenced_first = manager.pool.num_referenced
        self._kv_tokens_first = manager.kv_tokens
        self._more: int | None = None  # steps that may still follow, once known

    def _duration(self) -> int:
        """Return how long the scheduled step takes; its tokens are in the lengths already."""
        scheduler, prefills = self._scheduler, self._plan.prefills
        work = StepWork(
            scheduler.decoding(), [job for job, _ in prefills], self._replica.manager.pending_copies()
        )
        batch = StepBatch(self._sequences, scheduler.context, [], work)
        for job, tokens in prefills:
            assert job.sequence is not None
            batch.prefills.append((tokens, job.sequence.num_tokens))
        return self._replica.cost.step(batch)

    def _bound(self) -> int:
        """Return how many steps may follow the first, arrivals apart. Sets the increment."""
        affine = self._replica.decode_affine(self._sequences)
        if affine is None:
            return 0  # durations follow no formula: every step is a stretch
        self.increment_ps = affine[1] * self._sequences
        return self._scheduler.quiet_steps()

    def _end_after(self, steps: int) -> int:
        return self.start_ps + steps * self.first_ps + self.increment_ps * (steps * (steps - 1) // 2)

    def _stop_ps(self) -> int | None:
        """Return the arrival that ends the stretch, if there is one."""
        return self._replica.arrivals.next_ps() if self._scheduler.accepts_arrivals() else None

    def skip(self) -> None:
        """Extend the stretch as far as it goes."""
        steps = 1 + self._bound()
        stop_ps = self._stop_ps()
        if stop_ps is not None and self._end_after(steps) > stop_ps:
            low, high = 0, steps  # the end after `low` steps is before the arrival, that after `high` is not
            while high - low > 1:
                middle = (low + high) // 2
                if self._end_after(middle) < stop_ps:
                    low = middle
                else:
                    high = middle
            steps = high
        if steps > 1:
            self._scheduler.decode(steps - 1)
            self.steps = steps
            self.end_ps = self._end_after(steps)
            self._replica.take_arrivals(self._end_after(steps - 1))

    def step(self) -> bool:
        """Take one more step, if one may follow; return whether it did."""
        if self._more is None:
            self._more = self._bound()
        stop_ps = self._stop_ps()
        if not self._more or (stop_ps is not None and self.end_ps >= stop_ps):
            return False
        self._more -= 1
        self._replica.take_arrivals(self.end_ps)
        self._scheduler.decode()
        self.steps += 1
        self.end_ps += self._duration()
        return True

    def record(self) -> None:
        """Write the timeline row."""
        scheduler, manager = self._scheduler, self._replica.manager
        pool, plan = manager.pool, self._plan
        self._replica.recorder.stretch(
            self.start_ps,
            self.end_ps,
            self.steps,
            len(scheduler.running),
            len(scheduler.waiting),
            self._sequences,
            len(plan.prefills),
            sum(tokens for _, tokens in plan.prefills),
            self.first_ps,
            self.increment_ps if self.steps > 1 else 0,
            self._sequences,
            pool.num_free,
            pool.num_evictable,
            pool.num_referenced,
            manager.logical_blocks,
            manager.kv_tokens,
            manager.logical_tokens,
            self._referenced_first,
            self._kv_tokens_first,
            len(plan.preempted),
            self.steps if plan.out_of_blocks else 0,  # a prompt that waits for blocks waits through them all
            self._replica.newly_evicted(),
        )
