"""Serve requests from a KV memory and record, over simulated time, where its slots go.

How time passes: SimPy's clock, in picoseconds. A step generates one token for every running request and computes
the whole prompt of each request that it admits; it lasts what the given StepCost says. Requests are admitted in
order of arrival, at the start of a step, for as long as the first one waiting fits. A memory that runs out
preempts the request admitted last, which goes to the head of the queue and is computed anew. Steps in which
nothing is admitted or finished are taken together, at most MOST_STEPS, as the memory then changes evenly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import simpy
from numpy.typing import NDArray

from experiments._memories import Lifetime, Memory
from sim.cost import StepBatch, StepCost
from sim.request import PS_PER_S

MOST_STEPS = 16
"""Steps of one recorded stretch: within it, a paged memory's staircase of blocks is taken as a line."""

SHARES = ("tokens", "reserved", "internal", "external")
COLUMNS = ("start_ps", "end_ps", "running", "waiting", *SHARES)


@dataclass(frozen=True)
class Recording:
    """What one memory did under one load.

    columns  int64 or float64 [stretches], named by COLUMNS; slots are means over the stretch
    """

    name: str
    num_slots: int
    columns: dict[str, NDArray[np.int64] | NDArray[np.float64]]
    finished: int
    preemptions: int

    def mean(self, column: str, *, while_waiting: bool = False) -> float:
        """Return a column's time-weighted mean over the time in which something runs.

        With `while_waiting`, over the part of it in which requests wait; nan if there is none.
        """
        weights = (self.columns["end_ps"] - self.columns["start_ps"]).astype(np.float64)
        if while_waiting:
            weights = weights * (self.columns["waiting"] > 0)
        total = weights.sum()
        return float(self.columns[column] @ weights / total) if total else float("nan")

    @property
    def requests_per_s(self) -> float:
        """Requests finished a second, until the last stretch ended."""
        ends = self.columns["end_ps"]
        return self.finished * PS_PER_S / int(ends[-1]) if ends.size else 0.0

    def share(self, column: str) -> float:
        """Return the mean share of the memory that a column of slots has while requests wait."""
        return self.mean(column, while_waiting=True) / self.num_slots


class _Server:
    def __init__(self, memory: Memory, cost: StepCost, max_batch_size: int) -> None:
        self.memory = memory
        self.cost = cost
        self.max_batch_size = max_batch_size
        self.waiting: deque[Lifetime] = deque()
        self.running: list[Lifetime] = []
        self.rows: list[tuple[float, ...]] = []
        self.finished = 0
        self.preemptions = 0

    def run(self, env: simpy.Environment, arrivals: deque[Lifetime]) -> Generator[simpy.Event, None, None]:
        """Serve until everyone has left."""
        while arrivals or self.waiting or self.running:
            while arrivals and arrivals[0].arrival_ps <= env.now:
                self.waiting.append(arrivals.popleft())
            if not self.waiting and not self.running:
                yield env.timeout(arrivals[0].arrival_ps - int(env.now))
                continue
            until = arrivals[0].arrival_ps - int(env.now) if arrivals and not self.waiting else None
            start = int(env.now)
            duration, row = self._stretch(until)
            yield env.timeout(duration)
            self.rows.append((start, start + duration, *row))
            self._retire()

    def _stretch(self, until: int | None) -> tuple[int, tuple[float, ...]]:
        """Take one step or several; return their duration and the rest of a row.

        until  picoseconds to the next arrival, where it could change something
        """
        decoding = self.running
        preempted = False
        while decoding and not self.memory.advance(decoding, 1):
            self._preempt(decoding.pop())
            preempted = True
            if not decoding:
                raise self._too_long()
        admitted = [] if preempted else self._admit()
        context = sum(request.prefill_tokens for request in decoding)
        batch = StepBatch(len(decoding), context, [(r.prefill_tokens,) * 2 for r in admitted])
        duration = self.cost.step(batch)
        steps = 1
        self.running = decoding + admitted
        first = self.memory.shares(self.running)
        last = first
        if not admitted and not preempted:
            steps, duration = self._more_steps(decoding, context, duration, until)
            last = self.memory.shares(self.running)
        for request in self.running:
            request.done_tokens += steps
        means = [(getattr(first, name) + getattr(last, name)) / 2 for name in SHARES]
        return duration, (len(self.running), len(self.waiting), *means)

    def _admit(self) -> list[Lifetime]:
        admitted: list[Lifetime] = []
        while self.waiting and len(self.running) + len(admitted) < self.max_batch_size:
            if not self.memory.admit(self.waiting[0]):
                break
            admitted.append(self.waiting.popleft())
        if not admitted and not self.running:
            raise self._too_long()
        return admitted

    def _too_long(self) -> ValueError:
        request = self.waiting[0]
        return ValueError(
            f"request of {request.prompt_tokens} + {request.output_tokens} tokens cannot be served by "
            f"{self.memory.name} with all of its {self.memory.num_slots} slots free"
        )

    def _preempt(self, request: Lifetime) -> None:
        self.memory.release(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _more_steps(
        self, decoding: list[Lifetime], context: int, duration: int, until: int | None
    ) -> tuple[int, int]:
        """Take further steps in which nothing happens but growth; return how many there are now, and their time."""
        most = min(MOST_STEPS, min(request.remaining_tokens for request in decoding))
        ends = [duration]
        while len(ends) < most and (until is None or ends[-1] < until):
            keys = context + len(ends) * len(decoding)
            ends.append(ends[-1] + self.cost.step(StepBatch(len(decoding), keys, [])))
        more = len(ends) - 1
        while more and not self.memory.advance(decoding, more):
            more //= 2
        return 1 + more, ends[more]

    def _retire(self) -> None:
        for request in self.running:
            if not request.remaining_tokens:
                self.memory.release(request)
                self.finished += 1
        self.running = [request for request in self.running if request.remaining_tokens]


def serve(
    requests: Iterable[Lifetime],
    memory: Memory,
    cost: StepCost,
    *,
    max_batch_size: int = 1024,
    until_ps: int | None = None,
) -> Recording:
    """Serve `requests` (by arrival) from `memory` and return the recording, cut off at `until_ps` if given.

    Raises ValueError for requests out of order, or one that the empty memory cannot hold.
    """
    arrivals = deque(requests)
    for earlier, later in pairwise(arrivals):
        if later.arrival_ps < earlier.arrival_ps:
            raise ValueError(f"arrival_ps ({later.arrival_ps}) must not precede the one before it")
    server = _Server(memory, cost, max_batch_size)
    env = simpy.Environment()
    process = env.process(server.run(env, arrivals))
    env.run(until=process if until_ps is None else env.timeout(until_ps) | process)
    columns: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {}
    for i, name in enumerate(COLUMNS):
        values = [row[i] for row in server.rows]
        columns[name] = (
            np.array(values, dtype=np.float64) if name in SHARES else np.array(values, dtype=np.int64)
        )
    return Recording(memory.name, memory.num_slots, columns, server.finished, server.preemptions)
