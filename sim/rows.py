"""IntRows: a growing table of integers, a row at a time, in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from sim.stored import ColumnFiles

Table = NDArray[np.int64]
"""int64 [rows, columns]"""

_ROWS = 1024
"""Rows that are kept until they are packed: so few that their numbers are still in the processor's caches then."""
_FEWEST_ROWS = 256


def rows_kept(tables: int) -> int:
    """Return how many rows each of so many tables may keep as they came, so that all of them do not keep too many."""
    return max(_ROWS // tables, min(_ROWS, _FEWEST_ROWS))


class IntRows:
    """Rows of 64-bit integers, one for each of `names`.

    `append` takes a row as a tuple and costs what appending to a list costs; `pack`, to be called now and then,
    turns what has come together into arrays of 8 bytes a number, or writes it to `files`, if there are any.

    With `complete`, a row that is appended has `width` numbers only, from which, many rows at a time, that function
    makes those that `names` asks for.
    """

    def __init__(
        self,
        names: Sequence[str],
        files: ColumnFiles | None = None,
        *,
        width: int | None = None,
        complete: Callable[[Table], Table] | None = None,
    ) -> None:
        self.names = names
        self._files = files
        self._width = len(names) if width is None else width
        self._complete = complete
        self._rows: list[tuple[int, ...]] = []
        self._packed: list[Table] = []
        self._num_packed = 0
        self.append = self._rows.append

    def __len__(self) -> int:
        return self._num_packed + len(self._rows)

    def pack(self, at_least: int) -> None:
        """Pack the rows appended since, if there are that many."""
        rows, width = self._rows, self._width
        if len(rows) >= at_least:
            table = np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * width).reshape(-1, width)
            self._num_packed += len(rows)
            rows.clear()
            if self._complete is not None:
                table = self._complete(table)
            if self._files is None:
                self._packed.append(table)
            else:
                self._files.write(table)

    def columns(self) -> dict[str, NDArray[np.int64]]:
        """Return all rows kept in memory, a column int64 [rows] for each name, and keep them no longer."""
        self.pack(1)
        packed, self._packed = self._packed, []
        empty = np.empty((0, len(self.names)), dtype=np.int64)
        return {
            name: np.concatenate([part[:, column] for part in (empty, *packed)])
            for column, name in enumerate(self.names)
        }
