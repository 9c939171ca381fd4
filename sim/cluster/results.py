"""The records of several replicas as those of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.stats import CacheStats, HostStats
from sim.records import Columns, RunResult, WeightedTimes
from sim.stored import Ints, StoredColumns, StoredTimes, joined_files

_REPLICA = "replica"
"""The column of a timeline that says whose row it is."""


def merge(parts: Sequence[RunResult], wall_s: float, folder: Path | None = None) -> RunResult:
    """Return one result of the results of all replicas, which it has as its `replicas`.

    The requests are in trace order. The timeline has a column that says whose row it is; its rows are in the order
    in which they began, and of those that began at once, in that of the replicas. The counts of the caches are sums.
    Records that are in files are merged in files of `folder`.
    """
    requests, timeline, pauses = (
        _merged_in_memory(parts) if folder is None else _merged_on_disk(parts, folder / "merged")
    )
    return RunResult(
        requests=requests,
        timeline=timeline,
        gaps_ps=np.concatenate([part.gaps_ps for part in parts]),
        cache=merged_stats([part.cache for part in parts]),
        lifetimes=_lifetimes(parts),
        pauses=pauses,
        wall_s=wall_s,
        replicas=tuple(parts),
    )


def _merged_in_memory(parts: Sequence[RunResult]) -> tuple[Columns, Columns, Columns]:
    requests = _joined([part.requests for part in parts])
    order = np.argsort(requests["request_id"], kind="stable")
    return (
        {name: column[order] for name, column in requests.items()},
        merged_timeline([part.timeline for part in parts]),
        _pauses([part.pauses for part in parts]),
    )


def _merged_on_disk(parts: Sequence[RunResult], folder: Path) -> tuple[Columns, Columns, Columns]:
    """Return what `_merged_in_memory` does, a column at a time."""

    def merged(kind: str, by: str) -> tuple[StoredColumns, Ints]:
        tables = [_stored(getattr(part, kind)) for part in parts]
        order = np.argsort(np.concatenate([_ints(table[by]) for table in tables]), kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        del order
        files = joined_files([table.files for table in tables], places, folder / kind)
        return StoredColumns(files, list(tables[0]), tables[0].labels), places

    requests, _ = merged("requests", "request_id")
    pauses, _ = merged("pauses", "resumed_ps")
    timeline, places = merged("timeline", "start_ps")
    replica = np.empty_like(places)
    replica[places] = _whose([_stored(part.timeline).num_rows for part in parts])
    return requests, timeline.with_columns({_REPLICA: replica}), pauses


def _stored(columns: Columns) -> StoredColumns:
    assert isinstance(columns, StoredColumns)
    return columns


def _whose(lengths: Sequence[int]) -> Ints:
    """Return which replica each row is of, int64 [rows], where those of one follow those of another."""
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)


def merged_timeline(timelines: Sequence[Columns]) -> dict[str, NDArray[np.generic]]:
    """Return the rows of all replicas, see `merge`."""
    rows = _joined(timelines)
    lengths = [len(timeline["start_ps"]) for timeline in timelines]
    rows[_REPLICA] = _whose(lengths)
    order = np.argsort(rows["start_ps"], kind="stable")
    return {name: column[order] for name, column in rows.items()}


def _pauses(tables: Sequence[Columns]) -> dict[str, NDArray[np.generic]]:
    rows = _joined(tables)
    order = np.argsort(rows["resumed_ps"], kind="stable")
    return {name: column[order] for name, column in rows.items()}


def merged_stats(stats: Sequence[CacheStats]) -> CacheStats:
    """Return the sum of what several caches, alike in their blocks, have counted."""
    total: dict[str, Any] = {}
    for each in dataclasses.fields(CacheStats):
        values = [getattr(one, each.name) for one in stats]
        if each.name == "tokens_per_block":
            total[each.name] = values[0]
        elif each.name == "miss_blocks":
            total[each.name] = {cause: sum(value[cause] for value in values) for cause in values[0]}
        elif each.name == "host":
            total[each.name] = _merged_hosts(values)
        else:
            total[each.name] = sum(values)
    return CacheStats(**total)


def _merged_hosts(hosts: Sequence[HostStats | None]) -> HostStats | None:
    known = [host for host in hosts if host is not None]
    if not known:
        return None
    names = [each.name for each in dataclasses.fields(HostStats)]
    return HostStats(**{name: sum(getattr(host, name) for host in known) for name in names})


def _joined(tables: Sequence[Columns]) -> dict[str, NDArray[np.generic]]:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _lifetimes(parts: Sequence[RunResult]) -> dict[str, WeightedTimes | StoredTimes]:
    found: dict[str, WeightedTimes | StoredTimes] = {}
    for kind in parts[0].lifetimes:
        times = [part.lifetimes[kind] for part in parts]
        stored = [table for each in times if isinstance(each, StoredTimes) for table in each.tables]
        if stored:
            found[kind] = StoredTimes(*stored)
            continue
        weighted = [each for each in times if isinstance(each, WeightedTimes)]
        found[kind] = WeightedTimes(
            np.concatenate([each.values_ps for each in weighted]),
            np.concatenate([each.weights for each in weighted]),
        )
    return found


def _ints(column: NDArray[np.generic]) -> Ints:
    return column.astype(np.int64, copy=False)
