"""The part of a run that is measured: what is left once its warm-up has been taken off."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.stats import CacheStats
from sim.cluster.results import merged_stats, merged_timeline
from sim.distributions import Ints, exact_sum
from sim.records import Columns, RunResult
from sim.request import PS_PER_S
from sim.scheduler.config import EngineConfig


@dataclass(frozen=True)
class Window:
    """From when on a run is measured, and which of its requests are counted.

    A request is counted unless it is among the first `warm_up_requests` of the trace, or arrives within the first
    `warm_up_s`. Time is measured from the first moment at which a counted request could have arrived.
    """

    start_ps: int
    counted: NDArray[np.bool_]
    """bool [requests], in trace order."""

    @classmethod
    def of(cls, result: RunResult, engine: EngineConfig) -> Window:
        """Return the window that the configuration asks for."""
        arrivals = np.asarray(result.requests["arrival_ps"]).astype(np.int64)
        start_ps = round(engine.warm_up_s * PS_PER_S)
        counted = arrivals >= start_ps
        counted[: engine.warm_up_requests] = False
        if engine.warm_up_requests:
            late = arrivals[engine.warm_up_requests :]
            start_ps = max(start_ps, int(late.min()) if late.size else int(arrivals.max(initial=0)))
        return cls(start_ps, counted)

    def cut(self, result: RunResult) -> RunResult:
        """Return the run as if it had begun with the window; of a run without a warm-up, the run itself.

        A stretch of steps that the window's start falls into keeps those that begin no earlier. What the records
        hold no times of stays as it is, of the whole run: gaps that span a preemption, miss causes, copies, and
        the lifetimes of blocks.
        """
        if self.start_ps <= 0 and bool(self.counted.all()):
            return result
        if result.replicas:
            return self._cut_each(result)
        requests = {name: np.asarray(column)[self.counted] for name, column in result.requests.items()}
        timeline = _from(result.timeline, self.start_ps)
        cache = _counted(result.cache, requests, timeline)
        return dataclasses.replace(result, requests=requests, timeline=timeline, cache=cache)

    def _cut_each(self, result: RunResult) -> RunResult:
        """Return what `cut` does, of several replicas: each is cut by itself."""
        requests = {name: np.asarray(column)[self.counted] for name, column in result.requests.items()}
        parts = []
        for number, part in enumerate(result.replicas):
            timeline = _from(part.timeline, self.start_ps)
            here = np.asarray(requests["replica"]) == number  # of those that were looked up here
            cache = _counted(part.cache, {name: column[here] for name, column in requests.items()}, timeline)
            kept = self.counted[np.asarray(part.requests["request_id"]).astype(np.int64)]
            mine = {name: np.asarray(column)[kept] for name, column in part.requests.items()}
            parts.append(dataclasses.replace(part, requests=mine, timeline=timeline, cache=cache))
        return dataclasses.replace(
            result,
            requests=requests,
            timeline=merged_timeline([part.timeline for part in parts]),
            cache=merged_stats([part.cache for part in parts]),
            replicas=tuple(parts),
        )


def _counted(cache: CacheStats, requests: Columns, timeline: Columns) -> CacheStats:
    """Return what a cache has counted, of these requests and stretches alone, as far as the records tell."""
    admitted = np.asarray(requests["status"]) == "finished"

    def total(name: str) -> int:
        return exact_sum(np.asarray(requests[name])[admitted].astype(np.int64))

    return dataclasses.replace(
        cache,
        query_tokens=total("prompt_tokens"),
        query_blocks=total("query_blocks"),
        hit_blocks=total("hit_blocks"),
        hit_tokens=total("hit_tokens"),
        evicted_blocks=exact_sum(np.asarray(timeline["evicted_blocks"]).astype(np.int64)),
    )


def _from(rows: Columns, start_ps: int) -> Columns:
    """Return the rows of a timeline whose steps begin at `start_ps` or later, the first of them cut to those."""
    columns: dict[str, Ints] = {name: np.asarray(column).astype(np.int64) for name, column in rows.items()}
    steps, first, increment = (columns[name] for name in ("steps", "first_step_ps", "step_increment_ps"))
    keep = (columns["end_ps"] > start_ps) | (columns["start_ps"] >= start_ps)
    found: dict[str, Ints] = {name: column[keep].copy() for name, column in columns.items()}
    if not keep.any() or found["start_ps"][0] >= start_ps:
        return dict(found)
    row = int(keep.argmax())
    total, base, slope = int(steps[row]), int(first[row]), int(increment[row])
    since = start_ps - int(columns["start_ps"][row])

    def elapsed(count: int) -> int:
        return count * base + slope * count * (count - 1) // 2

    gone, most = 0, total  # the fewest steps that take `since` or longer
    while gone < most:
        middle = (gone + most) // 2
        if elapsed(middle) < since:
            gone = middle + 1
        else:
            most = middle
    if gone == total:
        return {name: column[1:] for name, column in found.items()}
    found["start_ps"][0] += elapsed(gone)
    found["steps"][0] -= gone
    found["first_step_ps"][0] = base + slope * gone
    found["preemptions"][0] = 0  # what a stretch's first step does
    found["out_of_block_steps"][0] = min(int(found["out_of_block_steps"][0]), total - gone)
    for name in ("referenced_blocks", "kv_tokens"):
        at_first, at_last = int(found[f"{name}_first"][0]), int(found[name][0])
        found[f"{name}_first"][0] = at_first + (at_last - at_first) * gone // (total - 1)
    return dict(found)
