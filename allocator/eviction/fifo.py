"""First in, first out."""

from __future__ import annotations

from heapq import heappop, heappush

from allocator.eviction.arrival import ByArrival
from allocator.prefix import Extent


class FIFO(ByArrival):
    """Take the block that was cached first, of those that can be taken; hits do not matter.

    Along a prefix the numbers rise, so once an extent's last block is the oldest, the whole extent is.
    """

    def __init__(self) -> None:
        super().__init__()
        # A heap by the last block's number. Entries may be stale; the count keeps extents from being compared.
        self._exposed: list[tuple[int, int, Extent]] = []
        self._pushed = 0
        self._queued: dict[Extent, int] = {}  # the number under which an extent was last pushed

    def exposed(self, extent: Extent) -> None:
        number = self._runs[extent][-1][1]
        if self._queued.get(extent) != number:
            self._queued[extent] = number
            self._pushed += 1
            heappush(self._exposed, (number, self._pushed, extent))

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        super().evicted(extent, num_blocks)
        if not extent.ids:
            self._queued.pop(extent, None)
        elif not extent.references:
            self.exposed(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        while True:
            number, _, extent = self._exposed[0]
            runs = self._runs.get(extent)
            if runs and runs[-1][1] == number and not extent.references and not extent.live_children:
                return extent, min(wanted, len(extent.ids))
            heappop(self._exposed)
            if self._queued.get(extent) == number:
                del self._queued[extent]
