"""Lifetimes: how long cached blocks live, lie idle before eviction, and wait to be used again."""

from __future__ import annotations

from array import array

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
        born = array("q", (now,)) * num_blocks
        if extent.born is None:
            extent.born = born
        else:
            extent.born.extend(born)

    def hit(self, extent: Extent, now: int) -> None:
        """Note a hit on all of `extent`, before it is referenced."""
        if not extent.references:
            self.reuse_gap.append((now - extent.touched, len(extent.ids)))

    def evicted(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note that the last `num_blocks` blocks of `extent` are about to be evicted."""
        self.idle_before_evict.append((now - extent.touched, num_blocks))
        assert extent.born is not None
        run_start, run = extent.born[-num_blocks], 0
        if run_start == extent.born[-1]:  # filled at once, as a prefill chunk is
            self.lifetime.append((now - run_start, num_blocks))
            return
        for moment in extent.born[-num_blocks:]:
            if moment != run_start:
                self.lifetime.append((now - run_start, run))
                run_start, run = moment, 0
            run += 1
        self.lifetime.append((now - run_start, run))
