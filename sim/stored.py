"""Records on disk: columns of integers in files, for runs whose records do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_CHUNK = 1 << 18
"""Rows that are read at once."""
_BINS = 1 << 16


class ColumnFiles:
    """A file of int64 for each of `names` in a folder, written a few rows at a time."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Create the folder and empty files. Raises OSError where that cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.names = tuple(names)
        self.count = 0
        self._files: list[BinaryIO] = [(folder / name).open("wb") for name in names]

    def write(self, rows: Ints) -> None:
        """Append rows, int64 [rows, len(names)]."""
        self.count += len(rows)
        for column, file in enumerate(self._files):
            file.write(np.ascontiguousarray(rows[:, column]).tobytes())

    def close(self) -> None:
        """Finish writing."""
        for file in self._files:
            file.close()

    def sort_by(self, name: str) -> None:
        """Put the rows, of a closed table, in the order of a column that holds 0 … count − 1, each once."""
        places = self._whole(name)
        for each in self.names:
            values = self._whole(each)
            ordered = np.empty_like(values)
            ordered[places] = values
            ordered.tofile(self.folder / each)

    def _whole(self, name: str) -> Ints:
        return np.fromfile(self.folder / name, np.int64)

    def part(self, name: str, first: int, last: int) -> Ints:
        """Return rows first … last − 1 of a column of a closed table."""
        return np.fromfile(self.folder / name, np.int64, last - first, offset=8 * first)


class StoredColumns(Mapping[str, NDArray[np.generic]]):
    """Columns that are read from files each time somebody asks for one.

    names    the columns, in order
    labels   columns of text: the column of codes that stands for it, and the text of each code
    """

    def __init__(
        self,
        files: ColumnFiles,
        names: Sequence[str],
        labels: Mapping[str, tuple[str, list[str]]] | None = None,
    ) -> None:
        self._files = files
        self._names = tuple(names)
        self._labels = dict(labels or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_rows(self) -> int:
        """Return how many rows there are."""
        return self._files.count

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        return self.part(name, 0, self.num_rows)

    def part(self, name: str, first: int, last: int) -> NDArray[np.generic]:
        """Return rows first … last − 1 of a column."""
        if name not in self._names:
            raise KeyError(name)
        if name not in self._labels:
            return self._files.part(name, first, last)
        code, texts = self._labels[name]
        found: NDArray[np.generic] = np.array(texts, dtype=np.str_)[self._files.part(code, first, last)]
        return found

    def parts(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        """Yield all columns, some rows at a time."""
        for first in range(0, self.num_rows, _CHUNK):
            last = min(first + _CHUNK, self.num_rows)
            yield {name: self.part(name, first, last) for name in self._names}

    def equals(self, name: str, text: str) -> NDArray[np.bool_]:
        """Return where a column of text says `text`, bool [rows]."""
        code, texts = self._labels[name]
        says = np.array([each == text for each in texts], dtype=np.bool_)
        found: NDArray[np.bool_] = says[self._files.part(code, 0, self.num_rows)]
        return found

    def counts(self, name: str) -> dict[str, int]:
        """Return how many rows of a column of text say what."""
        code, texts = self._labels[name]
        found = np.zeros(len(texts), dtype=np.int64)
        for first in range(0, self.num_rows, _CHUNK):
            part = self._files.part(code, first, min(first + _CHUNK, self.num_rows))
            found += np.bincount(part, minlength=len(texts))
        totals = dict.fromkeys(texts, 0)
        for text, count in zip(texts, found.tolist(), strict=True):
            totals[text] += count
        return totals


def counts_at_most(values: Ints, weights: Ints, limits: Sequence[int]) -> list[int]:
    """Return how many values, each counting `weights` times, are at most as large as each of ascending limits."""
    # the first limit that is not below a value
    first = np.searchsorted(np.array(limits, dtype=np.int64), values)
    counts = np.zeros(len(limits) + 1, dtype=np.int64)
    np.add.at(counts, first, weights)
    return [int(count) for count in np.cumsum(counts[:-1])]


class StoredTimes:
    """Durations with weights, in the two columns of a table on disk."""

    def __init__(self, files: ColumnFiles) -> None:
        self._files = files

    def _parts(self) -> Iterator[tuple[Ints, Ints]]:
        values, weights = self._files.names
        for first in range(0, self._files.count, _CHUNK):
            last = min(first + _CHUNK, self._files.count)
            yield self._files.part(values, first, last), self._files.part(weights, first, last)

    def total(self) -> tuple[int, int]:
        """Return how many durations there are, and their sum, exactly."""
        count = total = 0
        for values, weights in self._parts():
            count += int(weights.sum())
            high, low = values >> 32, values & 0xFFFFFFFF
            total += (int((high * weights).sum()) << 32) + int((low * weights).sum())
        return count, total

    def counts_at_most(self, limits: Sequence[int]) -> list[int]:
        """Return how many durations are at most as long as each of ascending limits."""
        found = [counts_at_most(*part, limits) for part in self._parts()]
        return [sum(counts) for counts in zip(*found, strict=True)] or [0] * len(limits)

    def at_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Return the values at these ranks, from 1, of all in ascending order.

        Each pass over the file counts what lies in each of a number of equal intervals, and goes on with the one
        in which the rank lies, until an interval is a single value: exact, with the memory of one chunk.
        """
        low = min(int(values.min()) for values, _ in self._parts())
        high = max(int(values.max()) for values, _ in self._parts())
        return [self._at_rank(rank, low, high) for rank in ranks]

    def _at_rank(self, rank: int, low: int, high: int) -> int:
        while low < high:
            width = -(-(high - low + 1) // _BINS)
            counts = np.zeros(_BINS)  # of integers: floats hold them exactly up to 2⁵³
            for values, weights in self._parts():
                inside = (values >= low) & (values <= high)
                bins = (values[inside] - low) // width
                counts += np.bincount(bins, weights[inside], minlength=_BINS)
            upto = np.cumsum(counts.astype(np.int64))
            found = int(np.searchsorted(upto, rank))
            rank -= int(upto[found - 1]) if found else 0
            low, high = low + found * width, min(high, low + (found + 1) * width - 1)
        return low

    def summary(self, scale: float, percents: Sequence[int] = (50, 90, 99)) -> dict[str, float | None]:
        """Return mean, percentiles (nearest rank) and max, each divided by `scale`; None of nothing."""
        count, total = self.total()
        if not count:
            return dict.fromkeys(["mean", *(f"p{percent}" for percent in percents), "max"])
        values = self.at_ranks([-(-percent * count // 100) for percent in percents] + [count])
        names = [f"p{percent}" for percent in percents] + ["max"]
        found: dict[str, float | None] = {"mean": total / count / scale}
        found.update({name: value / scale for name, value in zip(names, values, strict=True)})
        return found
