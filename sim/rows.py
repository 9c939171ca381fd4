"""IntRows: a growing table of integers, a row at a time."""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

_ROWS = 8192


class IntRows:
    """Rows of `width` 64-bit integers each.

    `append` takes a row as a tuple and costs what appending to a list costs; `pack`, to be called now and then,
    turns what has come together into arrays of 8 bytes a number.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[tuple[int, ...]] = []
        self._packed: list[NDArray[np.int64]] = []
        self.append = self._rows.append

    def pack(self, at_least: int = _ROWS) -> None:
        """Pack the rows appended since, if there are that many."""
        rows = self._rows
        if len(rows) >= at_least:
            count = len(rows) * self._width
            flat = np.fromiter(chain.from_iterable(rows), np.int64, count)
            self._packed.append(flat.reshape(-1, self._width))
            rows.clear()

    def table(self) -> NDArray[np.int64]:
        """Return all rows, int64 [rows, width]."""
        self.pack(1)
        if len(self._packed) != 1:
            empty = np.empty((0, self._width), dtype=np.int64)
            self._packed = [np.concatenate([empty, *self._packed])]
        return self._packed[0]
