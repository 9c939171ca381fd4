"""Lifetimes: how long cached blocks live, lie idle before eviction, and wait to be used again."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from allocator.births import last
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
        self.evictions: list[tuple[int, int, int]] = []  # now, blocks, last use; see `gone`
        self._born = array("q")  # births of what was evicted, the last run first: the moment, how many blocks
        self._hits: list[tuple[int, int, int]] = []  # now, blocks, last use

    def __len__(self) -> int:
        """Return about how many numbers are held, 8 bytes each."""
        return 16 * len(self.evictions) + len(self._born) + 16 * len(self._hits)

    def hit(self, extent: Extent, now: int) -> None:
        """Note a hit on all of `extent`, before it is referenced."""
        if not extent.references:
            self.reused(extent, now)

    def reused(self, extent: Extent, now: int) -> None:
        """Note a hit on an extent that nobody referenced."""
        self._hits.append((now, len(extent.ids), extent.touched))

    def evicted(self, extent: Extent, num_blocks: int, now: int) -> None:
        """Note the eviction, `now`, of the last `num_blocks` blocks of `extent`, which are still there."""
        self.evictions.append((now, num_blocks, extent.touched))
        self.gone(extent, num_blocks)

    def gone(self, extent: Extent, num_blocks: int) -> None:
        """Note when the last `num_blocks` blocks of `extent` were filled, of which `evictions` were noted."""
        born = extent.born
        assert born is not None
        births = born if num_blocks == len(extent.ids) else last(born, num_blocks)
        self._born.extend(births[::-1])  # the last block went first

    def take(self) -> dict[str, Durations]:
        """Return and forget the durations, by name, in the order in which they ended.

        Equal ones that follow each other are joined.
        """
        self._settle()
        evictions, hits = (
            np.fromiter(chain.from_iterable(rows), np.int64, 3 * len(rows)).reshape(-1, 3)
            for rows in (self.evictions, self._hits)
        )
        born = np.array(self._born, dtype=np.int64).reshape(-1, 2)
        self.evictions.clear()  # in place: the pool adds to the same list
        self._hits.clear()
        del self._born[:]
        return {
            "lifetime": joined([_lived(evictions, born)]),
            "idle_before_evict": joined([(evictions[:, 0] - evictions[:, 2], evictions[:, 1])]),
            "reuse_gap": joined([(hits[:, 0] - hits[:, 2], hits[:, 1])]),
        }


def _lived(evictions: NDArray[np.int64], born: NDArray[np.int64]) -> Durations:
    """Return how long blocks lived. Of the same blocks, in the same order, both tell by runs, but by different ones:
    rows of `evictions` begin with now and how many, rows of `born` are a moment and how many.
    """
    evicted, filled = np.cumsum(evictions[:, 1]), np.cumsum(born[:, 1])
    ends = np.concatenate((evicted, filled))
    ends.sort(kind="stable")  # merges the two, in a hundredth of np.union1d's time
    ends = ends[np.diff(ends, prepend=0) > 0]
    now = evictions[np.searchsorted(evicted, ends), 0]
    return now - born[np.searchsorted(filled, ends), 0], np.diff(ends, prepend=0)


def joined(parts: Sequence[Durations]) -> Durations:
    """Return one after the other as one; equal values that follow each other become one with their weights' sum."""
    nothing = np.empty(0, dtype=np.int64)
    values = np.concatenate([nothing, *(part[0] for part in parts)])
    weights = np.concatenate([nothing, *(part[1] for part in parts)])
    if not values.size:
        return values, weights
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return values[starts], np.add.reduceat(weights, starts)
