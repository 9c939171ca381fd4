"""Walk through a text trace line by line, CSV or JSON Lines, without ever losing the line number."""

from __future__ import annotations

import csv
import json
import stat
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from sim.traces.fields import BEYOND, FieldError, shown
from sim.traces.trace import TraceError

LONGEST_LINE = 2**26
"""Bytes of the longest line that is read, 64 MiB: what exceeds it is no trace."""


def open_error(path: Path, error: OSError) -> TraceError:
    """Return the error for a file that the operating system does not let be read."""
    return TraceError(f"{path}: cannot be read: {error.strerror or error}")


def require_regular(path: Path) -> None:
    """Raise TraceError for what is no regular file: a pipe can be read only once, and a trace is read twice."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise open_error(path, error) from None
    if not stat.S_ISREG(mode):
        raise TraceError(f"{path}: must be a regular file")


_OTHERS = (
    (b"\x1f\x8b", ", but looks like gzip"),
    (b"\x28\xb5\x2f\xfd", ", but looks like Zstandard"),
    (b"\xff\xfe", ", but looks like UTF-16"),
    (b"\xfe\xff", ", but looks like UTF-16"),
)
"""How files begin that somebody may take for text."""


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file. Raises TraceError for what is not text."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise TraceError(f"{path}:{number}: line must be at most {LONGEST_LINE} bytes long")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    looks = next(
                        (kind for start, kind in _OTHERS if number == 1 and raw.startswith(start)), ""
                    )
                    raise TraceError(
                        f"{path}:{number}: byte {error.start + 1} must be UTF-8 text{looks}"
                    ) from None
                if "\0" in text:
                    raise TraceError(f"{path}:{number}: must be text, but holds a NUL byte")
                yield number, text
    except OSError as error:
        raise open_error(path, error) from None


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of each row that is not blank, the header included."""
    current = 0

    def lines() -> Iterator[str]:
        nonlocal current
        for number, line in text_lines(path):
            current = number
            yield line

    try:
        for fields in csv.reader(lines(), strict=True):
            if fields:
                yield current, fields
    except csv.Error as error:
        rule = f"must be CSV: {error}"
        if "new-line character" in str(error):
            rule = "must end its lines in LF or CRLF, but holds a CR alone"
        raise TraceError(f"{path}:{current}: {rule}") from None


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | FieldError]]:
    """Yield (line number, object) of each line that is not blank; numbers with a fraction are Decimal.

    A line that is not one JSON object yields an error in its place.
    """
    for number, line in text_lines(path):
        if line.isspace():
            continue
        try:
            record = _decoded(line)
        except FieldError as error:
            yield number, error
            continue
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            yield number, LineError(f"must be one JSON object, but: {reason}")
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            yield number, LineError(f"({shown(line)}) must be one JSON object")


def _decoded(line: str) -> Any:
    """Return what a line of JSON says. Raises ValueError, FieldError if a key occurs twice, or RecursionError."""
    try:
        return _QUICK.decode(line)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\r" in line.strip():
            raise ValueError("lines must end in LF or CRLF, and a CR stands alone") from None
        raise
    except FieldError:
        raise
    except ValueError:  # an integer with more digits than Python reads: its field is to refuse it by name
        return _TOLERANT.decode(line)


def _unambiguous(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary. Raises FieldError if a key occurs twice: which of the values is meant?"""
    record = dict(members)
    if len(record) != len(members):
        counts = Counter(name for name, _ in members)
        raise FieldError(next(name for name in counts if counts[name] > 1), "must not occur twice")
    return record


def _int_or_beyond(text: str) -> int:
    """Return a JSON integer; if it has more digits than any field can have, another such, of the same sign."""
    if len(text) <= _READABLE_DIGITS:
        return int(text)
    return -BEYOND if text.startswith("-") else BEYOND


def _decimal_or_text(text: str) -> Decimal | str:
    """Return a JSON number, or its text if its exponent is beyond Decimal: its field then refuses it by name."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return text


_READABLE_DIGITS = 600
"""Digits that Python reads whatever its limit is set to (sys.set_int_max_str_digits)."""
_QUICK = json.JSONDecoder(parse_float=_decimal_or_text, object_pairs_hook=_unambiguous)
_TOLERANT = json.JSONDecoder(
    parse_float=_decimal_or_text, parse_int=_int_or_beyond, object_pairs_hook=_unambiguous
)


class LineError(FieldError):
    """A line of which no field can be told."""

    def __init__(self, problem: str) -> None:
        ValueError.__init__(self, f"line {problem}")
