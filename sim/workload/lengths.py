"""How long texts are: distributions of token counts, with those of published traces and datasets among them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class Lengths(ABC):
    """A distribution of lengths in tokens."""

    longest: int
    """Most tokens that are drawn."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return lengths, int64 [count]. Drawing twice n gives what drawing once 2 n gives."""


@dataclass(frozen=True)
class Lognormal(Lengths):
    """Lognormal lengths of a mean, with `sigma` the standard deviation of the logarithm, clipped to a range.

    mean  before clipping: that of a lognormal is exp(μ + σ² / 2)
    """

    mean: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        found: NDArray[np.int64] = np.clip(np.rint(drawn), self.shortest, self.longest).astype(np.int64)
        return found

    @classmethod
    def clipped(cls, mean: float, sigma: float, longest: int) -> Lognormal:
        """Return the distribution in 1..longest whose mean is right once it is clipped, found by bisection."""
        low, high = mean / 2, mean * 2
        for _ in range(60):
            middle = math.sqrt(low * high)
            if cls(middle, sigma, 1, longest).clipped_mean < mean:
                low = middle
            else:
                high = middle
        return cls(math.sqrt(low * high), sigma, 1, longest)

    @property
    def clipped_mean(self) -> float:
        """The mean after clipping: ∫ min(max(x, a), b) over a lognormal, in terms of the normal distribution Φ."""
        mu, sigma = math.log(self.mean) - self.sigma**2 / 2, self.sigma

        def below(bound: float, shift: float) -> float:
            return 0.5 * (1 + math.erf((math.log(bound) - mu - shift) / sigma / math.sqrt(2)))

        a, b = self.shortest, self.longest
        inside = self.mean * (below(b, sigma**2) - below(a, sigma**2))
        return a * below(a, 0) + inside + b * (1 - below(b, 0))


@dataclass(frozen=True)
class Quantiles(Lengths):
    """Lengths of which mean, median, 90th and 99th percentile are published: all four are met.

    Between two of the points (0, 1), (0.5, p50), (0.9, p90), (0.99, p99), (1, longest) the quantile function is
    low + (high − low) · t^γ, t from 0 to 1; the one γ for all is what makes the mean right. The longest goes on
    from the 99th percentile as steeply as it rose to there.
    """

    mean: float
    p50: int
    p90: int
    p99: int

    @property
    def longest(self) -> int:  # type: ignore[override]
        """Most tokens that are drawn."""
        steepness: float = (self.p99 / self.p90) ** (1 / 9)
        return math.ceil(self.p99 * steepness)

    @cached_property
    def gamma(self) -> float:
        """The exponent: the mean is Σ share · (low + (high − low) / (γ + 1)) over the four pieces."""
        points, shares = self._points, np.diff(_RANKS)
        return float(shares @ np.diff(points) / (self.mean - shares @ points[:-1])) - 1

    @property
    def _points(self) -> NDArray[np.float64]:
        return np.array([1, self.p50, self.p90, self.p99, self.longest], dtype=np.float64)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        rank, points = rng.random(count), self._points
        piece = np.searchsorted(_RANKS, rank, side="right") - 1
        part = (rank - _RANKS[piece]) / np.diff(_RANKS)[piece]
        drawn: NDArray[np.float64] = points[piece] + np.diff(points)[piece] * part**self.gamma
        return np.rint(drawn).astype(np.int64)


_RANKS = np.array([0.0, 0.5, 0.9, 0.99, 1.0])


@dataclass(frozen=True)
class Published:
    """Lengths of prompts and outputs as somebody published them; the two are drawn independently."""

    source: str
    prompt: Lengths
    output: Lengths


_PAGED = "Kwon et al., PagedAttention (SOSP 2023), section 6.1: means"
_AZURE = "Azure LLM inference trace 2023, Patel et al., Splitwise (ISCA 2024): mean, p50, p90, p99 of"

LENGTH_MODELS: dict[str, Published] = {
    # Means 161.31 / 337.99 and 19.31 / 58.45. The spread is not published: that of outputs follows from how many
    # requests the paper's figures batch, that of prompts is a guess (see experiments.memory_savings).
    "sharegpt": Published(
        f"{_PAGED} of the ShareGPT workload; lognormal up to 2,048 tokens",
        Lognormal.clipped(161.31, 1.0, 2048),
        Lognormal.clipped(337.99, 0.75, 2048),
    ),
    "alpaca": Published(
        f"{_PAGED} of the Alpaca workload; lognormal up to 2,048 tokens",
        Lognormal.clipped(19.31, 0.5, 2048),
        Lognormal.clipped(58.45, 0.9, 2048),
    ),
    "azure_code": Published(
        f"{_AZURE} the code trace", Quantiles(2048, 1469, 5188, 7436), Quantiles(28, 13, 55, 251)
    ),
    "azure_conversation": Published(
        f"{_AZURE} the conversation trace", Quantiles(1155, 1020, 2734, 4142), Quantiles(211, 129, 424, 601)
    ),
    "mooncake_conversation": Published(
        "Mooncake conversation trace, Qin et al. (FAST 2025): mean, p50, p90, p99",
        Quantiles(12035, 6909, 27367, 85400),
        Quantiles(343, 350, 597, 1119),
    ),
}
"""Length models by name, beside "lognormal", which takes its figures from the configuration."""
