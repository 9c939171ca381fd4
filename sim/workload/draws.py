"""All random numbers of a workload: one endless stream a kind of draw, each from a generator of its own.

Numbers are drawn by the thousand, as that is fast, and handed out one by one. A generator that makes one kind of
draw gives the same numbers however many are asked for at once, so a stream does not depend on the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.request import PS_PER_S
from sim.workload.config import WorkloadShape

_BATCH = 1024


class Draws:
    """The streams of one workload; each attribute is an endless iterator."""

    def __init__(self, shape: WorkloadShape) -> None:
        seeds = np.random.SeedSequence(shape.workload_seed).spawn(12)
        # A kind of draw keeps its place in this list: what is added goes to the end.
        (
            gaps,
            turns,
            system,
            user,
            output,
            think,
            sampling,
            with_system,
            documents,
            branching,
            periods,
            searching,
        ) = (np.random.default_rng(seed) for seed in seeds)
        self.turns = _stream(
            lambda count: np.minimum(turns.geometric(1 / shape.turns_mean, count), shape.turns_max)
        )
        """Turns of a session."""
        self.user = _stream(lambda count: shape.user_lengths.draw(user, count))
        """Tokens of a user's text."""
        self.output = _stream(lambda count: shape.output_lengths.draw(output, count))
        """Tokens of an output."""
        self.think_ps = _stream(
            lambda count: np.rint(think.exponential(shape.think_s_mean, count) * PS_PER_S).astype(np.int64)
        )
        """Picoseconds before a turn."""
        self.samples = _stream(
            lambda count: np.where(
                sampling.random(count) < shape.sampling_share, shape.samples_per_request, 1
            )
        )
        """Outputs that a request asks for."""
        self.beams = _stream(
            lambda count: np.where(searching.random(count) < shape.beam_share, shape.beams_per_request, 1)
        )
        """Beams of a request, if it asks for one output."""
        self.followers = _stream(
            lambda count: np.where(branching.random(count) < shape.branch_share, shape.branches, 1)
        )
        """Turns that want to follow a turn."""
        self.system_prompt = _system_prompts(shape, system, with_system)
        """The system prompt of a session, −1 for none."""
        self.documents = _documents(shape, documents)
        """The documents of a session, a list."""
        self.start_ps = _starts_ps(shape, gaps, periods)
        """When the next session begins, ascending from 0."""


def _stream(draw: Callable[[int], NDArray[Any]]) -> Iterator[Any]:
    while True:
        yield from draw(_BATCH).tolist()


def _system_prompts(
    shape: WorkloadShape, which: np.random.Generator, whether: np.random.Generator
) -> Iterator[int]:
    if not shape.system_prompts:
        while True:
            yield -1
    weights = np.arange(1, shape.system_prompts + 1, dtype=np.float64) ** -shape.system_prompt_zipf
    chosen = _stream(lambda count: which.choice(shape.system_prompts, size=count, p=weights / weights.sum()))
    present = _stream(lambda count: whether.random(count) < shape.system_prompt_share)
    for prompt, there in zip(chosen, present, strict=True):
        yield prompt if there else -1


def _documents(shape: WorkloadShape, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield the documents of each session, drawn one after the other without replacement.

    Successive draws in proportion to weights w are the order of Eᵢ / wᵢ with Eᵢ exponential, smallest first
    (Efraimidis and Spirakis, 2006); in logarithms, as weights may be tiny.
    """
    if not shape.documents:
        while True:
            yield []
    wanted = shape.documents_per_session
    log_rank = shape.document_zipf * np.log(np.arange(1, shape.documents + 1))
    while True:
        keys = np.log(rng.standard_exponential(shape.documents)) + log_rank
        first = np.argpartition(keys, wanted - 1)[:wanted]
        ordered = first[np.argsort(keys[first])] if shape.document_order == "drawn" else np.sort(first)
        yield ordered.tolist()


def session_gap_s(shape: WorkloadShape) -> float:
    """Return the mean time between sessions, seconds.

    Sessions come at requests_per_s divided by the mean number of turns: of a geometric distribution with
    parameter p cut off at m, (1 − (1 − p)^m) / p.
    """
    p = 1 / shape.turns_mean
    return float((1 - (1 - p) ** shape.turns_max) / p / shape.requests_per_s)


def _starts_ps(shape: WorkloadShape, rng: np.random.Generator, periods: np.random.Generator) -> Iterator[int]:
    """Yield when each session begins.

    on_off is an interrupted renewal process: gaps run on a clock that stands still while the source is off, and are
    shorter by the share of time that it is on. With arrival_cv 1 it is the interrupted Poisson process, whose gaps
    have a squared coefficient of variation of 1 + 2 λ ω₁ / (ω₁ + ω₂)², with λ the rate while on, and 1 / ω₁ and
    1 / ω₂ the mean times on and off (Kuczura, 1973).
    """
    mean_gap_s = session_gap_s(shape)
    on_off = shape.arrivals == "on_off"
    if on_off:
        mean_gap_s *= shape.on_s_mean / (shape.on_s_mean + shape.off_s_mean)
    if shape.arrival_cv == 0:
        gaps = _stream(lambda count: np.full(count, mean_gap_s))
    else:
        scale = shape.arrival_cv**2
        gaps = _stream(lambda count: rng.gamma(1 / scale, mean_gap_s * scale, count))
    times = _stream(periods.standard_exponential)
    next(gaps)  # the first session begins at 0
    now_ps = 0
    left_s = next(times) * shape.on_s_mean if on_off else math.inf
    yield 0
    for gap_s in gaps:
        wall_s = 0.0
        while gap_s > left_s:
            wall_s += left_s + next(times) * shape.off_s_mean
            gap_s -= left_s
            left_s = next(times) * shape.on_s_mean
        left_s -= gap_s
        now_ps += round((wall_s + gap_s) * PS_PER_S)
        yield now_ps
