"""The records of several replicas as those of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.stats import CacheStats, HostStats
from sim.records import Columns, RunResult, WeightedTimes


def merge(parts: Sequence[RunResult], wall_s: float) -> RunResult:
    """Return one result of the results of all replicas, which it has as its `replicas`.

    The requests are in trace order. The timeline has a column that says whose row it is; its rows are in the order
    in which they began, and of those that began at once, in that of the replicas. The counts of the caches are sums.
    """
    requests: dict[str, NDArray[np.generic]] = _joined([part.requests for part in parts])
    order = np.argsort(requests["request_id"], kind="stable")
    requests = {name: column[order] for name, column in requests.items()}
    return RunResult(
        requests=requests,
        timeline=merged_timeline([part.timeline for part in parts]),
        gaps_ps=np.concatenate([part.gaps_ps for part in parts]),
        cache=merged_stats([part.cache for part in parts]),
        lifetimes=_lifetimes(parts),
        pauses=_pauses([part.pauses for part in parts]),
        wall_s=wall_s,
        replicas=tuple(parts),
    )


def merged_timeline(timelines: Sequence[Columns]) -> dict[str, NDArray[np.generic]]:
    """Return the rows of all replicas, see `merge`."""
    rows = _joined(timelines)
    lengths = [len(timeline["start_ps"]) for timeline in timelines]
    rows["replica"] = np.repeat(np.arange(len(timelines), dtype=np.int64), lengths)
    order = np.lexsort((rows["replica"], rows["start_ps"]))
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


def _lifetimes(parts: Sequence[RunResult]) -> dict[str, WeightedTimes]:
    found: dict[str, WeightedTimes] = {}
    for kind in parts[0].lifetimes:
        times = [part.lifetimes[kind] for part in parts]
        weighted = [each for each in times if isinstance(each, WeightedTimes)]
        found[kind] = WeightedTimes(
            np.concatenate([each.values_ps for each in weighted]),
            np.concatenate([each.weights for each in weighted]),
        )
    return found
