"""Who owns which addresses of a contiguous memory: a buddy allocator, and best fit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from typing import Protocol


class AddressSpace(Protocol):
    """Hand out disjoint address ranges of [0, num_slots)."""

    num_slots: int

    def take(self, size: int) -> tuple[int, int] | None:
        """Return (start, length) of a free range with length >= size, now taken, or None when there is none."""

    def give(self, start: int) -> None:
        """Free the range that starts at `start`, joined with free neighbours. Raises ValueError if none does."""

    def largest_free(self) -> int:
        """Return the largest size for which `take` would succeed."""

    def free_ranges(self) -> list[tuple[int, int]]:
        """Return every free (start, length), by address."""


class BuddySpace:
    """Knuth's binary buddy system (The Art of Computer Programming, volume 1, section 2.5).

    A range has a power-of-two length, and starts at a multiple of it. A request takes the smallest free range
    that holds it (of equals, that of the lowest address), split in halves as often as they still suffice. A
    freed range joins its buddy, start XOR length, for as long as that one is free. A memory whose size is no
    power of two starts as one range for each binary digit of it, the longest first. Each call costs
    O(log num_slots) heap operations.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots ({num_slots}) must be at least 1")
        self.num_slots = num_slots
        orders = num_slots.bit_length()
        self._free: list[set[int]] = [set() for _ in range(orders)]
        # Heaps give the lowest address; an entry whose address has left the set is stale and is dropped on sight.
        self._heaps: list[list[int]] = [[] for _ in range(orders)]
        self._taken: dict[int, int] = {}
        start = 0
        for order in reversed(range(orders)):
            if num_slots >> order & 1:
                self._put(order, start)
                start += 1 << order

    def _put(self, order: int, start: int) -> None:
        free, heap = self._free[order], self._heaps[order]
        free.add(start)
        heapq.heappush(heap, start)
        if len(heap) > 2 * len(free) + 16:
            heap[:] = sorted(free)

    def _pop(self, order: int) -> int:
        free, heap = self._free[order], self._heaps[order]
        while (start := heapq.heappop(heap)) not in free:
            pass
        free.remove(start)
        return start

    def take(self, size: int) -> tuple[int, int] | None:
        """Return (start, length) of the range taken, length being `size` rounded up to a power of two."""
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1")
        wanted = (size - 1).bit_length()
        for order in range(wanted, len(self._free)):
            if self._free[order]:
                start = self._pop(order)
                for half in reversed(range(wanted, order)):
                    self._put(half, start + (1 << half))
                self._taken[start] = wanted
                return start, 1 << wanted
        return None

    def give(self, start: int) -> None:
        """Free the range that starts at `start` and join buddies. Raises ValueError when it is not taken."""
        if start not in self._taken:
            raise ValueError(f"start ({start}) must be that of a range taken")
        order = self._taken.pop(start)
        while order + 1 < len(self._free) and (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._put(order, start)

    def largest_free(self) -> int:
        """Return the longest free range."""
        return max((1 << order for order, free in enumerate(self._free) if free), default=0)

    def free_ranges(self) -> list[tuple[int, int]]:
        """Return every free (start, length), by address."""
        return sorted((start, 1 << order) for order, free in enumerate(self._free) for start in free)


class BestFitSpace:
    """Ranges of exactly the size asked for, cut from the front of the smallest free range that holds it.

    The best that contiguous allocation does without moving anything: no rounding, and only the holes between
    ranges are lost. Two binary searches a call (and a shift of a list of free ranges, of which there are at
    most one more than ranges taken).
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots ({num_slots}) must be at least 1")
        self.num_slots = num_slots
        self._by_size = [(num_slots, 0)]
        self._length_at = {0: num_slots}
        self._start_before = {num_slots: 0}
        self._taken: dict[int, int] = {}

    def _put(self, start: int, length: int) -> None:
        insort(self._by_size, (length, start))
        self._length_at[start] = length
        self._start_before[start + length] = start

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_size[bisect_left(self._by_size, (length, start))]
        return length

    def take(self, size: int) -> tuple[int, int] | None:
        """Return (start, size) of the range taken."""
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1")
        place = bisect_left(self._by_size, (size, 0))
        if place == len(self._by_size):
            return None
        start = self._by_size[place][1]
        length = self._remove(start)
        if length > size:
            self._put(start + size, length - size)
        self._taken[start] = size
        return start, size

    def give(self, start: int) -> None:
        """Free the range that starts at `start` and join neighbours. Raises ValueError when it is not taken."""
        if start not in self._taken:
            raise ValueError(f"start ({start}) must be that of a range taken")
        length = self._taken.pop(start)
        if start + length in self._length_at:
            length += self._remove(start + length)
        if start in self._start_before:
            before = self._start_before[start]
            length += self._remove(before)
            start = before
        self._put(start, length)

    def largest_free(self) -> int:
        """Return the longest free range."""
        return self._by_size[-1][0] if self._by_size else 0

    def free_ranges(self) -> list[tuple[int, int]]:
        """Return every free (start, length), by address."""
        return sorted(self._length_at.items())
