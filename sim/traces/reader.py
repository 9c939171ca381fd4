"""read_trace: find out what a file is, read it, and give its rows their place in a trace."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from sim.request import MAX_TIME_PS, Request
from sim.traces.azure import AzureFormat
from sim.traces.bailian import BailianFormat
from sim.traces.burstgpt import BurstGptFormat
from sim.traces.csv_columns import CsvColumnsFormat
from sim.traces.fields import PS_PER_S, FieldError, Row, listed
from sim.traces.formats import CsvFormat, JsonLinesFormat, TraceFormat
from sim.traces.lines import csv_rows, json_objects, open_error, require_regular
from sim.traces.mooncake import MooncakeFormat
from sim.traces.native import MAGIC, NativeFormat
from sim.traces.token_ids import TokenIdsFormat
from sim.traces.trace import Trace, TraceError

CSV_FORMATS: tuple[type[CsvFormat], ...] = (AzureFormat, BurstGptFormat)
# Bailian before Mooncake, which knows its files by fields that both have.
JSON_FORMATS: tuple[type[JsonLinesFormat], ...] = (BailianFormat, TokenIdsFormat, MooncakeFormat)
_ALL: tuple[type[TraceFormat], ...] = (*CSV_FORMATS, *JSON_FORMATS, CsvColumnsFormat, NativeFormat)
FORMATS: dict[str, type[TraceFormat]] = {kind.name: kind for kind in _ALL}
"""Every format by its name."""


def read_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    limit: int | None = None,
    time_scale: float = 1.0,
    skip_bad: bool = False,
) -> Trace:
    """Read a trace file of any known format.

    format      name of the format (see FORMATS); default: told from the content
    columns     for the "csv" format, which column is what: "arrival=NAME,prompt=NAME,output=NAME" or a mapping;
                given, it also chooses that format
    limit       read the first `limit` requests only
    time_scale  multiplies every time of the trace: 0.5 has requests arrive at twice the rate
    skip_bad    leave malformed rows out, and count them in `Trace.skipped`, instead of stopping at the first

    Arrivals count from the first request's, except in native files, which are read as written. They must not
    decrease. A row without prompt or output tokens is malformed: nothing could be replayed. A session's turn whose
    parent is not in the trace (left out, or from before it) has none.

    Raises TraceError, one line with file, line and field, when the file is malformed, and ValueError when an
    argument is.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1")
    if not (math.isfinite(time_scale) and time_scale > 0):
        raise ValueError(f"time_scale ({time_scale}) must be a positive number")
    file = Path(path)
    require_regular(file)
    kind = _choose(file, format, columns)
    builder = _Builder(kind, time_scale)
    for line, row in kind.rows(file):
        error = row if isinstance(row, FieldError) else builder.add(row)
        if error is not None:
            if not skip_bad:
                raise TraceError(f"{file}:{line}: {error}")
            builder.skipped += 1
        elif len(builder.requests) == limit:
            break
    if not builder.requests:
        skipped = f" ({builder.skipped} malformed rows skipped)" if builder.skipped else ""
        raise TraceError(f"{file}: must hold at least one request{skipped}")
    return Trace(file.stem, kind.name, _sha256(file), builder.requests, builder.skipped)


class _Builder:
    """Turn rows into requests: row numbers for keys, one clock, arrivals in order."""

    def __init__(self, kind: TraceFormat, time_scale: float) -> None:
        self.requests: list[Request] = []
        self.skipped = 0
        self._kind = kind
        # A decimal factor such as 0.1 is meant as 1/10, not as the nearest binary fraction.
        self._scale = None if time_scale == 1 else Fraction(repr(float(time_scale)))
        self._first_ps: int | None = None if kind.from_first_arrival else 0
        self._last_ps: int | None = None
        self._ids: dict[int, int] = {}

    def add(self, row: Row) -> FieldError | None:
        """Append a request, or return what is wrong with it."""
        field = self._kind.arrival_field
        if self._last_ps is not None and row.arrival_ps < self._last_ps:
            behind = (self._last_ps - row.arrival_ps) / PS_PER_S
            return FieldError(field, f"({behind:g} s before the row above) must not decrease")
        first_ps = row.arrival_ps if self._first_ps is None else self._first_ps
        arrival_ps = self._scaled(row.arrival_ps - first_ps)
        think_ps = self._scaled(row.think_ps)
        if arrival_ps > MAX_TIME_PS:
            return FieldError(
                field, f"({_days(arrival_ps)} after the start) must be within {_days(MAX_TIME_PS)} of it"
            )
        if think_ps > MAX_TIME_PS:
            return FieldError("think_ps", f"({_days(think_ps)}) must be within {_days(MAX_TIME_PS)}")
        request_id = len(self.requests)
        request = Request(
            request_id=request_id,
            arrival_ps=arrival_ps,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            chunk_ids=row.chunk_ids,
            granularity=row.granularity,
            token_ids=row.token_ids,
            named_tokens=row.named_tokens,
            num_samples=row.num_samples,
            parent=-1 if row.parent_key is None else self._ids.get(row.parent_key, -1),
            think_ps=think_ps,
            priority=row.priority,
            salt=row.salt,
        )
        if row.key is not None:
            self._ids[row.key] = request_id
        self._first_ps, self._last_ps = first_ps, row.arrival_ps
        self.requests.append(request)
        return None

    def _scaled(self, time_ps: int) -> int:
        if self._scale is None:
            return time_ps
        return time_ps * self._scale.numerator // self._scale.denominator


def _days(time_ps: int) -> str:
    """Return a time as text; one that was scaled may be far beyond what a float holds."""
    days = Decimal(time_ps) / (86400 * PS_PER_S)
    return f"{days:.1f} days" if days < 10**9 else f"{days:.3e} days"


def _choose(path: Path, format: str | None, columns: str | Mapping[str, str] | None) -> TraceFormat:
    """Return the format that was asked for, else the one that the file's beginning tells."""
    if format is not None and format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown trace format {format!r}{hint}: must be one of {', '.join(FORMATS)}")
    if columns is not None:
        if format not in (None, CsvColumnsFormat.name):
            raise ValueError(f"columns must not be given with format {format!r}, only with csv")
        return CsvColumnsFormat.from_text(columns) if isinstance(columns, str) else CsvColumnsFormat(columns)
    if format == CsvColumnsFormat.name:
        raise ValueError("format 'csv' needs columns: arrival=NAME,prompt=NAME,output=NAME")
    return FORMATS[format]() if format is not None else _detect(path)


def _detect(path: Path) -> TraceFormat:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise open_error(path, error) from None
    if head.startswith(MAGIC):
        return NativeFormat()
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return _first_json(path)
    return _first_csv(path)


def _first_json(path: Path) -> TraceFormat:
    for line, record in json_objects(path):
        if isinstance(record, FieldError):
            raise TraceError(f"{path}:{line}: {record}")
        for kind in JSON_FORMATS:
            if kind.keys & record.keys():
                return kind()
        raise TraceError(
            f"{path}:{line}: keys ({listed(record)}) must be those of one of {_known(JSON_FORMATS)}"
        )
    raise TraceError(f"{path}: must hold at least one request")


def _first_csv(path: Path) -> TraceFormat:
    for line, header in csv_rows(path):
        names = [name.strip() for name in header]
        for kind in CSV_FORMATS:
            if kind.marks & set(names):
                return kind()
        raise TraceError(
            f"{path}:{line}: header ({listed(names)}) must be that of one of {_known(CSV_FORMATS)}, "
            "or columns be named: arrival=NAME,prompt=NAME,output=NAME"
        )
    raise TraceError(f"{path}: must hold at least one request, but is empty")


def _known(kinds: tuple[type[TraceFormat], ...]) -> str:
    return ", ".join(kind.name for kind in kinds)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise open_error(path, error) from None
