"""A warm-up leaves out what it should and nothing else: requests by number and time, steps by when they begin."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from engine_cases import LinearCost, Scenario, scenarios, unlike
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import BuildConfig
from sim.metrics import summarise
from sim.records import Columns
from sim.request import PS_PER_S
from sim.scheduler.config import EngineConfig
from sim.window import Window


def unfolded(rows: Columns) -> list[tuple[int, int, int, int]]:
    """Return (start, duration, inter-token gaps, running sequences) of each step of a timeline."""
    steps = []
    names = ("start_ps", "steps", "first_step_ps", "step_increment_ps", "itl_tokens", "running")
    for start, count, first, increment, tokens, running in zip(
        *(rows[name].tolist() for name in names), strict=True
    ):
        for step in range(count):
            steps.append((start, first + step * increment, tokens, running))
            start += steps[-1][1]
    return steps


@given(scenarios(), st.integers(0, 400), st.integers(0, 5))
def test_what_is_measured_is_what_begins_after_the_warm_up(scenario: Scenario, ps: int, first: int) -> None:
    result = scenario.run()
    engine = EngineConfig(warm_up_s=ps / PS_PER_S, warm_up_requests=first)
    window = Window.of(result, engine)
    cut = window.cut(result)
    arrivals = result.requests["arrival_ps"].tolist()
    counted = [row for row, at in enumerate(arrivals) if row >= first and at >= ps]
    assert cut.requests["request_id"].tolist() == counted
    late = arrivals[first:]
    start = max(ps, min(late)) if first and late else max(ps, max(arrivals)) if first else ps
    assert window.start_ps == start
    assert unfolded(cut.timeline) == [step for step in unfolded(result.timeline) if step[0] >= start]
    for name in ("end_ps", "kv_tokens", "logical_blocks"):  # of a stretch's end, which stays
        assert (
            cut.timeline[name].tolist()
            == result.timeline[name].tolist()[-len(cut.timeline[name]) :][: len(cut.timeline[name])]
        )
    rows = zip(cut.timeline["kv_tokens_first"].tolist(), cut.timeline["kv_tokens"].tolist(), strict=True)
    assert all(at_first <= at_last for at_first, at_last in rows)
    done = cut.requests["status"] == "finished"
    assert cut.cache.hit_blocks == int(cut.requests["hit_blocks"][done].sum())
    assert cut.cache.query_tokens == int(cut.requests["prompt_tokens"][done].sum())


@given(scenarios())
def test_no_warm_up_measures_all(scenario: Scenario) -> None:
    result = scenario.run()
    window = Window.of(result, EngineConfig())
    assert window.cut(result) is result
    counted = window.cut(dataclasses.replace(result))
    assert counted.cache == result.cache


def figures(**engine: Any) -> dict[str, Any]:
    """Return the summary of ten requests, one a second, each alone and done after 0.4 s."""
    requests = unlike(*((second * PS_PER_S, 4, 4) for second in range(10)))
    cost = LinearCost(base=PS_PER_S // 10)
    config = EngineConfig(**engine)
    scenario = Scenario(
        requests, BuildConfig(tokens_per_block=4, max_seq_len=16), 8, engine=config, cost=cost
    )
    return summarise(scenario.run(), config)


def test_a_run_small_enough_to_follow() -> None:
    whole, late, few = figures(), figures(warm_up_s=2.5), figures(warm_up_requests=3)
    assert (whole["requests"], late["requests"], few["requests"]) == (10, 7, 7)
    assert (whole["steps"], late["steps"], few["steps"]) == (40, 28, 28)
    assert [each["simulated_s"] for each in (whole, late, few)] == [9.4] * 3
    assert [each["measured_s"] for each in (whole, late, few)] == [9.4, 6.9, 6.4]
    assert late["throughput_tokens_per_s"] == pytest.approx(28 / 6.9)
    assert late["goodput"]["rate"] == pytest.approx(7 / 6.9)
    assert late["warm_up"] == {"requests": 3, "s": 2.5}
    assert few["warm_up"] == {"requests": 3, "s": 3.0}
    assert whole["warm_up"] == {"requests": 0, "s": 0.0}
    # busy for 0.4 s of each second
    assert late["kv_utilization"]["block"]["mean"] < whole["kv_utilization"]["block"]["mean"]
    middle = figures(warm_up_s=3.15)  # the request of second 3 is not counted; two of its steps are
    assert (middle["requests"], middle["steps"]) == (6, 2 + 24)


def test_a_warm_up_that_leaves_nothing() -> None:
    nothing = figures(warm_up_s=100.0)
    assert (nothing["requests"], nothing["steps"], nothing["measured_s"]) == (0, 0, 0.0)
    assert nothing["hit_rate_tokens"] is None
    assert nothing["ttft_s"]["mean"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warm_up_s": -1.0}, r"^warm_up_s \(-1.0\) must be in \[0, 1e\+06\]$"),
        ({"warm_up_s": float("nan")}, r"^warm_up_s \(nan\) must be in \[0, 1e\+06\]$"),
        ({"warm_up_requests": -1}, r"^warm_up_requests \(-1\) must be at least 0$"),
    ],
)
def test_impossible_warm_ups_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)


def test_the_window_of_an_empty_result_is_empty() -> None:
    result = Scenario(unlike((0, 1, 1)), BuildConfig(tokens_per_block=1, max_seq_len=4), 8).run()
    window = Window.of(result, EngineConfig(warm_up_requests=5))
    assert not window.counted.any()
    assert np.asarray(window.cut(result).requests["request_id"]).size == 0
