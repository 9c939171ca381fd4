"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from allocator.eviction.policy import EvictionPolicy
from allocator.prefix import Extent


class LRU(EvictionPolicy):
    """Take the block that has been unreferenced for longest; of a sequence's blocks, the last one first.

    Sequences release their extents deepest first, so the oldest extent never has a cached child, and within it
    the tail goes first: the order is exactly that of a list of single blocks.
    """

    drains_victims: ClassVar[bool] = True

    def __init__(self) -> None:
        self._order: OrderedDict[Extent, None] = OrderedDict()

    def released(self, extent: Extent) -> None:
        self._order[extent] = None

    def referenced(self, extent: Extent) -> None:
        # A head that was cut off an evictable extent was never listed itself.
        self._order.pop(extent, None)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._order.pop(extent, None)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = next(iter(self._order))
        blocks = len(extent.ids)
        return extent, blocks if blocks < wanted else wanted
