"""A yardstick for the machine: timings are only worth comparing where it takes about as long."""

from __future__ import annotations

import statistics
from time import perf_counter

_KEYS = 1_000_000


def yardstick() -> float:
    """Return the seconds that a million dictionary inserts and look-ups take."""
    start = perf_counter()
    table: dict[int, int] = {}
    for key in range(_KEYS):
        table[key * 7919] = key
    total = 0
    for key in range(_KEYS):
        total += table[key * 7919]
    return perf_counter() - start


def median_yardstick() -> float:
    """Return the median of three."""
    return statistics.median(yardstick() for _ in range(3))
