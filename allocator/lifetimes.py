"""Lifetimes: how long cached blocks live, lie idle before eviction, and wait to be used again."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from allocator.prefix import Extent

Durations = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Values, and how many blocks each stands for: int64 [n] both."""


class Lifetimes:
    """Collect durations in the caller's time unit.

    lifetime           from the moment a block was filled to its eviction
    idle_before_evict  from its last use (the release of its last holder) to its eviction
    reuse_gap          from its last use to a hit that found it unreferenced

    The same three quantities as vLLM's kv_block_{lifetime, idle_before_evict, reuse_gap}_seconds. An eviction
    notes the moments as they are; the durations are computed when somebody wants them.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        """Take what lets a pool complete the eviction of the victim that it is emptying."""
        self._settle = settle
        self._evictions = array("q")  # now, blocks, last use; a triple for each eviction from an extent
        self._born = array("q")  # when each evicted block was filled, eviction by eviction
        self._hits = array("q")  # now, blocks, last use
        self._evicted = self._evictions.extend
        self._hit = self._hits.extend

    def __len__(self) -> int:
        """Return how many numbers are held, 8 bytes each."""
        return len(self._evictions) + len(self._born) + len(self._hits)

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
            self.reused(extent, now)

    def reused(self, extent: Extent, now: int) -> None:
        """Note a hit on an extent that nobody referenced."""
        self._hit((now, len(extent.ids), extent.touched))

    def evicted(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note the eviction, `now`, of the last `num_blocks` blocks of `extent`, which are still there."""
        self.taken(extent, num_blocks, now)
        self.gone(extent, num_blocks)

    def taken(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note half of an eviction: that `num_blocks` blocks of `extent` went now. `gone` has to follow."""
        self._evicted((now, num_blocks, extent.touched))

    def gone(self, extent: Extent, num_blocks: int) -> None:
        """Note the other half: `num_blocks`, the last ones of `extent` and still there, are all that went of it."""
        assert extent.born is not None
        born = extent.born[-num_blocks:]
        born.reverse()  # the last goes first
        self._born.extend(born)

    def take(self) -> dict[str, Durations]:
        """Return and forget the durations, by name, in the order in which they ended.

        Equal ones that follow each other are joined.
        """
        self._settle()
        evictions, hits = (
            np.array(rows, dtype=np.int64).reshape(-1, 3) for rows in (self._evictions, self._hits)
        )
        born = np.array(self._born, dtype=np.int64)
        for kept in (self._evictions, self._born, self._hits):
            del kept[:]
        lived = np.repeat(evictions[:, 0], evictions[:, 1]) - born
        return {
            "lifetime": joined([(lived, np.ones_like(lived))]),
            "idle_before_evict": joined([(evictions[:, 0] - evictions[:, 2], evictions[:, 1])]),
            "reuse_gap": joined([(hits[:, 0] - hits[:, 2], hits[:, 1])]),
        }


def joined(parts: Sequence[Durations]) -> Durations:
    """Return one after the other as one; equal values that follow each other become one with their weights' sum."""
    nothing = np.empty(0, dtype=np.int64)
    values = np.concatenate([nothing, *(part[0] for part in parts)])
    weights = np.concatenate([nothing, *(part[1] for part in parts)])
    if not values.size:
        return values, weights
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return values[starts], np.add.reduceat(weights, starts)
