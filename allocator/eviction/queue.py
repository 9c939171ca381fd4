"""ExtentQueue: a priority queue of extents from which any can be taken out."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from allocator.prefix import Extent

Key = tuple[int, ...]


class ExtentQueue:
    """Extents by a key of integers, the least first.

    A binary heap in which taking out is lazy: what is no longer queued is dropped when it comes up, or when the
    heap is half stale. Each call is O(log extents), averaged over calls.
    """

    def __init__(self) -> None:
        # The running number keeps two extents from being compared.
        self._heap: list[tuple[Key, int, Extent]] = []
        self._entries: dict[Extent, tuple[Key, int, Extent]] = {}
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, extent: object) -> bool:
        return extent in self._entries

    def put(self, extent: Extent, key: Key) -> None:
        """Queue an extent, or change its key."""
        self._pushed += 1
        entry = (key, self._pushed, extent)
        self._entries[extent] = entry
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapify(self._heap)
        else:
            heappush(self._heap, entry)

    def discard(self, extent: Extent) -> None:
        """Take an extent out if it is queued."""
        self._entries.pop(extent, None)

    def key(self, extent: Extent) -> Key:
        """Return the key of an extent that is queued."""
        return self._entries[extent][0]

    def first(self) -> Extent:
        """Return the extent with the least key. The queue must not be empty."""
        heap, entries = self._heap, self._entries
        while True:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry[2]
            heappop(heap)

    def first_key(self) -> Key:
        """Return the least key. The queue must not be empty."""
        return self._entries[self.first()][0]

    def second_key(self) -> Key | None:
        """Return the least key but that of the first; None if there is no other extent."""
        if len(self._entries) < 2:
            return None
        self.first()
        top = heappop(self._heap)
        key = self._entries[self.first()][0]
        heappush(self._heap, top)
        return key
