"""Any CSV file with a header, once its columns are named."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sim.traces.fields import (
    PS_PER_MS,
    PS_PER_NS,
    PS_PER_S,
    PS_PER_US,
    FieldError,
    Row,
    number_ps,
    timestamp_ps,
    tokens,
    whole,
)
from sim.traces.formats import CsvFormat

_ARRIVALS = {
    "arrival": PS_PER_S,
    "arrival_ms": PS_PER_MS,
    "arrival_us": PS_PER_US,
    "arrival_ns": PS_PER_NS,
}
_OPTIONAL = ("priority",)


class CsvColumnsFormat(CsvFormat):
    """CSV whose columns the caller names: arrival, prompt (tokens), output (tokens), and priority if there is one.

    `arrival` holds seconds, as a number, or timestamps (YYYY-MM-DD HH:MM:SS, T instead of the space, fraction and
    offset at will); the first row decides which, for all. `arrival_ms`, `arrival_us`, `arrival_ns` hold numbers
    of those units instead.
    """

    name = "csv"
    describes = "any CSV with a header; say which columns: arrival=…,prompt=…,output=…"
    marks: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, columns: Mapping[str, str]) -> None:
        """Take the file's column for each role. Raises ValueError for a missing or an unknown role."""
        known = [*_ARRIVALS, "prompt", "output", *_OPTIONAL]
        for role in columns:
            if role not in known:
                close = difflib.get_close_matches(role, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"columns ({role!r}){hint} must be among {', '.join(known)}")
        arrivals = [role for role in _ARRIVALS if role in columns]
        if len(arrivals) != 1:
            raise ValueError(
                f"columns ({', '.join(columns)}) must name exactly one of {', '.join(_ARRIVALS)}"
            )
        for role in ("prompt", "output"):
            if role not in columns:
                raise ValueError(f"columns ({', '.join(columns)}) must name {role}")
        self._unit_ps = _ARRIVALS[arrivals[0]]
        self._may_be_timestamps: bool | None = None if arrivals[0] == "arrival" else False
        self.arrival_field = columns[arrivals[0]]
        self.columns = [self.arrival_field, columns["prompt"], columns["output"]]
        if "priority" in columns:
            self.columns.append(columns["priority"])

    @classmethod
    def from_text(cls, text: str) -> CsvColumnsFormat:
        """Read `arrival=NAME,prompt=NAME,output=NAME`. Raises ValueError where it is not of that form."""
        columns: dict[str, str] = {}
        for part in text.split(","):
            role, equals, name = (piece.strip() for piece in part.partition("="))
            if not (role and equals and name):
                raise ValueError(f"columns ({part!r}) must be ROLE=NAME pairs with commas between them")
            if role in columns:
                raise ValueError(f"columns ({text}) must name {role} once")
            columns[role] = name
        return cls(columns)

    def parse(self, values: Sequence[str]) -> Row:
        row = Row(
            self._arrival_ps(values[0]),
            tokens(self.columns[1], values[1]),
            tokens(self.columns[2], values[2]),
        )
        if len(values) > 3:
            row.priority = whole(self.columns[3], values[3])
            if abs(row.priority) >= 2**31:
                raise FieldError(self.columns[3], f"({row.priority}) must fit in 32 bits")
        return row

    def _arrival_ps(self, value: str) -> int:
        if self._may_be_timestamps is None:
            try:
                timestamp_ps(self.arrival_field, value)
                self._may_be_timestamps = True
            except FieldError:
                number_ps(self.arrival_field, value, self._unit_ps)
                self._may_be_timestamps = False
        if self._may_be_timestamps:
            return timestamp_ps(self.arrival_field, value)
        return number_ps(self.arrival_field, value, self._unit_ps)
