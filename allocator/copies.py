"""PendingCopies: the block copies that kernels still have to execute."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allocator.event_log import EXECUTED, EventLog
from allocator.pool import BlockPool
from allocator.prefix import Extent

_NO_COPIES = np.zeros((0, 3), dtype=np.int32)
_NO_COPIES.flags.writeable = False


class PendingCopies:
    """Copies in order of their making, with both ends kept from reuse until the list is taken.

    The copies of a list run in parallel, before the writes of their step: so within a list no block is both a
    source and a destination, and no destination appears twice.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._copies: list[tuple[int, int, int]] = []
        self._pinned: list[int] = []
        self._held: list[Extent] = []
        self._destinations: set[int] = set()
        self.events: EventLog | None = None

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def num_held(self) -> int:
        """Return how many of the sources are cached."""
        return len(self._held)

    def is_destination(self, block: int) -> bool:
        """Return whether a copy into `block` is pending, so that it cannot be a source yet."""
        return block in self._destinations

    def add(self, source: int, destination: int, num_tokens: int, extent: Extent | None = None) -> None:
        """Note a copy of the first `num_tokens` slots.

        A cached source is held through its extent: the caller has acquired the path, and it is dropped here.
        """
        self._copies.append((source, destination, num_tokens))
        self._destinations.add(destination)
        self._pin(destination)
        if extent is None:
            self._pin(source)
        else:
            self._held.append(extent)

    def _pin(self, block: int) -> None:
        self._pool.pin(block)
        self._pinned.append(block)

    def take(self) -> NDArray[np.int32]:
        """Return the copies, int32 [n, 3] of source, destination, valid tokens, and let go of their blocks."""
        if not self._copies:
            return _NO_COPIES
        copies = np.array(self._copies, dtype=np.int32).reshape(-1, 3)
        if self.events is not None:
            self.events.add(EXECUTED, value=len(copies))
        for block in self._pinned:
            self._pool.unpin(block)
        for extent in self._held:
            self._pool.drop_path(extent)
        self._copies.clear()
        self._destinations.clear()
        self._pinned.clear()
        self._held.clear()
        return copies

    def blocks(self) -> set[int]:
        """Return the sources and destinations: none of them may be reused yet."""
        return {block for source, destination, _ in self._copies for block in (source, destination)}

    def held_extents(self) -> list[Extent]:
        """Return the cached sources' extents; each holds one reference on its path."""
        return list(self._held)
