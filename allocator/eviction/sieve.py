"""SIEVE."""

from __future__ import annotations

from allocator.eviction.arrival import ByArrival
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent


class SIEVE(ByArrival):
    """A hand walks the blocks from old to new, spares those hit since it last came by, and takes the next.

    Zhang, Yang, Yue, Vigfusson and Rashmi, SIEVE is Simpler than LRU, NSDI 2024. Blocks stand in the order in
    which they were cached and never move; a hit marks them. The hand stops where it took a block and goes on
    from there; beyond the newest it begins again at the oldest. Places are unique, so there are no ties.

    What cannot be taken (referenced, or with cached children) the hand passes and leaves as it is, mark
    included. So it only visits the last blocks of exposed extents: those ahead of it in one queue, those
    behind in another, and each step costs O(log extents). A step either takes a block or removes a mark.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[Extent, int] = {}  # how many blocks, from the first on
        self._hand = 0  # number of the first block ahead
        self._ahead = ExtentQueue()
        self._behind = ExtentQueue()

    def hit(self, extent: Extent) -> None:
        self._marked[extent] = len(extent.ids)

    def exposed(self, extent: Extent) -> None:
        number = self._runs[extent][-1][1]
        (self._ahead if number >= self._hand else self._behind).put(extent, (number,))

    def referenced(self, extent: Extent) -> None:
        self._ahead.discard(extent)
        self._behind.discard(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        super().split(head, tail)
        marked = self._marked.pop(tail, 0)
        if marked:
            self._marked[head] = min(marked, len(head.ids))
        if marked > len(head.ids):
            self._marked[tail] = marked - len(head.ids)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        super().evicted(extent, num_blocks)
        if not extent.ids:
            self._marked.pop(extent, None)
            return
        if self._marked.get(extent, 0) > len(extent.ids):
            self._marked[extent] = len(extent.ids)
        if not extent.references:
            self.exposed(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        while True:
            if not self._ahead:
                self._ahead, self._behind = self._behind, self._ahead
                self._hand = 0
            extent = self._ahead.first()
            number = self._runs[extent][-1][1]
            self._hand = number + 1
            self._ahead.discard(extent)
            if self._marked.get(extent) != len(extent.ids):
                return extent, 1
            self._marked[extent] -= 1
            self._behind.put(extent, (number,))
