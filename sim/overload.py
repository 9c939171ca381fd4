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
    """Rates up to the last arrival, in requests a second, and how many waited then to be admitted.

    Where prefill and decode are apart, those that waited for a replica to decode on are among them.
    """

    arrivals_per_s: float
    finished_per_s: float
    waiting: int

    @classmethod
    def of(cls, result: RunResult, last_ps: int | None = None) -> Overload | None:
        """Return the overload of a run, None if there is none.

        last_ps  when the last request arrives by the trace, picoseconds: a turn of a session that had to wait lets
                 those behind it arrive later, and the last of them find no queue any more

        A run is overloaded if more requests wait at the last arrival than three quarters of the way there, and more
        then than halfway, and if those are not few. Latencies then say how long the run was, and little else.
        Requests that arrive all at once come at no rate.
        """
        done = finished_mask(result)

        def column(name: str) -> Ints:
            return int_column(result.requests, name)[done]

        def counts(times_ps: Ints, moments_ps: Sequence[int]) -> Ints:
            return np.array([np.count_nonzero(times_ps <= moment) for moment in moments_ps])

        arrivals = column("arrival_ps")  # one column at a time is in memory
        total = arrivals.size
        if not total:
            return None
        first, last = int(arrivals.min()), int(arrivals.max())
        if last_ps is not None and last_ps < last:
            last = last_ps
        moments = [first + (last - first) * quarters // 4 for quarters in (2, 3, 4)]
        arrived = counts(arrivals, moments)
        del arrivals
        waiting = arrived - counts(column("admit_ps"), moments)
        if result.prefill_replicas:
            begun = column("transfer_start_ps")
            moved = begun >= 0
            waiting += counts(column("first_token_ps")[moved], moments) - counts(begun[moved], moments)
        halfway, later, at_last = waiting.tolist()
        if (
            last <= first
            or not halfway < later < at_last
            or at_last < max(_FEWEST_WAITING, _LEAST_SHARE * total)
        ):
            return None
        seconds = (last - first) / PS_PER_S
        finished = int(counts(column("finish_ps"), [last])[0])
        return cls(int(arrived[-1]) / seconds, finished / seconds, at_last)
