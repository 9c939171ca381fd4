"""ByArrival: what policies have in common that number blocks as they are cached."""

from __future__ import annotations

from allocator.eviction.policy import EvictionPolicy
from allocator.prefix import Extent


class ByArrival(EvictionPolicy):
    """Number blocks as they are cached. A block keeps its number while it is referenced.

    Numbers rise along a prefix, so an extent's are kept as runs of consecutive ones. A subclass that overrides
    `split` or `evicted` calls the one here first.
    """

    def __init__(self) -> None:
        self._next = 0
        self._runs: dict[Extent, list[tuple[int, int]]] = {}  # (blocks, number of the last), along the extent

    def cached(self, extent: Extent, num_blocks: int) -> None:
        self._next += num_blocks
        self._runs.setdefault(extent, []).append((num_blocks, self._next - 1))

    def split(self, head: Extent, tail: Extent) -> None:
        runs = self._runs[tail]
        blocks = len(head.ids)
        self._runs[head] = kept = []
        while blocks:
            count, last = runs[0]
            if count > blocks:
                kept.append((blocks, last - (count - blocks)))
                runs[0] = (count - blocks, last)
                break
            kept.append(runs.pop(0))
            blocks -= count

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            del self._runs[extent]
            return
        runs = self._runs[extent]
        while num_blocks:
            count, last = runs.pop()
            if count > num_blocks:
                runs.append((count - num_blocks, last - num_blocks))
                break
            num_blocks -= count
