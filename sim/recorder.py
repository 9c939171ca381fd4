"""Recorder: collects what the engine reports into the columns of a RunResult."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from allocator.lifetimes import Durations, Lifetimes, joined
from allocator.manager import KVCacheManager
from sim.records import (
    CACHED,
    FINISHED,
    FREE,
    PAUSE_COLUMNS,
    REJECTED,
    SHARED,
    TIMELINE_COLUMNS,
    BlockMap,
    Columns,
    RunResult,
    WeightedTimes,
)
from sim.request import Request
from sim.rows import IntRows, rows_kept
from sim.scheduler.job import Job
from sim.scheduler.scheduler import Scheduler
from sim.stored import ColumnFiles, StoredColumns, StoredTimes
from sim.stream import RequestStream
from sim.timeline import Timeline

_FIELDS = (
    "request_id",
    "arrival_ps",
    "prompt_tokens",
    "output_tokens",
    "num_samples",
    "admit_ps",
    "first_token_ps",
    "finish_ps",
    "query_blocks",
    "hit_blocks",
    "hit_tokens",
    "preemptions",
    "recomputed_tokens",
    "blocks",
    "cow_copies",
)
"""What is noted of a request when it is done with, in this order; then its place in the list of causes."""
_CODE = "cause"
_ORDER = (
    "request_id",
    "prompt_tokens",
    "output_tokens",
    "num_samples",
    "status",
    "reject_cause",
    "arrival_ps",
    "admit_ps",
    "first_token_ps",
    "finish_ps",
    "query_blocks",
    "hit_blocks",
    "hit_tokens",
    "preemptions",
    "recomputed_tokens",
    "blocks",
    "cow_copies",
)
"""Columns of requests, in the order of a RunResult."""
_MAX_MAP_ROWS = 512
_MOST_LIFETIMES = 1 << 20
"""Numbers that the allocator may keep before their durations are computed."""
_LIFETIMES = ("lifetime", "idle_before_evict", "reuse_gap")


class Recorder:
    """Columns in the making; one instance a run.

    timeline  its rows
    gap       notes an inter-token gap that a preemption caused, or prompts that went first
    """

    def __init__(
        self,
        requests: Collection[Request],
        manager: KVCacheManager,
        map_samples: int,
        folder: Path | None = None,
        *,
        recorders: int = 1,
        causes: list[str] | None = None,
    ) -> None:
        """Keep the records in memory, or in files of a `folder`.

        Several recorders share the memory that rows may take before they are packed, and the list of `causes` of
        rejection, so that what stands for one means the same in all of their files.
        """
        self._manager = manager
        self._rows_kept = rows_kept(recorders)
        self._most_lifetimes = _MOST_LIFETIMES // recorders
        names = {
            "requests": (*_FIELDS, _CODE),
            "timeline": TIMELINE_COLUMNS,
            "pauses": PAUSE_COLUMNS,
        }
        names |= dict.fromkeys(_LIFETIMES, ("values_ps", "weights"))
        self._files: dict[str, ColumnFiles] = {}
        if folder is not None:
            self._files = {kind: ColumnFiles(folder / kind, columns) for kind, columns in names.items()}
        self._requests = IntRows(names["requests"], self._files.get("requests"))
        self.timeline = Timeline(manager.num_blocks, manager.tokens_per_block, self._files.get("timeline"))
        self._pauses = IntRows(names["pauses"], self._files.get("pauses"))
        self._paused: dict[Job, int] = {}
        self._lifetimes: dict[str, list[Durations]] = {kind: [] for kind in _LIFETIMES}
        self._gaps = array("q")
        self._causes = [""] if causes is None else causes
        self._sequences: dict[int, int] = {}
        self._map = _MapSampler(manager, map_samples, requests) if map_samples else None
        self.gap = self._gaps.append

    def started(self, job: Job) -> None:
        """Note whose sequence the event log's next number stands for; only where there is a log."""
        assert job.sequence is not None
        self._sequences[job.sequence.number] = job.request.request_id

    def paused(self, job: Job, now_ps: int) -> None:
        """Note that a job was preempted."""
        self._paused[job] = now_ps

    def resumed(self, job: Job, now_ps: int) -> None:
        """Note that a job that was preempted runs again."""
        self._pauses.append((job.request.request_id, job.sample, self._paused.pop(job), now_ps))

    def rejected(self, request: Request, arrival_ps: int, cause: str) -> None:
        """Note that a request can never run."""
        if cause not in self._causes:
            self._causes.append(cause)
        row = (request.request_id, arrival_ps, request.prompt_tokens, request.output_tokens)
        code = self._causes.index(cause)
        self._requests.append((*row, request.num_sequences, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, code))

    def finished(self, job: Job, now_ps: int) -> bool:
        """Note that a job has all its tokens; return whether its request has finished, as the last of its samples.

        The job's sequence has been released.
        """
        request, sequence, origin = job.request, job.sequence, job
        assert sequence is not None
        preemptions, recomputed, copies = job.preemptions, job.recomputed_tokens, job.cow_copies
        blocks, sequences = len(sequence.table), request.num_sequences
        if sequences > 1:
            origin = job.origin or job
            before = origin.totals or (0, 0, 0, 0)
            preemptions += before[0]
            recomputed += before[1]
            blocks += before[2]
            copies += before[3]
            origin.totals = (preemptions, recomputed, blocks, copies)
            origin.left -= job.samples
            if origin.left:
                return False
        self._requests.append(
            (
                request.request_id,
                origin.arrival_ps,
                request.prompt_tokens,
                request.output_tokens,
                sequences,
                origin.admit_ps,
                origin.first_ps,
                now_ps,
                origin.query_blocks,
                origin.hit_blocks,
                origin.hit_tokens,
                preemptions,
                recomputed,
                blocks,
                copies,
                0,
            )
        )
        return True

    def pack(self) -> None:
        """Keep the rows in less memory; to be called now and then."""
        for rows in (self._requests, self.timeline.rows, self._pauses):
            rows.pack(self._rows_kept)
        lifetimes = self._manager.pool.lifetimes
        if lifetimes is not None and len(lifetimes) > self._most_lifetimes:
            self._take_lifetimes(lifetimes)

    def _take_lifetimes(self, lifetimes: Lifetimes) -> None:
        for kind, durations in lifetimes.take().items():
            if self._files:
                self._files[kind].write(np.stack(durations, axis=1))
            else:
                self._lifetimes[kind].append(durations)

    @property
    def map_due_ps(self) -> int | None:
        """Return when the pool is to be looked at next; None if it never is."""
        return None if self._map is None else self._map.due_ps

    def sample_map(self, now_ps: int, scheduler: Scheduler) -> None:
        """Look at the pool."""
        if self._map is not None:
            self._map.sample(now_ps, scheduler)

    def result(self, wall_s: float) -> RunResult:
        """Return everything."""
        lifetimes = self._manager.pool.lifetimes
        if lifetimes is not None:
            self._take_lifetimes(lifetimes)
        requests, timeline, pauses = self._stored_columns() if self._files else self._columns()
        return RunResult(
            requests=requests,
            timeline=timeline,
            gaps_ps=np.array(self._gaps, dtype=np.int64),
            cache=self._manager.stats(),
            lifetimes={} if lifetimes is None else self._times(),
            block_map=self._map.result() if self._map is not None else None,
            events=self._manager.events,
            sequences=self._sequences,
            pauses=pauses,
            wall_s=wall_s,
        )

    def _times(self) -> dict[str, WeightedTimes | StoredTimes]:
        if self._files:
            return {kind: StoredTimes(self._files[kind]) for kind in _LIFETIMES}
        return {kind: WeightedTimes(*joined(parts)) for kind, parts in self._lifetimes.items()}

    def _columns(self) -> tuple[Columns, Columns, Columns]:
        found: dict[str, NDArray[np.generic]] = dict(self._requests.columns())
        order = np.argsort(found["request_id"])
        for name in found:
            found[name] = found[name][order]
        codes = found.pop(_CODE).astype(np.int64)
        found["status"] = np.where(codes == 0, FINISHED, REJECTED)
        found["reject_cause"] = np.array(self._causes, dtype=np.str_)[codes]
        return {name: found[name] for name in _ORDER}, self.timeline.rows.columns(), self._pauses.columns()

    def _stored_columns(self) -> tuple[Columns, Columns, Columns]:
        for rows in (self._requests, self.timeline.rows, self._pauses):
            rows.pack(1)
        self._files["requests"].sort_by("request_id")
        statuses = [FINISHED] + [REJECTED] * (len(self._causes) - 1)
        labels = {"status": (_CODE, statuses), "reject_cause": (_CODE, self._causes)}
        return (
            StoredColumns(self._files["requests"], _ORDER, labels),
            StoredColumns(self._files["timeline"], TIMELINE_COLUMNS),
            StoredColumns(self._files["pauses"], PAUSE_COLUMNS),
        )


class _MapSampler:
    """Who owns which block, at evenly spaced moments.

    The run's length is unknown, so the first spacing comes from the trace's; when there are twice as many samples
    as wanted, every other one goes and the spacing doubles.
    """

    def __init__(self, manager: KVCacheManager, samples: int, requests: Collection[Request]) -> None:
        self._manager = manager
        self._samples = samples
        if isinstance(requests, RequestStream):
            last = requests.span_ps
        else:
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
        for job in chain(scheduler.running, scheduler.apart):
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
