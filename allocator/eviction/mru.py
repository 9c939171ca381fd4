"""Most recently used: a baseline."""

from __future__ import annotations

from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent


class MRU(EvictionPolicy):
    """Take the block that became unreferenced last, of those without cached children.

    Best where prefixes come round in a fixed order that does not fit the pool, the pattern on which LRU never
    hits (Chou and DeWitt, An Evaluation of Buffer Management Strategies for Relational Database Systems, VLDB
    1985), and a poor choice elsewhere: it shows how much recency matters. No two blocks are released at the
    same time, so there are no ties.
    """

    def __init__(self) -> None:
        self._exposed = ExtentQueue()
        self._numbers: dict[Extent, int] = {}  # negated, so that the latest comes first
        self._released = 0

    def released(self, extent: Extent) -> None:
        self._released += 1
        self._numbers[extent] = -self._released

    def exposed(self, extent: Extent) -> None:
        self._exposed.put(extent, (self._numbers[extent],))

    def referenced(self, extent: Extent) -> None:
        self._exposed.discard(extent)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._exposed.discard(extent)
            self._numbers.pop(extent, None)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._exposed.first()
        return extent, min(wanted, len(extent.ids))
