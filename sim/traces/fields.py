"""Read one field of a trace's row: exact, checked, and with an error that names the field.

Every function takes the field's name and its value as the file has it, and raises FieldError when it is not what
the field must be. Times become integer picoseconds without passing through floating point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.request import MAX_TOKENS

PS_PER_S = 10**12
PS_PER_MS = 10**9
PS_PER_US = 10**6
PS_PER_NS = 10**3

_INTEGER = re.compile(r"[+-]?[0-9]+")
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,12}))?\s*(?:(Z|UTC)|([+-])(\d\d):?(\d\d))?"
)
_EPOCH = datetime(1970, 1, 1)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?([0-9]+))?")
_NOT_FINITE = re.compile(r"[+-]?(?:s?nan|inf|infinity)", re.IGNORECASE)
_MAX_DIGITS = 30
_MAX_EXPONENT_DIGITS = 9
BEYOND: int = 10**_MAX_DIGITS
"""The least integer that no field can hold."""


class FieldError(ValueError):
    """One field of one row is not what it must be; the reader adds the file and the line."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")


@dataclass(slots=True)
class Row:
    """One request as a format's file has it, before it is given its place in the trace."""

    arrival_ps: int
    """On the file's own clock, whatever its zero."""
    prompt_tokens: int
    output_tokens: int
    chunk_ids: NDArray[np.int64] | None = None
    granularity: int = 0
    token_ids: NDArray[np.int32] | None = None
    named_tokens: int = 0
    num_samples: int = 1
    beam_width: int = 1
    key: int | None = None
    """What later turns of its session call this request; None where the format has no sessions."""
    parent_key: int | None = None
    think_ps: int = 0
    priority: int = 0
    salt: str = ""


def shown(value: object) -> str:
    """Return a value as an error message shows it: on one line, and not too much of it."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def listed(names: Iterable[str]) -> str:
    """Return names as an error message shows them: on one line, what cannot be printed escaped, and not too many."""
    line = " ".join(", ".join(names).split())
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line[:101])
    return text if len(text) <= 100 else text[:97] + "..."


def whole(field: str, value: object) -> int:
    """Return an integer given as text or as a JSON number."""
    if isinstance(value, str):
        text = value.strip()
        if text.isdigit() and text.isascii() and len(text) <= _MAX_DIGITS:  # nearly always
            return int(text)
        if not text:
            raise FieldError(field, "is missing")
        if not _INTEGER.fullmatch(text):
            raise FieldError(field, f"({shown(value)}) must be an integer")
        value = int(text) if len(text) <= _MAX_DIGITS else BEYOND
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(field, f"({shown(value)}) must be an integer")
    if abs(value) >= BEYOND:
        raise FieldError(field, f"must have at most {_MAX_DIGITS} digits")
    return value


def tokens(field: str, value: object) -> int:
    """Return a number of tokens, 1 to MAX_TOKENS: a request without a prompt or an output is none."""
    count = whole(field, value)
    if count < 1:
        raise FieldError(field, f"({count}) must be at least 1")
    if count > MAX_TOKENS:
        raise FieldError(field, f"({count}) must be at most {MAX_TOKENS}")
    return count


def number_ps(field: str, value: object, unit_ps: int) -> int:
    """Return a time given as a decimal number (text or JSON) of units of `unit_ps` picoseconds, to the nearest."""
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit():
            return whole(field, text) * unit_ps
        value = _decimal(field, text)
    if isinstance(value, int):
        return whole(field, value) * unit_ps
    if not isinstance(value, Decimal):
        raise FieldError(field, f"({shown(value)}) must be a finite number")
    if value.adjusted() >= _MAX_DIGITS or len(value.as_tuple().digits) > _MAX_DIGITS:
        raise FieldError(field, f"({shown(value)}) must have at most {_MAX_DIGITS} digits")
    if value.adjusted() < -_MAX_DIGITS:  # nothing, but its exact ratio would fill the memory
        return 0
    top, bottom = value.as_integer_ratio()
    return (2 * top * unit_ps + bottom) // (2 * bottom)


def _decimal(field: str, text: str) -> Decimal:
    if found := _NUMBER.fullmatch(text):
        if len(found[1] or "") > _MAX_EXPONENT_DIGITS:  # Decimal itself gives up at 18
            raise FieldError(
                field, f"({shown(text)}) must have an exponent of at most {_MAX_EXPONENT_DIGITS} digits"
            )
        return Decimal(text)
    if not text:
        raise FieldError(field, "is missing")
    kind = "a finite number" if _NOT_FINITE.fullmatch(text) else "a number"
    raise FieldError(field, f"({shown(text)}) must be {kind}")


def timestamp_ps(field: str, value: str) -> int:
    """Return picoseconds since 1970 of `YYYY-MM-DD HH:MM:SS[.fraction][Z | ±HH:MM]`, up to twelve digits of it.

    A timestamp without an offset is taken as UTC.
    """
    found = _TIMESTAMP.fullmatch(value.strip())
    if not found:
        if not value.strip():
            raise FieldError(field, "is missing")
        raise FieldError(
            field, f"({shown(value)}) must be a timestamp, YYYY-MM-DD HH:MM:SS[.fraction][offset]"
        )
    date, time, fraction, _, sign, hours, minutes = found.groups()
    try:
        since = datetime.fromisoformat(f"{date} {time}") - _EPOCH
    except ValueError:
        raise FieldError(field, f"({shown(value)}) must be an existing date and time") from None
    seconds = since.days * 86400 + since.seconds
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            raise FieldError(field, f"({shown(value)}) must have an offset from UTC of at most 23:59")
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds -= offset if sign == "+" else -offset
    return seconds * PS_PER_S + int((fraction or "").ljust(12, "0"))


def required(record: Mapping[str, Any], field: str) -> Any:
    """Return a field of a JSON object that must have it."""
    try:
        value = record[field]
    except KeyError:
        raise FieldError(field, "is missing") from None
    if value is None:
        raise FieldError(field, "(null) must not be null")
    return value


def id_list(field: str, value: object, largest: int) -> list[int]:
    """Return a JSON list of integers, each in 0..largest."""
    if not isinstance(value, list):
        raise FieldError(field, f"({shown(value)}) must be a list")
    if value:
        if set(map(type, value)) != {int}:
            odd = next(item for item in value if type(item) is not int)
            raise FieldError(field, f"({shown(odd)}) must hold integers only")
        if min(value) < 0:
            raise FieldError(field, f"({shown(min(value))}) must hold no negative id")
        if max(value) > largest:
            raise FieldError(field, f"({shown(max(value))}) must hold no id above {largest}")
    return value


def chunk_ids(field: str, value: object, prompt_tokens: int, granularity: int) -> NDArray[np.int64]:
    """Return content ids, int64 [⌈prompt_tokens / granularity⌉]: as many as the prompt has chunks."""
    ids = id_list(field, value, 2**63 - 1)
    chunks = -(-prompt_tokens // granularity)
    if len(ids) != chunks:
        raise FieldError(
            field,
            f"({len(ids)} ids) must have {chunks} for {prompt_tokens} tokens in chunks of {granularity}",
        )
    return np.array(ids, dtype=np.int64)
