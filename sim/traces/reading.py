"""ReadOptions: which part of a trace file is read, and at what pace its requests arrive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from allocator.field_docs import with_field_docs
from sim.request import PS_PER_S


@with_field_docs
@dataclass(frozen=True)
class ReadOptions:
    """How a trace file is read: the same options wherever one is.

    A part of a trace is a trace of its own: its time begins with its first request, and a session's turn whose
    predecessor is outside has none.

    Raises ValueError on a broken rule.
    """

    format: str | None = None
    """azure, burstgpt, mooncake, bailian, sharegpt, csv or native; None to tell it from the content."""
    columns: str | None = None
    """For any other CSV, which column is what: arrival=NAME,prompt=NAME,output=NAME. Arrivals are seconds or
    timestamps; arrival_ms=NAME, arrival_us=NAME, arrival_ns=NAME for other units."""
    num_requests: int | None = None
    """Requests: the first so many, of the part that is read; None for all."""
    start_request: int = 0
    """Leave out so many requests at the beginning."""
    start_s: float = 0.0
    """Leave out the requests that arrive before so many seconds of the trace's own time."""
    end_s: float | None = None
    """Leave out the requests that arrive after so many seconds of the trace's own time, or just then; None for none."""
    time_scale: float = 1.0
    """Factor on all times, those to think included: 0.5 doubles the request rate."""
    rate: float | None = None
    """Requests/s on average: chooses the time_scale that gives so many; None leaves the rate as it is."""
    skip_bad: bool = False
    """Leave malformed rows out and count them, instead of stopping at the first. A row that is earlier than the last
    one kept counts as malformed: one time that is far too late takes all rows after it along."""

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise ValueError(f"num_requests ({self.num_requests}) must be at least 1")
        if self.start_request < 0:
            raise ValueError(f"start_request ({self.start_request}) must not be negative")
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise ValueError(f"start_s ({self.start_s}) must be a number of seconds, not negative")
        if self.end_s is not None and not (math.isfinite(self.end_s) and self.end_s > self.start_s):
            raise ValueError(f"end_s ({self.end_s}) must be after start_s ({self.start_s})")
        if not (math.isfinite(self.time_scale) and self.time_scale > 0):
            raise ValueError(f"time_scale ({self.time_scale}) must be a positive number")
        if self.rate is not None:
            if not (math.isfinite(self.rate) and self.rate > 0):
                raise ValueError(f"rate ({self.rate}) must be a positive number of requests/s")
            if self.time_scale != 1.0:
                raise ValueError(
                    f"rate ({self.rate}) must not be given with time_scale ({self.time_scale}), which it chooses"
                )

    @property
    def is_part(self) -> bool:
        """Whether requests at the beginning may be left out."""
        return self.start_request > 0 or self.start_s > 0


def exact(number: float) -> Fraction:
    """Return a number as it was meant: 0.1 as 1/10, not as the nearest binary fraction."""
    return Fraction(repr(float(number)))


def exact_ps(seconds: float) -> int:
    """Return seconds as picoseconds, a fraction of one rounded up: what is before them is before that."""
    return -(-exact(seconds) * PS_PER_S // 1)
