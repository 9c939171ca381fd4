"""Lifetimes: how long cached blocks live, lie idle before eviction, and wait to be used again."""

from __future__ import annotations

from array import array
from bisect import bisect_right

from allocator.prefix import Extent


class Lifetimes:
    """Collect durations in the caller's time unit; each value stands for a number of blocks.

    lifetime           from the moment a block was filled to its eviction
    idle_before_evict  from its last use (the release of its last holder) to its eviction
    reuse_gap          from its last use to a hit that found it unreferenced

    The same three quantities as vLLM's kv_block_{lifetime, idle_before_evict, reuse_gap}_seconds.
    """

    def __init__(self) -> None:
        self.lifetime: list[tuple[int, int]] = []  # (duration, blocks)
        self.idle_before_evict: list[tuple[int, int]] = []
        self.reuse_gap: list[tuple[int, int]] = []

    def filled(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note that the last `num_blocks` blocks of `extent` were filled just now."""
        if extent.born is None:
            extent.born = array("q", (now,)) * num_blocks
        elif num_blocks == 1:
            extent.born.append(now)
        else:
            extent.born.extend(array("q", (now,)) * num_blocks)

    def hit(self, extent: Extent, now: int) -> None:
        """Note a hit on all of `extent`, before it is referenced."""
        if not extent.references:
            self.reuse_gap.append((now - extent.touched, len(extent.ids)))

    def evicted(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note that the last `num_blocks` blocks of `extent` are about to be evicted."""
        self.idle_before_evict.append((now - extent.touched, num_blocks))
        born = extent.born
        assert born is not None
        first, end = len(born) - num_blocks, len(born)
        while first < end:  # moments never fall along an extent, so equal ones are found by bisection
            after = bisect_right(born, born[first], first)
            self.lifetime.append((now - born[first], after - first))
            first = after
