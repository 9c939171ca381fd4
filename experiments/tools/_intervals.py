"""How far the mean of a few runs can be trusted: Student's 95% confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% quantiles of Student's t for 1 to 10 degrees of freedom (any table of the distribution)."""


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t.

    From a table for few degrees of freedom, else by expansion from the normal quantile (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.5), then right to three digits after the point.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95% confidence interval, None for a single value."""
    if len(values) < 2:
        return values[0], None
    return mean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
