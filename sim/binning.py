"""Quantities over time, as a figure draws them: their means in bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.metrics import int_column
from sim.records import Columns

Floats = NDArray[np.float64]


def binned(rows: Columns, values: Floats, idle: Floats | float, edges: Floats) -> Floats:
    """Return the time-weighted mean of a row-wise constant quantity in each bin between `edges` (ps).

    `idle` is its value in the gap before each row: one number, or one a row.
    """
    starts, ends = (int_column(rows, name).astype(np.float64) for name in ("start_ps", "end_ps"))
    before = np.concatenate(([0.0], ends[:-1]))
    area = np.empty(2 * values.size + 1)
    area[0] = 0.0
    area[1::2] = (starts - before) * idle
    area[2::2] = (ends - starts) * values
    moments = np.empty_like(area)
    moments[0], moments[1::2], moments[2::2] = 0.0, starts, ends
    means: Floats = np.diff(np.interp(edges, moments, np.cumsum(area))) / np.diff(edges)
    return means
