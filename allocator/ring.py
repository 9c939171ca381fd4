"""What a batch keeps in arrays, a row for each member: last slots, and the token ids of the latest steps."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = slice | NDArray[np.intp]
"""Which rows of an array are the members', in their order: all up to a number, or one by one."""

_MIN_ROWS = 64
_STEPS = 512
"""Steps that are to pass before histories have to take in what the ring holds."""
_ONE = np.array(1)  # adding a Python number takes twice as long


class LastSlots:
    """The slot of each member's last token, int64 [rows]: one up at every tick, unless a block starts."""

    def __init__(self) -> None:
        self.by_row = array("q")  # to set single slots, five times faster than in an ndarray
        self._all = np.frombuffer(self.by_row, np.int64)  # the same memory

    def reserve(self, rows: int) -> None:
        """Have room for that many rows, and keep what is written."""
        if rows > len(self.by_row):
            grown = array("q", bytes(8 * max(_MIN_ROWS, 2 * rows)))
            grown[: len(self.by_row)] = self.by_row
            self.by_row = grown
            self._all = np.frombuffer(grown, np.int64)

    def advance(self) -> None:
        """Go on by a token in every row."""
        np.add(self._all, _ONE, self._all)

    def of(self, rows: Rows) -> NDArray[np.int64]:
        """Return the slots of `rows`, int64 [len(rows)], as a copy."""
        # take() needs half the time of an index
        return self._all[rows].copy() if isinstance(rows, slice) else self._all.take(rows)

    def advanced(self, rows: Rows) -> NDArray[np.int64]:
        """Go on by a token in every row, and return the slots of `rows`."""
        slots = self._all
        np.add(slots, _ONE, slots)
        return slots[rows].copy() if isinstance(rows, slice) else slots.take(rows)


class TokenRing:
    """Token ids, int32 [rows, columns]: a row for each member of a batch, a column for each step.

    A step writes one column at once; a member's ids are read as one slice of its row. When the columns run out, the
    latest `tokens_per_block` of them, in which are the ids of all blocks that are not full, are moved to the front;
    who needs others has to read them before. There are twice as many columns then, until there are enough.

    named  the latest steps without interruption whose ids are here
    left   columns that can be written before `rewind` has to be called
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.named = 0
        self._kept = tokens_per_block
        self.left = 2 * tokens_per_block
        self._keep(np.zeros((0, self.left), dtype=np.int32))

    def _keep(self, ids: NDArray[np.int32]) -> None:
        self._ids = ids
        self._columns = [ids[:, column] for column in range(ids.shape[1])]  # views, quicker to write to
        # The same memory: bytes come out of it in half the time that an array takes.
        self._bytes: memoryview = ids.reshape(-1).view(np.uint8).data
        self._row_bytes = 4 * ids.shape[1]

    def reserve(self, rows: int) -> None:
        """Have room for that many rows, and keep what is written."""
        held, columns = self._ids.shape
        if rows > held:
            grown = np.zeros((max(_MIN_ROWS, 2 * rows), columns), dtype=np.int32)
            grown[:held] = self._ids
            self._keep(grown)

    def rewind(self) -> None:
        """Have columns to write again; keep the latest `tokens_per_block`."""
        kept, latest = self._kept, self._ids[:, -self._kept :]
        rows, columns = self._ids.shape
        if columns < kept + _STEPS:
            columns *= 2
            self._keep(np.zeros((rows, columns), dtype=np.int32))
        self._ids[:, :kept] = latest
        self.left = columns - kept
        self.named = min(self.named, kept)

    def write(self, rows: Rows, ids: NDArray[np.int32]) -> None:
        """Add a step's ids, one for each of `rows`. There must be a column left."""
        self._columns[-self.left][rows] = ids
        self.left -= 1
        self.named += 1

    def latest(self, row: int, count: int) -> bytes:
        """Return the ids that the latest `count` steps, at most `named`, wrote into a row, int32 each."""
        end = (row + 1) * self._row_bytes - 4 * self.left
        return self._bytes[end - 4 * count : end].tobytes()

    def blocks(self, rows: Iterable[int]) -> list[bytes]:
        """Return for each row the ids that the latest `tokens_per_block` steps wrote into it."""
        ids, width = self._bytes, self._row_bytes
        end = width - 4 * self.left
        begin = end - 4 * self._kept
        return [ids[row * width + begin : row * width + end].tobytes() for row in rows]
