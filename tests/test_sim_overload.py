"""A run is said to be overloaded where queueing theory says that its queue grows without bound."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_cases import REQUEST_COLUMNS, NaiveEngine, columns

from sim.overload import Overload
from sim.records import RunResult
from sim.request import PS_PER_S


def queue(gaps_s: list[float], service_s: list[float]) -> RunResult:
    """Return the run of a server that serves one request after the other, in the order of arrival."""
    rows, free = [], 0
    for number, (arrival, service) in enumerate(zip(np.cumsum(gaps_s), service_s, strict=True)):
        arrival_ps = int(arrival * PS_PER_S)
        admit = max(arrival_ps, free)
        free = admit + int(service * PS_PER_S)
        times = {"arrival_ps": arrival_ps, "admit_ps": admit, "first_token_ps": free, "finish_ps": free}
        rows.append(dict.fromkeys(REQUEST_COLUMNS, 0) | times | {"request_id": number, "status": "finished"})
    return dataclasses.replace(NaiveEngine(0, 0).run(), requests=columns(rows, REQUEST_COLUMNS))


def poisson_queue(load: float, seed: int, requests: int = 2000) -> RunResult:
    """Return a run of an M/M/1 queue with one arrival a second on average."""
    rng = np.random.default_rng(seed)
    return queue(list(rng.exponential(1.0, requests)), list(rng.exponential(load, requests)))


@given(st.integers(0, 999), st.floats(1.5, 10))
def test_a_load_above_one_is_an_overload(seed: int, load: float) -> None:
    found = Overload.of(poisson_queue(load, seed))
    assert found is not None
    assert found.arrivals_per_s == pytest.approx(1, rel=0.15)
    # About 2000 / load finish by the last arrival, with a standard deviation of the root of that, and no more than
    # the root of twice that once the arrivals' own is added: six of them, as the seeds are many.
    finished = 2000 / load
    assert found.finished_per_s == pytest.approx(1 / load, rel=6 / finished**0.5)
    assert found.waiting == pytest.approx(2000 - finished, abs=6 * (2 * finished) ** 0.5)


@given(st.integers(0, 999), st.floats(0.1, 0.8))
def test_a_load_below_one_is_none(seed: int, load: float) -> None:
    assert Overload.of(poisson_queue(load, seed)) is None


def test_a_burst_that_is_over_is_none() -> None:
    """Half of the requests come within a moment, in the middle; at the end few are left."""
    assert Overload.of(queue([1.0] * 100 + [0.001] * 200 + [3.0] * 100, [0.9] * 400)) is None


@pytest.mark.parametrize("requests", [0, 1, 50])
def test_requests_that_come_all_at_once_come_at_no_rate(requests: int) -> None:
    assert Overload.of(queue([0.0] * requests, [1.0] * requests)) is None


def test_few_that_wait_are_no_trend() -> None:
    assert Overload.of(queue([1.0] * 12, [2.0] * 12)) is None
    assert Overload.of(queue([1.0] * 40, [2.0] * 40)) is not None
