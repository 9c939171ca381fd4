"""First in, first out."""

from __future__ import annotations

from allocator.eviction.arrival import ByArrival
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent


class FIFO(ByArrival):
    """Take the block that was cached first, of those that can be taken; hits do not matter.

    Along a prefix the numbers rise, so once an extent's last block is the oldest, the whole extent is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exposed = ExtentQueue()  # by the last block's number

    def exposed(self, extent: Extent) -> None:
        self._exposed.put(extent, (self._runs[extent][-1][1],))

    def referenced(self, extent: Extent) -> None:
        self._exposed.discard(extent)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        super().evicted(extent, num_blocks)
        if not extent.ids:
            self._exposed.discard(extent)
        elif not extent.references:
            self.exposed(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._exposed.first()
        return extent, min(wanted, len(extent.ids))
