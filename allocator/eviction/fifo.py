"""First in, first out."""

from __future__ import annotations

from heapq import heappop, heappush

from allocator.eviction.policy import EvictionPolicy
from allocator.prefix import Extent


class FIFO(EvictionPolicy):
    """Take the block that was cached first, of those that can be taken; hits do not matter.

    Blocks are numbered as they are cached. Along a prefix the numbers rise, so once an extent's last block is
    the oldest, the whole extent is. A block keeps its number while it is referenced.
    """

    def __init__(self) -> None:
        self._next = 0
        self._runs: dict[Extent, list[tuple[int, int]]] = {}  # (blocks, number of the last), along the extent
        # A heap by the last block's number. Entries may be stale; the count keeps extents from being compared.
        self._exposed: list[tuple[int, int, Extent]] = []
        self._pushed = 0
        self._queued: dict[Extent, int] = {}  # the number under which an extent was last pushed

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

    def exposed(self, extent: Extent) -> None:
        number = self._runs[extent][-1][1]
        if self._queued.get(extent) != number:
            self._queued[extent] = number
            self._pushed += 1
            heappush(self._exposed, (number, self._pushed, extent))

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        runs = self._runs[extent]
        while num_blocks:
            count, last = runs.pop()
            if count > num_blocks:
                runs.append((count - num_blocks, last - num_blocks))
                break
            num_blocks -= count
        if extent.ids:
            if not extent.references:
                self.exposed(extent)
        else:
            del self._runs[extent]
            self._queued.pop(extent, None)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        while True:
            number, _, extent = self._exposed[0]
            runs = self._runs.get(extent)
            if runs and runs[-1][1] == number and not extent.references and not extent.live_children:
                return extent, min(wanted, len(extent.ids))
            heappop(self._exposed)
            if self._queued.get(extent) == number:
                del self._queued[extent]
