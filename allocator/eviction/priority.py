"""Prioritised LRU with retention."""

from __future__ import annotations

from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent
from allocator.retention import DEFAULT_PRIORITY


class Priority(EvictionPolicy):
    """Take the block of the lowest priority, of those without cached children; of equals, the least recently used.

    TensorRT-LLM's prioritised LRU. Priorities are what requests asked for at admission, see
    `allocator.retention.RetentionConfig`; without any this is LRU. One that lasts for a time only falls to the
    default when it is over, and its block then counts as used at that moment. No two blocks are released or
    expire at the same time: of those that expire together, the one released first goes first.

    A block without cached children goes before those that hold more dearly kept ones, however low their own
    priority: a prefix is worth nothing less than what follows it.
    """

    def __init__(self) -> None:
        self._exposed = ExtentQueue()
        self._numbers: dict[Extent, int] = {}
        self._used = 0

    def released(self, extent: Extent) -> None:
        self._used += 1
        self._numbers[extent] = self._used

    def exposed(self, extent: Extent) -> None:
        retention = extent.retention
        priority = DEFAULT_PRIORITY if retention is None else retention.priority
        self._exposed.put(extent, (priority, self._numbers[extent]))

    def expired(self, extent: Extent) -> None:
        self.released(extent)
        if extent in self._exposed:
            self.exposed(extent)

    def referenced(self, extent: Extent) -> None:
        self._exposed.discard(extent)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._exposed.discard(extent)
            self._numbers.pop(extent, None)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._exposed.first()
        return extent, min(wanted, len(extent.ids))
