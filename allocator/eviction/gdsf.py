"""Greedy dual size frequency: a policy that knows what a block costs to compute again."""

from __future__ import annotations

from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent


class GDSF(EvictionPolicy):
    """Take the block of least value: clock + uses · cost / size, of those without cached children.

    Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HP Laboratories
    HPL-98-69R1, 1998. `uses` is one (the computation) and one for each hit. The clock is the highest value that
    was taken so far, so what has not been used for long falls behind; a value takes the clock's reading when the
    block becomes unreferenced, the moment that is recency for LRU. Of equals, the least recently used goes.

    All blocks have one size. Cost grows with depth, because a token attends to all before it: computing it takes
    2 · parameters FLOPs, and 4 · layers · hidden size for each token of its prefix. So block i of a sequence
    costs attention_blocks + i units, where attention_blocks is the depth at which attention costs as much as the
    weights: parameters / (2 · layers · hidden size · tokens_per_block). The default, 800, is that of a 7-billion-
    parameter Llama 2 at 32 tokens a block (25,700 tokens). Values are integers, so that equals are equal.

    Along an extent values fall towards the front, so once its last block is the least, all of it is.

    Raises ValueError if attention_blocks is negative.
    """

    def __init__(self, attention_blocks: int = 800) -> None:
        if attention_blocks < 0:
            raise ValueError(f"attention_blocks ({attention_blocks}) must not be negative")
        self.attention_blocks = attention_blocks
        self._clock = 0
        self._hits: dict[Extent, int] = {}
        self._readings: dict[
            Extent, tuple[int, int]
        ] = {}  # of the clock, and of the running number of releases
        self._released = 0
        self._exposed = ExtentQueue()

    def hit(self, extent: Extent) -> None:
        self._hits[extent] = self._hits.get(extent, 0) + 1

    def released(self, extent: Extent) -> None:
        self._released += 1
        self._readings[extent] = (self._clock, self._released)

    def exposed(self, extent: Extent) -> None:
        self._exposed.put(extent, (self._value(extent), self._readings[extent][1]))

    def _value(self, extent: Extent) -> int:
        """Return the value of an extent's last block."""
        uses = 1 + self._hits.get(extent, 0)
        return self._readings[extent][0] + uses * (self.attention_blocks + extent.end - 1)

    def referenced(self, extent: Extent) -> None:
        self._exposed.discard(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        if tail in self._hits:
            self._hits[head] = self._hits[tail]

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._exposed.discard(extent)
            self._hits.pop(extent, None)
            self._readings.pop(extent, None)
        elif not extent.references:
            self.exposed(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._exposed.first()
        self._clock = max(self._clock, self._value(extent))
        return extent, min(wanted, len(extent.ids))
