"""Exact sums and percentiles of very many integers that are known in few words.

An engine that takes a thousand identical decode steps at once leaves one row: the first duration, what each
step adds to it, and how many there were. Everything here works on such rows and never unfolds them, so ten
million steps cost what their rows cost, and the answers are the same integers as if each had been listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_CHUNK = 4096
_INT64_MAX = 2**63 - 1


def exact_sum(values: Ints) -> int:
    """Sum int64 values of any magnitude without overflow: high and low halves apart."""
    high, low = values >> 32, values & 0xFFFFFFFF
    return (int(high.sum()) << 32) + int(low.sum())


def exact_dot(left: Ints, right: Ints) -> int:
    """Return Σ left · right of non-negative int64 arrays [n], exactly, however large it gets."""
    total = 0
    for start in range(0, left.size, _CHUNK):
        a, b = left[start : start + _CHUNK], right[start : start + _CHUNK]
        if int(a.max()) * int(b.max()) * a.size <= _INT64_MAX:
            total += int(np.dot(a, b))  # integers: numpy's own loop, no BLAS, no rounding
        else:
            total += sum(map(mul, a.tolist(), b.tolist()))
    return total


def summary_of_values(
    values: Ints, scale: float, percents: Sequence[int] = (50, 90, 99)
) -> dict[str, float | None]:
    """Return what `Progressions.plain(values).summary(scale, percents)` does, in less memory; reorders `values`."""
    count = values.size
    if not count:
        return dict.fromkeys(["mean", *(f"p{percent}" for percent in percents), "max"])
    if int(values.min()) < 0:
        raise ValueError(f"values ({int(values.min())}) must not be negative")
    found: dict[str, float | None] = {"mean": exact_sum(values) / count / scale}
    ranks = [-(-percent * count // 100) - 1 for percent in percents]
    values.partition(ranks)
    found.update(
        {f"p{percent}": int(values[rank]) / scale for percent, rank in zip(percents, ranks, strict=True)}
    )
    found["max"] = int(values.max()) / scale
    return found


@dataclass(frozen=True)
class Progressions:
    """A multiset of non-negative integers, written as weighted arithmetic progressions.

    Row i stands for first[i] + j · increment[i] for each j in [0, steps[i]), every one of them weight[i]
    times. All four are int64 [rows]; the weights of all numbers together must fit in 63 bits.
    """

    first: Ints
    increment: Ints
    steps: Ints
    weight: Ints

    @classmethod
    def of(cls, first: Ints, increment: Ints, steps: Ints, weight: Ints) -> Progressions:
        """Build from rows; those of no steps or no weight vanish, constant ones become a single step."""
        keep = (steps > 0) & (weight > 0)
        first, increment, steps, weight = first[keep], increment[keep], steps[keep], weight[keep]
        if first.size and int(first.min()) < 0:
            raise ValueError(f"first ({int(first.min())}) must not be negative")
        if increment.size and int(increment.min()) < 0:
            raise ValueError(f"increment ({int(increment.min())}) must not be negative")
        constant = (increment == 0) | (steps == 1)
        return cls(
            first=first,
            increment=np.where(constant, 1, increment),
            steps=np.where(constant, 1, steps),
            weight=np.where(constant, weight * steps, weight),
        )

    @classmethod
    def weighted(cls, values: Ints, weights: Ints) -> Progressions:
        """Build from values that count `weights` times each; weights of zero vanish."""
        ones = np.ones_like(values)
        return cls.of(values, ones, ones, weights)

    @classmethod
    def plain(cls, values: Ints) -> Progressions:
        """Build from values that count once each."""
        return cls.weighted(values, np.ones_like(values))

    @classmethod
    def joined(cls, parts: Sequence[Progressions]) -> Progressions:
        """Join multisets, at least one."""
        return cls(
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.increment for part in parts]),
            np.concatenate([part.steps for part in parts]),
            np.concatenate([part.weight for part in parts]),
        )

    @property
    def last(self) -> Ints:
        """The largest number of each row, int64 [rows]."""
        return self.first + (self.steps - 1) * self.increment

    def count(self) -> int:
        """How many numbers there are."""
        return exact_dot(self.steps, self.weight)

    def total(self) -> int:
        """Their sum."""
        twice = self.steps * (self.first + self.last)  # n · (a + l), never odd in both factors
        return exact_dot(twice, self.weight) // 2

    def mean(self) -> float | None:
        """Their mean, correctly rounded; None when there are none."""
        count = self.count()
        return self.total() / count if count else None

    def max(self) -> int | None:
        """The largest of them; None when there are none."""
        return int(self.last.max()) if self.first.size else None

    def count_at_most(self, limit: int) -> int:
        """How many of them are at most `limit`."""
        reached = np.clip((limit - self.first) // self.increment + 1, 0, self.steps)
        return exact_dot(reached, self.weight)

    def percentile(self, percent: int) -> int | None:
        """Return the nearest-rank percentile: the smallest x with at least percent % of the numbers ≤ x.

        Bisects on the value. A row that lies wholly beside the bracket is settled, and leaves with the others when
        they are half of all, so the work shrinks with the bracket: a few passes over the rows in all.
        """
        if not 0 < percent <= 100:
            raise ValueError(f"percent ({percent}) must be in 1..100")
        count = self.count()
        if not count:
            return None
        rank = -(-percent * count // 100)
        first, increment, steps, weight, last = (
            self.first,
            self.increment,
            self.steps,
            self.weight,
            self.last,
        )
        below = 0  # numbers ≤ low in rows that have left
        low, high = int(first.min()) - 1, int(last.max())  # invariant: count(≤ low) < rank ≤ count(≤ high)
        while high - low > 1:
            middle = (low + high) // 2
            reached = middle - first
            reached //= increment
            reached += 1
            np.clip(reached, 0, steps, out=reached)
            if below + int(np.dot(reached, weight)) >= rank:
                high = middle
            else:
                low = middle
            open_rows = (first <= high) & (last > low)
            if 2 * int(open_rows.sum()) <= open_rows.size:
                settled = last <= low
                below += int(np.dot(steps[settled], weight[settled]))
                first, increment, steps, weight, last = (
                    first[open_rows],
                    increment[open_rows],
                    steps[open_rows],
                    weight[open_rows],
                    last[open_rows],
                )
        return high

    def summary(self, scale: float, percents: Sequence[int] = (50, 90, 99)) -> dict[str, float | None]:
        """Return mean, p50, p90, p99 and max, each divided by `scale`; None throughout when empty."""
        mean, largest = self.mean(), self.max()
        found = {"mean": None if mean is None else mean / scale}
        for percent in percents:
            value = self.percentile(percent)
            found[f"p{percent}"] = None if value is None else value / scale
        found["max"] = None if largest is None else largest / scale
        return found


class Levels:
    """A multiset of weighted integers in the making, each value kept once: levels that a quantity comes back to."""

    def __init__(self) -> None:
        self._values: Ints = np.empty(0, np.int64)
        self._weights: Ints = np.empty(0, np.int64)

    def add(self, values: Ints, weights: Ints) -> None:
        """Add values, not negative, that count `weights` times each; all weights together must fit in 63 bits."""
        values = np.concatenate((self._values, values))
        weights = np.concatenate((self._weights, weights))
        order = np.argsort(values, kind="stable")
        values = values[order]
        starts = np.flatnonzero(np.diff(values, prepend=-1))
        self._values = values[starts]
        self._weights = np.add.reduceat(weights[order], starts) if starts.size else weights

    def progressions(self) -> Progressions:
        """Return them all."""
        return Progressions.weighted(self._values, self._weights)
