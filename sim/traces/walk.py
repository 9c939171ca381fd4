"""Walk: one way through a trace file, from its rows to the requests of the part that is wanted."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path

from sim.request import MAX_TIME_PS, PS_PER_S, Request
from sim.traces.fields import FieldError, Row
from sim.traces.formats import TraceFormat
from sim.traces.reading import ReadOptions, exact_ps
from sim.traces.trace import TraceError


class Walk:
    """Give rows their place in a trace: numbers, one clock, arrivals in order. Good for one walk.

    Iterating yields the requests and raises TraceError, naming the line, at the first malformed row; with
    `skip_bad` those are counted in `skipped` instead.
    """

    def __init__(
        self, path: Path, kind: TraceFormat, options: ReadOptions, scale: Fraction = Fraction(1)
    ) -> None:
        self.path = path
        self.skipped = 0
        self._first_bad = ""
        self._kind = copy.copy(kind)  # a format remembers what it has read
        self._options = options
        self._scale = None if scale == 1 else (scale.numerator, scale.denominator)
        self._ids: _Rows | _Keys = _Rows() if kind.keys_are_rows else _Keys()

    def arrivals_ps(self) -> Iterator[int]:
        """Yield the arrivals of the part, on the file's own clock."""
        for _, row in islice(self._part(), self._options.num_requests):
            yield row.arrival_ps

    def survey(self) -> tuple[int, int, bool]:
        """Check all requests; return their number, the last one's arrival, and whether any has content ids."""
        count, last_ps, named = 0, 0, False
        for _, row, last_ps, _, _ in self._numbered():  # noqa: B007 - the last is what is wanted
            count += 1
            named = named or row.named_tokens > 0
        return count, last_ps, named

    def __iter__(self) -> Iterator[Request]:
        for request_id, row, arrival_ps, think_ps, parent in self._numbered():
            yield Request(
                request_id=request_id,
                arrival_ps=arrival_ps,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                chunk_ids=row.chunk_ids,
                granularity=row.granularity,
                token_ids=row.token_ids,
                named_tokens=row.named_tokens,
                num_samples=row.num_samples,
                beam_width=row.beam_width,
                parent=parent,
                think_ps=think_ps,
                priority=row.priority,
                salt=row.salt,
            )

    def _numbered(self) -> Iterator[tuple[int, Row, int, int, int]]:
        """Yield (request id, row, arrival, time to think, parent) of each request, in the trace's own time."""
        ids, count, wanted = self._ids, 0, self._options.num_requests
        first_ps = None if self._kind.from_first_arrival or self._options.is_part else 0
        for line, row in self._part():
            start_ps = row.arrival_ps if first_ps is None else first_ps
            try:
                arrival_ps, think_ps = self._times(row, row.arrival_ps - start_ps)
            except FieldError as error:
                self._bad(line, error)
                continue
            first_ps = start_ps
            parent = -1 if row.parent_key is None else ids.find(row.parent_key)
            if row.key is not None:
                ids.add(row.key, count)
            yield count, row, arrival_ps, think_ps, parent
            count += 1
            if count == wanted:
                return
        if not count:
            where = " in the part that is read" if self._options.is_part else ""
            skipped = (
                f" ({self.skipped} malformed rows skipped, the first {self._first_bad})"
                if self.skipped
                else ""
            )
            raise TraceError(f"{self.path}: must hold at least one request{where}{skipped}")

    def _part(self) -> Iterator[tuple[int, Row]]:
        """Yield (line, row) in order of arrival from the first request that is wanted up to `end_s`."""
        options, kind = self._options, self._kind
        before, start_ps = options.start_request, exact_ps(options.start_s)
        end_ps = None if options.end_s is None else exact_ps(options.end_s)
        zero_ps = None if kind.from_first_arrival else 0
        last_ps: int | None = None
        for line, row in kind.rows(self.path):
            if isinstance(row, FieldError):
                self._bad(line, row)
                continue
            arrival_ps = row.arrival_ps
            if last_ps is not None and arrival_ps < last_ps:
                behind = (last_ps - arrival_ps) / PS_PER_S
                rule = f"({behind:g} s before the row above) must not decrease"
                self._bad(line, FieldError(kind.arrival_field, rule))
                continue
            last_ps = arrival_ps
            if zero_ps is None:
                zero_ps = arrival_ps
            if end_ps is not None and arrival_ps - zero_ps >= end_ps:
                return
            if before or arrival_ps - zero_ps < start_ps:
                before = max(before - 1, 0)
                self._ids.leave_out(line)
            else:
                yield line, row

    def _bad(self, line: int, error: FieldError) -> None:
        if not self._options.skip_bad:
            raise TraceError(f"{self.path}:{line}: {error}")
        if not self.skipped:
            self._first_bad = f"in line {line}: {error}"
        self.skipped += 1
        self._ids.leave_out(line)

    def _times(self, row: Row, arrival_ps: int) -> tuple[int, int]:
        """Return a row's arrival and time to think, scaled. Raises FieldError where they are off the clock."""
        think_ps = row.think_ps
        if self._scale is not None:
            numerator, denominator = self._scale
            arrival_ps = arrival_ps * numerator // denominator
            think_ps = think_ps * numerator // denominator
        if arrival_ps > MAX_TIME_PS:
            rule = f"({_days(arrival_ps)} after the start) must be within {_days(MAX_TIME_PS)} of it"
            raise FieldError(self._kind.arrival_field, rule)
        if think_ps > MAX_TIME_PS:
            raise FieldError("think_ps", f"({_days(think_ps)}) must be within {_days(MAX_TIME_PS)}")
        return arrival_ps, think_ps


class _Keys:
    """Request ids by the key that the file gives each of its requests."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    def add(self, key: int, request_id: int) -> None:
        """Note the next request's key."""
        self._ids[key] = request_id

    def leave_out(self, line: int) -> None:
        """Note that a line made no request."""

    def find(self, key: int) -> int:
        """Return the request id of a key, -1 if no request had it."""
        return self._ids.get(key, -1)


class _Rows:
    """Request ids by row, from 0: what was left out is all that has to be remembered, and that is little."""

    def __init__(self) -> None:
        self._first = -1  # row of request 0
        self._left_out: list[int] = []  # rows after it that made no request, ascending

    def add(self, key: int, request_id: int) -> None:
        """Note the next request's row."""
        if self._first < 0:
            self._first = key

    def leave_out(self, line: int) -> None:
        """Note that a line (row + 1) made no request."""
        if self._first >= 0:
            self._left_out.append(line - 1)

    def find(self, key: int) -> int:
        """Return the request id of a row, -1 if it made no request."""
        gone = bisect_left(self._left_out, key)
        if key < self._first or self._first < 0 or self._left_out[gone : gone + 1] == [key]:
            return -1
        return key - self._first - gone


def _days(time_ps: int) -> str:
    """Return a time as text; one that was scaled may be far beyond what a float holds."""
    days = Decimal(time_ps) / (86400 * PS_PER_S)
    return f"{days:.1f} days" if days < 10**9 else f"{days:.3e} days"
