"""timeline.perfetto-trace: a run to look at in the Perfetto UI, https://ui.perfetto.dev (Open trace file).

Each engine is a group of tracks:

    free blocks, evictable blocks, referenced blocks, running, waiting
                  counters, of each stretch at the start of its last step. Between stretches nothing runs: then
                  running, waiting and referenced blocks are 0; how many blocks are cached is not recorded
    evictions     an instant for each stretch that evicted blocks, at its start
    preemptions   an instant for each preemption
    rejected      an instant for each request that can never run
    queued        a slice for each request, from its arrival to its first admission
    requests      a slice for each request, from there to its last token; within it `prefill`, up to the first token,
                  and `decode`; within these `preempted`, while a sequence of the request had lost its blocks

Where prefill and decode are apart, a request's slices are in the group of the replica that computed its prompt, and its
preemptions in that of the replica where they happened. Of a request that went on elsewhere, `decode_replica`, there are
two more slices between `prefill` and `decode`: `wait for room`, until its blocks had been taken there, and `transfer`,
until they had come, the wait for the transfers before it included. What is queued and what is within `requests` follows
one upon the other without a gap, from arrival to finish.

Rows are read and written a few at a time. The bytes depend on nothing but the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sim.cluster.placement import TRANSFER_COLUMNS
from sim.metrics import int_column
from sim.perfetto_packets import PerfettoWriter
from sim.records import FINISHED, Columns, RunResult
from sim.stored import StoredColumns

_ROWS = 1 << 14
_PER_ENGINE = 16
"""Numbers of tracks that are an engine's own; those of requests come after them all."""
_FIRST_REQUEST = 1 << 32

_COUNTERS = (
    ("free_blocks", "free blocks", "blocks"),
    ("evictable_blocks", "evictable blocks", "blocks"),
    ("referenced_blocks", "referenced blocks", "blocks"),
    ("running", "running", "sequences"),
    ("waiting", "waiting", "requests"),
)
_IDLE = (2, 3, 4)
"""Which of the counters are 0 while nothing runs."""
_EVICTIONS, _PREEMPTIONS, _REJECTED, _QUEUED, _REQUESTS = range(len(_COUNTERS) + 1, len(_COUNTERS) + 6)
_NOTES = ("prompt_tokens", "output_tokens", "num_samples", "hit_tokens", "preemptions", "recomputed_tokens")
_REPLICA = "replica"
_MISSING = {_REPLICA: 0} | dict.fromkeys(TRANSFER_COLUMNS, -1)
"""What stands in columns that are not there: of a replica that is alone, and where prefill and decode are not apart."""


def write_perfetto(result: RunResult, path: Path) -> None:
    """Write the trace. Raises OSError where the file cannot be written."""
    with path.open("wb") as file:
        writer = PerfettoWriter(file)
        for engine in _engines(result):
            _describe(writer, engine, _group(result, engine))
        _write_timeline(writer, result.timeline)
        _write_requests(writer, result)


def _engines(result: RunResult) -> list[int]:
    if _REPLICA not in result.timeline:
        return [0]
    found = [int_column(columns, _REPLICA) for columns in (result.timeline, result.requests)]
    return [int(engine) for engine in np.unique(np.maximum(np.concatenate(found), 0))]


def _group(result: RunResult, engine: int) -> str:
    if _REPLICA not in result.timeline:
        return "engine"
    apart = result.prefill_replicas
    if not apart:
        return f"replica {engine}"
    return f"replica {engine}, {'prefill' if engine < apart else 'decode'}"


def _own(engine: int, track: int = 0) -> int:
    """Return the number of an engine's track; of the group itself, 0."""
    return 1 + engine * _PER_ENGINE + track


def _describe(writer: PerfettoWriter, engine: int, name: str) -> None:
    group = _own(engine)
    writer.process(group, engine + 1, name)
    for rank, (_, label, unit) in enumerate(_COUNTERS, start=1):
        writer.counter(_own(engine, rank), group, label, unit, rank)
    for rank, label in ((_EVICTIONS, "evictions"), (_PREEMPTIONS, "preemptions"), (_REJECTED, "rejected")):
        writer.track(_own(engine, rank), group, label, rank)


def _rows(columns: Columns, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield rows, in order; texts come as str. Columns of _MISSING need not be there."""
    length = columns.num_rows if isinstance(columns, StoredColumns) else len(columns[names[-1]])
    for first in range(0, length, _ROWS):
        last = min(first + _ROWS, length)
        parts = []
        for name in names:
            if name in _MISSING and name not in columns:
                parts.append([_MISSING[name]] * (last - first))
            elif isinstance(columns, StoredColumns):
                parts.append(columns.part(name, first, last).tolist())
            else:
                parts.append(columns[name][first:last].tolist())
        yield from zip(*parts, strict=True)


def _write_timeline(writer: PerfettoWriter, timeline: Columns) -> None:
    names = (_REPLICA, "start_ps", "end_ps", "steps", "first_step_ps", "step_increment_ps", "evicted_blocks")
    shown: dict[int, int] = {}  # the value of each counter
    ended: dict[int, int] = {}  # when each engine's last stretch did

    def show(track: int, time_ps: int, value: int) -> None:
        if shown.get(track) != value:
            shown[track] = value
            writer.count(track, time_ps, value)

    def rest(engine: int) -> None:
        for index in _IDLE:
            show(_own(engine, 1 + index), ended[engine], 0)

    for engine, start, end, steps, first, increment, evicted, *values in _rows(
        timeline, names + tuple(column for column, *_ in _COUNTERS)
    ):
        if ended.get(engine, start) < start:
            rest(engine)
        ended[engine] = end
        if evicted:
            writer.instant(_own(engine, _EVICTIONS), start, "evicted", blocks=evicted)
        last_step = end - first - increment * (steps - 1)
        for index, value in enumerate(values, start=1):
            show(_own(engine, index), last_step, value)
    for engine in ended:
        rest(engine)


def _write_requests(writer: PerfettoWriter, result: RunResult) -> None:
    times = ("arrival_ps", "admit_ps", "first_token_ps", "finish_ps")
    names = (_REPLICA, "request_id", "status", "reject_cause", *times, *TRANSFER_COLUMNS, *_NOTES)
    pauses = _Pauses(result.pauses)
    for (
        engine,
        request,
        status,
        cause,
        arrival,
        admit,
        first,
        finish,
        there,
        blocks,
        start,
        come,
        *notes,
    ) in _rows(result.requests, names):
        engine = max(engine, 0)
        name = f"request {request}"
        if status != FINISHED:
            writer.instant(_own(engine, _REJECTED), arrival, f"{name}: {cause}")
            continue
        told = dict(zip(_NOTES, notes, strict=True))
        moved = there >= 0
        if moved:
            told |= {"decode_replica": there, "transferred_blocks": blocks}
        track = _FIRST_REQUEST + 2 * request
        writer.track(track, _own(engine), "queued", _QUEUED)
        writer.begin(track, arrival, name)
        writer.end(track, admit)
        track += 1
        writer.track(track, _own(engine), "requests", _REQUESTS)
        writer.begin(track, admit, name, **told)
        spans = []
        num_early = 0
        for sample, paused, resumed in pauses.of(request):
            early = paused < first or finish == first
            num_early += early
            where = there if moved and not early else engine
            writer.instant(_own(where, _PREEMPTIONS), paused, name, sample=sample)
            spans.append((paused, resumed))
        _write_phase(writer, track, "prefill", admit, first, spans[:num_early])
        if moved:
            _write_phase(writer, track, "wait for room", first, start, [])
            _write_phase(writer, track, "transfer", start, come, [])
        if finish > first:
            _write_phase(writer, track, "decode", come if moved else first, finish, spans[num_early:])
        writer.end(track, finish)


def _write_phase(
    writer: PerfettoWriter, track: int, name: str, begin: int, end: int, pauses: list[tuple[int, int]]
) -> None:
    writer.begin(track, begin, name)
    for paused, resumed in _union(pauses):
        writer.begin(track, paused, "preempted")
        writer.end(track, resumed)
    writer.end(track, end)


class _Pauses:
    """The pauses of each request, asked for in the order of requests."""

    def __init__(self, pauses: Columns) -> None:
        columns = [
            int_column(pauses, name) if pauses else np.empty(0, np.int64)
            for name in ("request_id", "sample", "paused_ps", "resumed_ps")
        ]
        order = np.lexsort((columns[2], columns[0]))
        self._columns = [column[order] for column in columns]
        self._at = 0

    def of(self, request: int) -> list[tuple[int, int, int]]:
        """Return (sample, from when, to when), earliest first."""
        first = self._at
        requests = self._columns[0]
        while self._at < len(requests) and requests[self._at] == request:
            self._at += 1
        parts = [column[first : self._at].tolist() for column in self._columns[1:]]
        return list(zip(*parts, strict=True))


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans, sorted by their beginning, that overlap: several samples can pause at once."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined
