"""read_trace: find out what a file is, and read it."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from sim.request import PS_PER_S, Request
from sim.stream import RequestStream
from sim.traces.azure import AzureFormat
from sim.traces.bailian import BailianFormat
from sim.traces.burstgpt import BurstGptFormat
from sim.traces.csv_columns import CsvColumnsFormat
from sim.traces.fields import FieldError, listed
from sim.traces.formats import CsvFormat, JsonLinesFormat, TraceFormat
from sim.traces.lines import csv_rows, json_objects, open_error, require_regular
from sim.traces.mooncake import MooncakeFormat
from sim.traces.native import MAGIC, NativeFormat
from sim.traces.reading import ReadOptions, exact
from sim.traces.token_ids import TokenIdsFormat
from sim.traces.trace import Trace, TraceError
from sim.traces.walk import Walk

CSV_FORMATS: tuple[type[CsvFormat], ...] = (AzureFormat, BurstGptFormat)
# Bailian before Mooncake, which knows its files by fields that both have.
JSON_FORMATS: tuple[type[JsonLinesFormat], ...] = (BailianFormat, TokenIdsFormat, MooncakeFormat)
_ALL: tuple[type[TraceFormat], ...] = (*CSV_FORMATS, *JSON_FORMATS, CsvColumnsFormat, NativeFormat)
FORMATS: dict[str, type[TraceFormat]] = {kind.name: kind for kind in _ALL}
"""Every format by its name."""


KEPT_REQUESTS = 2**17
"""So many requests are kept in memory, however large the file is that they are the first of."""


def read_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    num_requests: int | None = None,
    start_request: int = 0,
    start_s: float = 0.0,
    end_s: float | None = None,
    time_scale: float = 1.0,
    rate: float | None = None,
    skip_bad: bool = False,
    stream: bool | None = None,
) -> Trace:
    """Read a trace file of any known format, or a part of it.

    format      name of the format (see FORMATS); default: told from the content
    columns     for the "csv" format, which column is what: "arrival=NAME,prompt=NAME,output=NAME" or a mapping;
                given, it also chooses that format
    num_requests, start_request, start_s, end_s, time_scale, rate, skip_bad
                see ReadOptions; the malformed rows that were left out are counted in `Trace.skipped`
    stream      whether to read the requests anew from the file each time they are walked through, instead of
                keeping them; default: if the file is large, and not just some beginning of it is wanted

    Arrivals count from the first request's, except in native files read from their beginning, which are taken as
    written. They must not decrease. A row without prompt or output tokens is malformed: nothing could be replayed.
    A session's turn whose parent is not in the trace (left out, or from before it) has none. A part is cut out
    before times are scaled; start_s and end_s count from the first arrival, in native files from their time 0.

    The whole part is read and checked before this returns, streamed or not. A format with sessions of its own
    (Bailian) takes memory for each request even then: the number that its later turns call it.

    Raises TraceError, one line with file, line and field, when the file is malformed, and ValueError when an
    argument is.
    """
    options = ReadOptions(
        format=format,
        columns=None if columns is None or isinstance(columns, Mapping) else columns,
        num_requests=num_requests,
        start_request=start_request,
        start_s=start_s,
        end_s=end_s,
        time_scale=time_scale,
        rate=rate,
        skip_bad=skip_bad,
    )
    file = Path(path)
    require_regular(file)
    kind = _choose(file, format, columns)
    scale = exact(time_scale) if rate is None else _scale_to(rate, Walk(file, kind, options))
    walk = Walk(file, kind, options, scale)
    sha256 = _sha256(file)
    if stream is None:
        stream = kind.is_large(file) and (num_requests is None or num_requests > KEPT_REQUESTS)
    if stream:
        requests: Collection[Request] = _stream(file, kind, options, scale, walk)
    else:
        requests = list(walk)
    return Trace(file.stem, kind.name, sha256, requests, walk.skipped)


def _stream(
    file: Path, kind: TraceFormat, options: ReadOptions, scale: Fraction, survey: Walk
) -> RequestStream:
    """Return the requests as a stream, all of them having been checked on a first walk."""
    count, span_ps, named = survey.survey()
    return RequestStream(lambda: iter(Walk(file, kind, options, scale)), count, span_ps, named)


def _scale_to(rate: float, walk: Walk) -> Fraction:
    """Return the factor on times that brings the requests to `rate` requests/s: one over their mean gap."""
    count, first_ps, last_ps = 0, 0, 0
    for count, last_ps in enumerate(walk.arrivals_ps(), start=1):
        if count == 1:
            first_ps = last_ps
    if last_ps == first_ps:
        raise TraceError(f"{walk.path}: must hold requests at two times at least to be brought to a rate")
    return Fraction(PS_PER_S * (count - 1), last_ps - first_ps) / exact(rate)


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
            f"{path}:{line}: keys ({listed(record)}) must be those of one of "
            + _known({kind.name: kind.needs for kind in JSON_FORMATS})
        )
    raise TraceError(f"{path}: must hold at least one request")


def _first_csv(path: Path) -> TraceFormat:
    for line, header in csv_rows(path):
        names = [name.strip() for name in header]
        for kind in CSV_FORMATS:
            if kind.marks & set(names):
                return kind()
        raise TraceError(
            f"{path}:{line}: header ({listed(names)}) must be that of one of "
            + _known({kind.name: kind.columns for kind in CSV_FORMATS})
            + ", or columns be named: arrival=NAME,prompt=NAME,output=NAME"
        )
    raise TraceError(f"{path}: must hold at least one request, but is empty")


def _known(needs: Mapping[str, Iterable[str]]) -> str:
    return ", ".join(f"{name} ({', '.join(fields)})" for name, fields in needs.items())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise open_error(path, error) from None
