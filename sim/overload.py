"""Overload: requests that come faster than they are served, so that the queue grows for as long as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.distributions import Ints
from sim.metrics import int_column
from sim.records import RunResult, finished_mask
from sim.request import PS_PER_S

_FEWEST_WAITING = 10
_LEAST_SHARE = 0.02
"""Of all requests: fewer that wait when the last one arrives are a burst, not a trend."""


@dataclass(frozen=True)
class Overload:
    """Rates up to the last arrival, in requests a second, and how many waited then to be admitted."""

    arrivals_per_s: float
    finished_per_s: float
    waiting: int

    @classmethod
    def of(cls, result: RunResult) -> Overload | None:
        """Return the overload of a run, None if there is none.

        A run is overloaded if more requests wait at the last arrival than three quarters of the way there, and more
        then than halfway, and if those are not few. Latencies then say how long the run was, and little else.
        Requests that arrive all at once come at no rate.
        """
        done = finished_mask(result)

        def column(name: str) -> Ints:
            return int_column(result.requests, name)[done]

        def counts(times_ps: Ints, moments_ps: Sequence[int]) -> list[int]:
            return [int(np.count_nonzero(times_ps <= moment)) for moment in moments_ps]

        arrivals = column("arrival_ps")  # one column at a time is in memory
        total = arrivals.size
        if not total:
            return None
        first, last = int(arrivals.min()), int(arrivals.max())
        moments = [first + (last - first) * quarters // 4 for quarters in (2, 3, 4)]
        arrived = counts(arrivals, moments)
        del arrivals
        admitted = counts(column("admit_ps"), moments)
        halfway, later, at_last = (one - other for one, other in zip(arrived, admitted, strict=True))
        if (
            last == first
            or not halfway < later < at_last
            or at_last < max(_FEWEST_WAITING, _LEAST_SHARE * total)
        ):
            return None
        seconds = (last - first) / PS_PER_S
        (finished,) = counts(column("finish_ps"), [last])
        return cls(total / seconds, finished / seconds, at_last)
