"""Retaining: how a sequence's wishes come to the extents that it holds, and when they run out.

All blocks of an extent are retained alike: an extent is cut where a wish changes, and sealed where the next
block's differs, so that decoding never has to ask. So retention costs per extent and range, and nothing at all
where no request asks for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent
from allocator.retention import FOREVER, RetentionPlan, kept

if TYPE_CHECKING:
    from allocator.pool import BlockPool
    from allocator.sequence import KVSequence
    from allocator.tables import Tables


class Expiries:
    """The evictable extents whose retention passes, by the time at which it does."""

    def __init__(self) -> None:
        self._queue = ExtentQueue()
        self._released = 0

    def released(self, extent: Extent, now: int) -> None:
        """Start the clock of an extent with a retention, if it has one."""
        assert extent.retention is not None
        if extent.retention.duration is not None:
            self._released += 1
            self._queue.put(extent, (now + extent.retention.duration, self._released, -extent.start))

    def split(self, head: Extent, tail: Extent) -> None:
        """Let the two parts of an evictable extent have the time that the whole had, the tail before the head."""
        if tail in self._queue:
            time, number, _ = self._queue.key(tail)
            for part in (tail, head):
                self._queue.put(part, (time, number, -part.start))

    def discard(self, extent: Extent) -> None:
        """Stop the clock: the extent is referenced again, or gone."""
        self._queue.discard(extent)

    def next(self) -> int | None:
        """Return the time at which the next retention is over; None if none will be."""
        return self._queue.first_key()[0] if self._queue else None

    def due(self, now: int) -> Iterator[Extent]:
        """Yield the extents whose retention is over by `now`, in order of time, then of release."""
        while self._queue and self._queue.first_key()[0] <= now:
            extent = self._queue.first()
            self._queue.discard(extent)
            yield extent


def retain_hits(pool: BlockPool, anchor: Extent, plan: RetentionPlan, full: int) -> None:
    """Let the blocks that a sequence found in the cache, those down to `anchor`, have its wishes.

    full  the sequence's full blocks: of one that it was cut within it says nothing
    """
    for extent in list(anchor.path()):
        wishes = []
        at, end = extent.start, extent.end
        while at < min(end, full):
            wish, stop = plan.at(at)
            at = min(stop, end, full)
            wishes.append((extent.retention if wish is None else kept(wish), at))
        if at < end:
            wishes.append((extent.retention, end))
        *cuts, (last, _) = [(wish, list(run)[-1][1]) for wish, run in groupby(wishes, lambda each: each[0])]
        for wish, stop in cuts:
            pool.split(extent, stop - extent.start).retention = wish
        extent.retention = last


def index_retained(
    tables: Tables, sequence: KVSequence, plan: RetentionPlan, full: int, dates: array[int] | None = None
) -> None:
    """Put a sequence's blocks up to `full` into the index, those with equal wishes at a time; `dates` as there."""
    start = sequence.anchor.end
    while (first := sequence.anchor.end) < full:
        wish, end = plan.at(first)
        end_of_run = min(end, full)
        tables.index_full(
            sequence, end_of_run, dates and dates[first - start : end_of_run - start], alike=True
        )
        for extent in sequence.anchor.path():
            if extent.start < first:
                break
            is_new = extent.start not in sequence.twins
            if is_new or wish is not None:
                extent.retention = kept(wish)
            if not is_new:  # whoever cached it may have other wishes for what follows
                extent.sealed = True
        # Decoding grows an open extent without looking at wishes, so none is left open before the last run.
        if end < FOREVER and (end <= full or sequence.num_tokens >= sequence.num_prompt_tokens):
            sequence.anchor.sealed = True
