"""S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict

from allocator.eviction.names import BlockNames, Name
from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue
from allocator.prefix import Extent

_MOST_HITS = 3
"""A count has two bits."""


class S3FIFO(EvictionPolicy):
    """Three static FIFO queues: new blocks in a small one, the proven in the main one, the evicted as ghosts.

    Yang, Zhang, Qiu, Yue and Rashmi, FIFO Queues are All You Need for Cache Eviction, SOSP 2023, algorithm 1.
    A block enters the small queue, or the main one if its content is among the ghosts (then it is one no
    longer). If the small queue has its share of the pool, it gives: its oldest, if hit more than once, goes to
    the main queue with its count cleared, else it is evicted and becomes a ghost. Otherwise, or when the move
    filled the main queue, the main queue gives: its oldest, if hit, goes to its end with one hit less, else it
    is evicted and forgotten. There are as many ghosts as the main queue has places.

    Queues hold every cached block, and a block keeps its place while it is referenced. What cannot be taken
    (referenced, or with cached children) is passed over and left as it is, so "its oldest" is the oldest of
    those that can; a queue without any lets the other give. Places are unique, so there are no ties.

    Each step costs O(log extents) and moves a block that was hit, or takes blocks. Ghosts are exact: by name.

    Raises ValueError unless 0 < small_share < 1; 0.1 is the paper's.
    """

    def __init__(self, small_share: float = 0.1) -> None:
        if not 0 < small_share < 1:
            raise ValueError(f"small_share ({small_share}) must lie between 0 and 1")
        self.small_share = small_share
        self._small_room = self._main_room = 0
        self._small_blocks = self._main_blocks = 0
        self._next = 0
        # (blocks, place of the last, in the main queue), along the extent; places are consecutive in a run
        self._places: dict[Extent, list[tuple[int, int, bool]]] = {}
        self._hits: dict[Extent, int] = {}
        self._last_hits: dict[
            Extent, int
        ] = {}  # of the last block, where it was moved: by then it has its own
        self._small = ExtentQueue()  # exposed extents whose last block is in the small queue
        self._main = ExtentQueue()
        self._names = BlockNames()
        self._ghosts: OrderedDict[Name, None] = OrderedDict()  # the next to be forgotten, first

    def attached(self, num_blocks: int) -> None:
        self._small_room = max(1, int(num_blocks * self.small_share))
        self._main_room = num_blocks - self._small_room

    def cached(self, extent: Extent, num_blocks: int) -> None:
        places = self._places.setdefault(extent, [])
        for name in self._names.cached(extent, num_blocks):
            was_ghost = name in self._ghosts
            if was_ghost:
                del self._ghosts[name]
                self._names.drop(name)
                self._main_blocks += 1
            else:
                self._small_blocks += 1
            place = self._next
            self._next += 1
            if places and places[-1][1:] == (place - 1, was_ghost):
                places[-1] = (places[-1][0] + 1, place, was_ghost)
            else:
                places.append((1, place, was_ghost))

    def hit(self, extent: Extent) -> None:
        self._hits[extent] = min(self._hits.get(extent, 0) + 1, _MOST_HITS)
        if extent in self._last_hits:
            self._last_hits[extent] = min(self._last_hits[extent] + 1, _MOST_HITS)

    def exposed(self, extent: Extent) -> None:
        _, place, in_main = self._places[extent][-1]
        (self._main if in_main else self._small).put(extent, (place,))

    def referenced(self, extent: Extent) -> None:
        self._small.discard(extent)
        self._main.discard(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        self._names.split(head, tail)
        if tail in self._hits:
            self._hits[head] = self._hits[tail]
        places, blocks = self._places[tail], len(head.ids)
        self._places[head] = kept = []
        while blocks:
            count, last, in_main = places[0]
            if count > blocks:
                kept.append((blocks, last - (count - blocks), in_main))
                places[0] = (count - blocks, last, in_main)
                break
            kept.append(places.pop(0))
            blocks -= count

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        self._names.evicted(extent, num_blocks)
        for _ in range(num_blocks):
            if self._remove_last(extent)[1]:
                self._main_blocks -= 1
            else:
                self._small_blocks -= 1
        self._last_hits.pop(extent, None)
        if not extent.ids:
            del self._places[extent]
            self._hits.pop(extent, None)
        elif not extent.references:
            self.exposed(extent)

    def _remove_last(self, extent: Extent) -> tuple[int, bool]:
        """Take the last block's place from it; return the place and whether it is in the main queue."""
        places = self._places[extent]
        count, place, in_main = places.pop()
        if count > 1:
            places.append((count - 1, place - 1, in_main))
        return place, in_main

    def _move_last(self, extent: Extent, hits: int) -> None:
        """Put the last block of an exposed extent at the end of the main queue."""
        self._remove_last(extent)
        self._places[extent].append((1, self._next, True))
        self._next += 1
        self._last_hits[extent] = hits
        self._small.discard(extent)
        self.exposed(extent)

    def _hits_of_last(self, extent: Extent) -> int:
        hits = self._last_hits.get(extent)
        return self._hits.get(extent, 0) if hits is None else hits

    def victim(self, wanted: int) -> tuple[Extent, int]:
        small_gives = self._small_blocks >= self._small_room or not self._main
        if small_gives:
            while self._small:
                extent = self._small.first()
                if self._hits_of_last(extent) <= 1:
                    if self._main:
                        wanted = max(1, min(wanted, self._small_blocks - self._small_room + 1))
                    return self._take_from(extent, wanted, in_main=False)
                self._small_blocks -= 1
                self._main_blocks += 1
                self._move_last(extent, 0)
                if self._main_blocks > self._main_room:
                    break
        while True:
            extent = self._main.first()
            hits = self._hits_of_last(extent)
            if not hits:
                return self._take_from(extent, 1 if small_gives else wanted, in_main=True)
            self._move_last(extent, hits - 1)

    def _take_from(self, extent: Extent, wanted: int, *, in_main: bool) -> tuple[Extent, int]:
        """Return how many of an extent's last blocks to take, the last one being the oldest of its queue.

        Those before it are older still, so they are next if they are in the same queue and were hit as rarely.
        """
        (self._main if in_main else self._small).discard(extent)
        count = 1
        if self._hits.get(extent, 0) <= (0 if in_main else 1):
            count = 0
            for blocks, _, where in reversed(self._places[extent]):
                if where != in_main or count >= wanted:
                    break
                count += blocks
            count = min(count, wanted)
        if not in_main:
            for name in self._names.of(extent)[-1 : -1 - count : -1]:
                self._remember(name)
        return extent, count

    def _remember(self, name: Name) -> None:
        if not self._main_room:
            return
        self._ghosts[name] = None
        self._names.hold(name)
        if len(self._ghosts) > self._main_room:
            self._names.drop(self._ghosts.popitem(last=False)[0])
