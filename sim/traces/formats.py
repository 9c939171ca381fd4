"""What a trace format is: a name, how to know its files, and how to read a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sim.traces.fields import FieldError, Row, listed
from sim.traces.lines import csv_rows, json_objects, open_error
from sim.traces.trace import TraceError

STREAMED_BYTES = 2**25
"""Text files beyond this size, 32 MiB, are not kept in memory."""

Rows = Iterator[tuple[int, "Row | FieldError"]]
"""(line number, what it says), or the error in its place, so that a reader may go on behind it."""


class TraceFormat(ABC):
    """One kind of file. A format reads rows; order, time scale and request ids are the same for all."""

    name: ClassVar[str]
    """What `format=` calls it."""
    describes: ClassVar[str]
    """A few words on where such files come from, and what else is not said by what they must hold."""
    arrival_field: str
    """Field that holds the arrival time, for messages."""
    from_first_arrival: ClassVar[bool] = True
    """Whether time 0 of the trace is its first arrival; else the file's own 0."""
    keys_are_rows: ClassVar[bool] = False
    """Whether the keys of its rows are their places in the file, from 0, and its lines count from 1."""

    @classmethod
    def explained(cls) -> str:
        """Return, in one paragraph, where such files come from and what they must and may hold."""
        return cls.describes

    @abstractmethod
    def rows(self, path: Path) -> Rows:
        """Yield each row of the file. Raises TraceError for what makes the file as a whole unreadable."""

    def is_large(self, path: Path) -> bool:
        """Return whether the file's requests are too many to be kept in memory. Raises TraceError."""
        try:
            return path.stat().st_size > STREAMED_BYTES
        except OSError as error:
            raise open_error(path, error) from None


class JsonLinesFormat(TraceFormat):
    """A format with one JSON object a line."""

    keys: ClassVar[frozenset[str]]
    """Any of these in the first object marks the format."""
    needs: ClassVar[Mapping[str, str]]
    """Keys that every object must have, and what they hold."""
    takes: ClassVar[Mapping[str, str]] = {}
    """Keys that are read where they are there."""

    @classmethod
    def explained(cls) -> str:
        def held(keys: Mapping[str, str]) -> str:
            return ", ".join(f"{key} ({what})" for key, what in keys.items())

        optional = f"; if it is there, {held(cls.takes)}" if cls.takes else ""
        return f"{cls.describes}: JSON Lines with {held(cls.needs)}{optional}"

    @abstractmethod
    def parse(self, record: dict[str, Any]) -> Row:
        """Read one object. Raises FieldError."""

    def rows(self, path: Path) -> Rows:
        for line, record in json_objects(path):
            if isinstance(record, FieldError):
                yield line, record
                continue
            try:
                yield line, self.parse(record)
            except FieldError as error:
                yield line, error


class CsvFormat(TraceFormat):
    """A format with one row a line and a header that names the columns, in any order."""

    columns: Sequence[str]
    """Columns that a file must have."""
    marks: ClassVar[frozenset[str]]
    """Any of these in the header marks the format."""

    @abstractmethod
    def parse(self, values: Sequence[str]) -> Row:
        """Read one row, given the values of `columns` in that order. Raises FieldError."""

    def rows(self, path: Path) -> Rows:
        rows = csv_rows(path)
        try:
            line, header = next(rows)
        except StopIteration:
            return
        names = [name.strip() for name in header]
        places = []
        for column in self.columns:
            if names.count(column) != 1:
                how = "must not occur twice in" if column in names else "is missing in"
                raise TraceError(
                    f"{path}:{line}: field {column!r} {how} the header ({listed(names)}): "
                    f"the {self.name} format needs {', '.join(self.columns)}"
                )
            places.append(names.index(column))
        width = len(names)
        for line, values in rows:
            try:
                if len(values) != width:
                    raise self._wrong_width(names, values)
                yield line, self.parse([values[place] for place in places])
            except FieldError as error:
                yield line, error

    @staticmethod
    def _wrong_width(names: Sequence[str], values: Sequence[str]) -> FieldError:
        if len(values) < len(names):
            rule = f"is missing: the row has {len(values)} fields and must have {len(names)}"
            return FieldError(names[len(values)], rule)
        return FieldError(
            names[-1], f"must be the last: the row has {len(values)} fields and must have {len(names)}"
        )
