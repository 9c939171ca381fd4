"""Recorder: collects what the engine reports into the columns of a RunResult."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from allocator.manager import KVCacheManager
from sim.records import (
    CACHED,
    FREE,
    SHARED,
    TIMELINE_COLUMNS,
    BlockMap,
    Columns,
    RunResult,
    WeightedTimes,
)
from sim.request import Request
from sim.scheduler.job import Job
from sim.scheduler.scheduler import Scheduler

_COUNTERS = (
    "query_blocks",
    "hit_blocks",
    "hit_tokens",
    "preemptions",
    "recomputed_tokens",
    "blocks",
    "cow_copies",
)
_MAX_MAP_ROWS = 512


class Recorder:
    """Columns in the making; one instance a run."""

    def __init__(self, requests: Sequence[Request], manager: KVCacheManager, map_samples: int) -> None:
        count = len(requests)
        self._requests = requests
        self._manager = manager
        self._arrivals = np.array([request.arrival_ps for request in requests], dtype=np.int64)
        self._times = {
            name: np.full(count, -1, dtype=np.int64) for name in ("admit_ps", "first_token_ps", "finish_ps")
        }
        self._counters = {name: np.zeros(count, dtype=np.int64) for name in _COUNTERS}
        self._causes = [""] * count
        self._rows: list[tuple[int, ...]] = []
        self._gaps: list[int] = []
        self._map = _MapSampler(manager, map_samples, requests) if map_samples else None

    def arrived(self, request: Request, now_ps: int) -> None:
        """Note when a session's turn really arrived: not before its predecessor had finished."""
        self._arrivals[request.request_id] = now_ps

    def rejected(self, request: Request, cause: str) -> None:
        """Note that a request can never run."""
        self._causes[request.request_id] = cause

    def admitted(self, job: Job, now_ps: int) -> None:
        """Note that a job starts; only a request's first admission counts."""
        row = job.request.request_id
        if self._times["admit_ps"][row] < 0 and job.match is not None:
            self._times["admit_ps"][row] = now_ps
            self._counters["query_blocks"][row] = job.match.query_blocks
            self._counters["hit_blocks"][row] = job.match.hit_blocks
            self._counters["hit_tokens"][row] = job.match.hit_tokens

    def first_token(self, job: Job, now_ps: int) -> None:
        """Note a request's first token."""
        self._times["first_token_ps"][job.request.request_id] = now_ps

    def finished(self, job: Job, now_ps: int) -> None:
        """Note that a job has all its tokens; a request is finished when the last of its jobs is."""
        row, counters = job.request.request_id, self._counters
        assert job.sequence is not None
        self._times["finish_ps"][row] = now_ps
        counters["preemptions"][row] += job.preemptions
        counters["recomputed_tokens"][row] += job.recomputed_tokens
        counters["blocks"][row] += job.sequence.num_blocks
        counters["cow_copies"][row] += job.cow_copies

    def gap(self, gap_ps: int) -> None:
        """Note an inter-token gap that a preemption caused."""
        self._gaps.append(gap_ps)

    def stretch(self, *row: int) -> None:
        """Add a timeline row; the values come in the order of the columns."""
        self._rows.append(row)

    def sample_map(self, now_ps: int, scheduler: Scheduler) -> None:
        """Look at the pool, if it is time to."""
        if self._map is not None and now_ps >= self._map.due_ps:
            self._map.sample(now_ps, scheduler)

    def result(self, wall_s: float) -> RunResult:
        """Return everything."""
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, len(TIMELINE_COLUMNS))
        lifetimes = self._manager.pool.lifetimes
        return RunResult(
            requests=self._request_columns(),
            timeline={name: rows[:, column].copy() for column, name in enumerate(TIMELINE_COLUMNS)},
            gaps_ps=np.array(self._gaps, dtype=np.int64),
            cache=self._manager.stats(),
            lifetimes={}
            if lifetimes is None
            else {
                name: _weighted(getattr(lifetimes, name))
                for name in ("lifetime", "idle_before_evict", "reuse_gap")
            },
            block_map=self._map.result() if self._map is not None else None,
            wall_s=wall_s,
        )

    def _request_columns(self) -> Columns:
        requests = self._requests
        columns: Columns = {
            name: np.array([getattr(request, name) for request in requests], dtype=np.int64)
            for name in ("request_id", "prompt_tokens", "output_tokens", "num_samples")
        }
        causes = np.array(self._causes, dtype=np.str_)
        columns["status"] = np.where(causes == "", "finished", "rejected")
        columns["reject_cause"] = causes
        columns["arrival_ps"] = self._arrivals
        columns.update(self._times)
        columns.update(self._counters)
        return columns


def _weighted(pairs: list[tuple[int, int]]) -> WeightedTimes:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return WeightedTimes(table[:, 0].copy(), table[:, 1].copy())


class _MapSampler:
    """Who owns which block, at evenly spaced moments.

    The run's length is unknown, so the first spacing comes from the trace's; when there are twice as many samples
    as wanted, every other one goes and the spacing doubles.
    """

    def __init__(self, manager: KVCacheManager, samples: int, requests: Sequence[Request]) -> None:
        self._manager = manager
        self._samples = samples
        last = max((request.arrival_ps for request in requests), default=0)
        self._interval_ps = max(last // samples, 1)
        self.due_ps = 0
        step = -(-manager.num_blocks // _MAX_MAP_ROWS)
        self._rows: NDArray[np.int64] = np.arange(0, manager.num_blocks, step, dtype=np.int64)
        self._times: list[int] = []
        self._owners: list[NDArray[np.int64]] = []

    def sample(self, now_ps: int, scheduler: Scheduler) -> None:
        manager = self._manager
        owners = np.full(manager.num_blocks, CACHED, dtype=np.int64)
        owners[manager.pool.free_ids()] = FREE
        for job in scheduler.running:
            if job.sequence is not None and len(job.sequence.table):
                table = np.frombuffer(job.sequence.table, np.int32)
                owners[table] = np.where(owners[table] < 0, job.request.request_id, SHARED)
        self._times.append(now_ps)
        self._owners.append(owners[self._rows])
        if len(self._times) >= 2 * self._samples:
            del self._times[1::2], self._owners[1::2]
            self._interval_ps *= 2
        self.due_ps = now_ps - now_ps % self._interval_ps + self._interval_ps

    def result(self) -> BlockMap:
        owners = np.array(self._owners, dtype=np.int64).reshape(-1, self._rows.size)
        return BlockMap(np.array(self._times, dtype=np.int64), self._rows, owners)
