"""Records on disk: columns of integers in files, for runs whose records do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_CHUNK = 1 << 18
"""Rows that are read at once."""
_BINS = 1 << 16


class ColumnFiles:
    """A file of int64 for each of `names` in a folder, written a few rows at a time, or a column at a time.

    None stays open: there may be many tables.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Create the folder and empty files. Raises OSError where that cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.names = tuple(names)
        self.count = 0
        for name in names:
            (folder / name).write_bytes(b"")

    def write(self, rows: Ints) -> None:
        """Append rows, int64 [rows, len(names)]."""
        self.count += len(rows)
        for column, name in enumerate(self.names):
            with (self.folder / name).open("ab") as file:
                file.write(np.ascontiguousarray(rows[:, column]).tobytes())

    def put(self, name: str, values: Ints) -> None:
        """Write a whole column, in place of what is there, or as a new one."""
        if name not in self.names:
            self.names = (*self.names, name)
        self.count = len(values)
        values.tofile(self.folder / name)

    def sort_by(self, name: str) -> None:
        """Put the rows in the order of a column, whose values are all different."""
        keys = self._whole(name)
        order: Ints | None = None  # of a permutation of 0 … count − 1, the keys are the places
        if len(keys) and int(keys.max()) != len(keys) - 1:
            order = np.argsort(keys)
            del keys
        for each in self.names:
            values = self._whole(each)
            if order is None:
                ordered = np.empty_like(values)
                ordered[keys] = values
            else:
                ordered = values[order]
            ordered.tofile(self.folder / each)

    def _whole(self, name: str) -> Ints:
        return np.fromfile(self.folder / name, np.int64)

    def part(self, name: str, first: int, last: int) -> Ints:
        """Return rows first … last − 1 of a column."""
        return np.fromfile(self.folder / name, np.int64, last - first, offset=8 * first)


def joined_files(parts: Sequence[ColumnFiles], places: Ints, folder: Path) -> ColumnFiles:
    """Return a table of the rows of several, alike in their columns.

    Row i of all, counted through the tables in their order, becomes row places[i]. Takes the memory of three columns.
    """
    found = ColumnFiles(folder, parts[0].names)
    for name in found.names:
        values, at = np.empty_like(places), 0
        for part in parts:
            for first in range(0, part.count, _CHUNK):
                piece = part.part(name, first, min(first + _CHUNK, part.count))
                values[places[at : at + len(piece)]] = piece
                at += len(piece)
        found.put(name, values)
    return found


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
        self.files = files
        self.labels = dict(labels or {})
        self._names = tuple(names)

    def with_columns(self, columns: Mapping[str, Ints]) -> StoredColumns:
        """Write more columns, or others in place of those of that name, and return them all."""
        for name, values in columns.items():
            self.files.put(name, values)
        return StoredColumns(self.files, list(dict.fromkeys([*self._names, *columns])), self.labels)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_rows(self) -> int:
        """Return how many rows there are."""
        return self.files.count

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        return self.part(name, 0, self.num_rows)

    def part(self, name: str, first: int, last: int) -> NDArray[np.generic]:
        """Return rows first … last − 1 of a column."""
        if name not in self._names:
            raise KeyError(name)
        if name not in self.labels:
            return self.files.part(name, first, last)
        code, texts = self.labels[name]
        found: NDArray[np.generic] = np.array(texts, dtype=np.str_)[self.files.part(code, first, last)]
        return found

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield first and last + 1 of so many rows at a time as should be in memory at once."""
        for first in range(0, self.num_rows, _CHUNK):
            yield first, min(first + _CHUNK, self.num_rows)

    def parts(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        """Yield all columns, some rows at a time."""
        for first, last in self.spans():
            yield {name: self.part(name, first, last) for name in self._names}

    def equals(self, name: str, text: str) -> NDArray[np.bool_]:
        """Return where a column of text says `text`, bool [rows]."""
        code, texts = self.labels[name]
        says = np.array([each == text for each in texts], dtype=np.bool_)
        found: NDArray[np.bool_] = says[self.files.part(code, 0, self.num_rows)]
        return found

    def counts(self, name: str) -> dict[str, int]:
        """Return how many rows of a column of text say what."""
        code, texts = self.labels[name]
        found = np.zeros(len(texts), dtype=np.int64)
        for first in range(0, self.num_rows, _CHUNK):
            part = self.files.part(code, first, min(first + _CHUNK, self.num_rows))
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
    """Durations with weights, in the two columns of tables on disk, of which there may be several."""

    def __init__(self, *tables: ColumnFiles) -> None:
        self.tables = tables

    def _parts(self) -> Iterator[tuple[Ints, Ints]]:
        for files in self.tables:
            values, weights = files.names
            for first in range(0, files.count, _CHUNK):
                last = min(first + _CHUNK, files.count)
                yield files.part(values, first, last), files.part(weights, first, last)

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
