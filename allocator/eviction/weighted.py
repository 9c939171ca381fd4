"""Belady's policy, weighted by what a block costs to compute again."""

from __future__ import annotations

from allocator.eviction.belady import NEVER, Belady
from allocator.eviction.queue import ExtentQueue, Key
from allocator.prefix import Extent


class WeightedBelady(Belady):
    """Take the block whose next use saves least for each request until then: cost / distance to the next use.

    The cost of a block is that of GDSF: attention_blocks plus its depth, here to five binary digits (at most 6%
    low), so that costs fall into few classes. Blocks never used again are worth nothing; of equals, the one used
    later goes, then the least recently used.

    Of blocks of one cost this is Belady's order. With different costs it is a heuristic, as every rule must be
    that looks at one block at a time: the optimum is that of a minimum-cost flow (Chrobak, Karloff, Payne and
    Vishwanathan, New Results on Server Problems, SIAM J. Discrete Mathematics 4(2), 1991). It may keep a costly
    block so long that cheaper ones would have saved more in its place, and a prefix is only as safe as the
    last of the blocks behind it.

    A call costs O(log extents) for each class of cost, of which there are 16 for each doubling.

    Raises ValueError if attention_blocks is negative.
    """

    def __init__(self, attention_blocks: int = 800) -> None:
        super().__init__()
        if attention_blocks < 0:
            raise ValueError(f"attention_blocks ({attention_blocks}) must not be negative")
        self.attention_blocks = attention_blocks
        self._classes: dict[int, ExtentQueue] = {}
        self._class_of: dict[Extent, int] = {}
        self._begun_last = 0

    def begin(self, number: int) -> None:
        super().begin(number)
        self._begun_last = max(self._begun_last, number)

    def _put(self, extent: Extent, key: Key) -> None:
        cost = max(self.attention_blocks + extent.end - 1, 1)
        shift = max(cost.bit_length() - 5, 0)
        cost = cost >> shift << shift
        if self._class_of.get(extent, cost) != cost:
            self._take_out(extent)
        self._class_of[extent] = cost
        self._classes.setdefault(cost, ExtentQueue()).put(extent, key)

    def _take_out(self, extent: Extent) -> None:
        cost = self._class_of.pop(extent, None)
        if cost is not None:
            self._classes[cost].discard(extent)
            if not self._classes[cost]:
                del self._classes[cost]

    def victim(self, wanted: int) -> tuple[Extent, int]:
        best: tuple[int, int] | None = None  # distance, cost
        chosen: tuple[Key, Extent] | None = None
        for cost, queue in self._classes.items():
            key = queue.first_key()
            use = -key[0]
            distance = NEVER if use == NEVER else max(use - self._begun_last, 1)
            weight = (distance, 1 if use == NEVER else cost)
            if best is not None and chosen is not None:
                one, other = weight[0] * best[1], best[0] * weight[1]
                if one < other or (one == other and key >= chosen[0]):
                    continue
            best, chosen = weight, (key, queue.first())
        assert chosen is not None
        return chosen[1], 1
