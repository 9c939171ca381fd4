"""Least frequently used."""

from __future__ import annotations

from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent


class LFU(EvictionPolicy):
    """Take the block that was hit least often since it was cached; of equals, the least recently used.

    The in-memory LFU of the textbooks (Coffman and Denning, Operating Systems Theory, 1973): a count goes with
    its block and is not remembered after eviction, nor does it age. A hit is an admission that found the block;
    forks and the sequence that computed it do not count. Recency is that of LRU, the moment a block became
    unreferenced.

    All blocks of an extent have been hit equally often, and a block at least as often as those cached after it
    on its prefix. So the least of all evictable blocks is always one without cached children.
    """

    def __init__(self) -> None:
        self._hits: dict[Extent, int] = {}
        self._queue = ExtentQueue()
        self._released = 0

    def hit(self, extent: Extent) -> None:
        self._hits[extent] = self._hits.get(extent, 0) + 1

    def referenced(self, extent: Extent) -> None:
        self._queue.discard(extent)

    def released(self, extent: Extent) -> None:
        self._released += 1
        self._queue.put(extent, (self._hits.get(extent, 0), self._released))

    def split(self, head: Extent, tail: Extent) -> None:
        if tail in self._hits:
            self._hits[head] = self._hits[tail]

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._hits.pop(extent, None)
            self._queue.discard(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._queue.first()
        return extent, min(wanted, len(extent.ids))
