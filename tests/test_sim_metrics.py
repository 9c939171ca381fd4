"""Metrics against a slow oracle that lists every step and every token, in exact fractions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_cases import NaiveEngine, results

from sim.distributions import Levels, Progressions, exact_dot, exact_sum
from sim.metrics import inter_token_gaps, summarise
from sim.records import RunResult
from sim.scheduler.config import EngineConfig

PS = 10**12
SUMMARY_KEYS = [
    "warm_up",
    "skipped_rows",
    "requests",
    "finished",
    "rejected",
    "overload",
    "simulated_s",
    "measured_s",
    "wall_s",
    "total_wall_s",
    "steps",
    "prompt_tokens",
    "output_tokens",
    "throughput_tokens_per_s",
    "ttft_s",
    "tpot_s",
    "itl_s",
    "e2e_s",
    "queue_s",
    "slo",
    "goodput",
    "hit_tokens",
    "hit_rate_tokens",
    "hit_rate_blocks",
    "infinite_cache_hit_rate_tokens",
    "infinite_cache_hit_rate_blocks",
    "computed_prompt_tokens",
    "miss_blocks",
    "evicted_blocks",
    "preemptions",
    "recomputed_tokens",
    "swapped_blocks",
    "host",
    "cow_copies",
    "cow_tokens",
    "kv_utilization",
    "internal_fragmentation",
    "sharing_saved_blocks",
    "out_of_block_steps",
    "block_lifetime_s",
    "block_idle_before_evict_s",
    "block_reuse_gap_s",
]


# ------------------------------------------------------------------ the oracle


def distribution(values: list) -> dict:
    """Mean, nearest-rank percentiles and maximum of listed numbers, in seconds."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    ordered = sorted(values)
    found = {"mean": Fraction(sum(ordered), 1) / len(ordered) / PS, "max": Fraction(ordered[-1]) / PS}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = Fraction(ordered[math.ceil(Fraction(percent * len(ordered), 100)) - 1]) / PS
    return found


def listed_steps(result: RunResult) -> list[dict]:
    """Unfold the timeline: one dict a step; what is known at both ends of a stretch is interpolated."""
    steps = []
    for index in range(len(result.timeline["steps"])):
        row = {name: int(column[index]) for name, column in result.timeline.items()}
        for j in range(row["steps"]):
            share = Fraction(j, row["steps"] - 1) if row["steps"] > 1 else Fraction(1)
            step = {"ps": row["first_step_ps"] + j * row["step_increment_ps"], "row": row}
            for name in ("referenced_blocks", "kv_tokens"):
                first = row[f"{name}_first"]
                step[name] = first + (row[name] - first) * share
            steps.append(step)
    return steps


def oracle(result: RunResult, engine: EngineConfig) -> dict:
    """Compute the figures whose definition is more than reading a counter."""
    rows = [
        {name: column[i].item() for name, column in result.requests.items()}
        for i in range(len(result.requests["status"]))
    ]
    done = [row for row in rows if row["status"] == "finished"]
    steps = listed_steps(result)
    span = max((int(end) for end in result.timeline["end_ps"]), default=0)
    blocks, size = result.cache.num_blocks, result.cache.tokens_per_block
    gaps = [int(gap) for gap in result.gaps_ps]
    for step in steps:
        gaps += [step["ps"]] * step["row"]["itl_tokens"]
    tpot = {
        row["request_id"]: Fraction(row["finish_ps"] - row["first_token_ps"], row["output_tokens"] - 1)
        for row in done
        if row["output_tokens"] > 1
    }
    good = [
        row
        for row in done
        if row["first_token_ps"] - row["arrival_ps"] <= engine.slo_ttft_s * PS
        and tpot.get(row["request_id"], 0) <= engine.slo_tpot_s * PS
    ]
    output = sum(row["output_tokens"] * row["num_samples"] for row in done)
    busy = [step for step in steps if step["row"]["referenced_blocks"] > 0]
    ratios = []
    for step in busy:
        row = step["row"]
        ends = [
            Fraction(row[f"kv_tokens{end}"], max(1, row[f"referenced_blocks{end}"])) for end in ("_first", "")
        ]
        position = [s for s in steps if s["row"] is row].index(step)
        share = Fraction(position, row["steps"] - 1) if row["steps"] > 1 else Fraction(1)
        ratios.append((step["ps"], ends[0] + (ends[1] - ends[0]) * share))
    saved = [(s["ps"], s["row"]["saved_blocks"]) for s in steps]
    tables = sum(row["blocks"] for row in done) * size
    unused = sum(
        (1 if row["output_tokens"] == 1 else row["num_samples"])
        * (-(row["prompt_tokens"] + row["output_tokens"] - 1) % size)
        for row in done
    )
    fill = sum(ps * ratio for ps, ratio in ratios) / sum(ps for ps, _ in ratios) if ratios else None

    def p99(name: str, scale: int) -> Fraction | None:
        held = sorted((step["row"][name], step["ps"]) for step in steps)
        held.insert(0, (0, span - sum(ps for _, ps in held)))
        passed = 0
        for value, ps in held:
            passed += ps
            if ps and passed * 100 >= span * 99:
                return Fraction(value, scale)
        return None

    def mean(name: str, scale: int) -> Fraction | None:
        return sum(step["ps"] * step[name] for step in steps) / Fraction(span) / scale if span else None

    return {
        "simulated_s": Fraction(span, PS),
        "measured_s": Fraction(span, PS),
        "steps": len(steps),
        "output_tokens": output,
        "prompt_tokens": sum(row["prompt_tokens"] for row in done),
        "throughput_tokens_per_s": Fraction(output * PS, span) if span else None,
        "ttft_s": distribution([row["first_token_ps"] - row["arrival_ps"] for row in done]),
        "tpot_s": distribution(list(tpot.values())),
        "itl_s": distribution(gaps),
        "e2e_s": distribution([row["finish_ps"] - row["arrival_ps"] for row in done]),
        "queue_s": distribution([row["admit_ps"] - row["arrival_ps"] for row in done]),
        "goodput": {
            "share": Fraction(len(good), len(rows)) if rows else None,
            "rate": Fraction(len(good) * PS, span) if span else None,
        },
        "utilization_block_mean": mean("referenced_blocks", blocks),
        "utilization_token_mean": mean("kv_tokens", blocks * size),
        "utilization_block_p99": p99("referenced_blocks", blocks),
        "utilization_token_p99": p99("kv_tokens", blocks * size),
        "fragmentation_mean": 1 - fill / size if ratios else None,
        "fragmentation_final": Fraction(unused, tables) if tables else None,
        "saved_mean": sum(ps * value for ps, value in saved) / Fraction(span) if span else None,
    }


def assert_close(found: object, wanted: object, where: str) -> None:
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert set(found) == set(wanted), where
        for key, value in wanted.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif wanted is None:
        assert found is None, where
    else:
        assert found == pytest.approx(float(wanted), rel=1e-12, abs=1e-15), where


# ------------------------------------------------------------------ the tests


@given(results(), st.floats(0.01, 5), st.floats(0.001, 1))
def test_summary_equals_the_listing_oracle(result: RunResult, slo_ttft: float, slo_tpot: float) -> None:
    engine = EngineConfig(slo_ttft_s=round(slo_ttft, 3), slo_tpot_s=round(slo_tpot, 3))
    found, wanted = summarise(result, engine, total_wall_s=1.5), oracle(result, engine)
    assert list(found) == SUMMARY_KEYS
    flat = found | {
        "utilization_block_mean": found["kv_utilization"]["block"]["mean"],
        "utilization_token_mean": found["kv_utilization"]["token"]["mean"],
        "utilization_block_p99": found["kv_utilization"]["block"]["p99"],
        "utilization_token_p99": found["kv_utilization"]["token"]["p99"],
        "fragmentation_mean": found["internal_fragmentation"]["mean"],
        "fragmentation_final": found["internal_fragmentation"]["final"],
        "saved_mean": found["sharing_saved_blocks"]["mean"],
    }
    for key, value in wanted.items():
        assert_close(flat[key], value, key)


@given(results())
def test_counts_add_up_and_nothing_is_nan(result: RunResult) -> None:
    found = summarise(result, EngineConfig())
    assert found["finished"] + sum(found["rejected"].values()) == found["requests"]
    computed = found["computed_prompt_tokens"]
    assert computed["no_cache"] - computed["run"] == found["hit_tokens"]
    assert computed["infinite_cache"] is found["infinite_cache_hit_rate_tokens"] is None  # without the trace
    json.dumps(found, allow_nan=False)
    for name in ("block", "token"):
        use = found["kv_utilization"][name]
        if use["max"] is not None:
            assert 0 <= use["p99"] <= use["max"] <= 1
            assert use["mean"] <= use["max"] + 1e-12
    waste = found["internal_fragmentation"]["mean"]
    assert waste is None or -1e-12 <= waste <= 1


def test_stretches_account_for_every_step_of_a_run() -> None:
    """Compressed rows give what single steps give: every gap exactly, and the pool's use within rounding."""
    compressed, engine = NaiveEngine(1, 80).run(), NaiveEngine(1, 80)
    stepwise = engine.run(compress=False)
    assert len(compressed.timeline["steps"]) < len(stepwise.timeline["steps"]) / 2
    one, many = (summarise(result, EngineConfig()) for result in (compressed, stepwise))
    assert many["preemptions"] > 0
    assert len(compressed.gaps_ps) > 0
    assert_close(one["itl_s"], distribution(engine.token_gaps), "itl_s")
    exact = [key for key in SUMMARY_KEYS if key not in ("kv_utilization", "internal_fragmentation")]
    for key in exact:
        if key != "sharing_saved_blocks":
            assert one[key] == many[key], key
    span = engine.rows[-1]["end_ps"]
    busy = sum(ps * blocks for ps, blocks, _ in engine.step_states) / span / engine.num_blocks
    written = (
        sum(ps * tokens for ps, _, tokens in engine.step_states) / span / engine.num_blocks / engine.size
    )
    assert many["kv_utilization"]["block"]["mean"] == pytest.approx(busy, rel=1e-12)
    assert one["kv_utilization"]["block"]["mean"] == pytest.approx(busy, rel=0.01)
    # A decoding batch writes one token a sequence and step, so tokens grow in a line: no rounding at all.
    assert one["kv_utilization"]["token"]["mean"] == pytest.approx(written, rel=1e-9)


def test_a_request_by_hand() -> None:
    """Two requests, three stretches, each figure computed on paper."""
    result = NaiveEngine(3, 1).run()
    requests = {
        "status": np.array(["finished", "rejected"]),
        "reject_cause": np.array(["", "exceeds_pool"]),
        "request_id": np.array([0, 1]),
        "arrival_ps": np.array([0, 5]) * PS,
        "prompt_tokens": np.array([6, 900]),
        "output_tokens": np.array([3, 1]),
        "num_samples": np.array([1, 1]),
        "admit_ps": np.array([1 * PS, -1]),
        "first_token_ps": np.array([2 * PS, -1]),
        "finish_ps": np.array([6 * PS, -1]),
        "recomputed_tokens": np.array([0, 0]),
        "blocks": np.array([2, 0]),
    }
    timeline = {name: np.array([0, 0]) for name in result.timeline} | {
        "start_ps": np.array([1, 2]) * PS,
        "end_ps": np.array([2, 6]) * PS,
        "steps": np.array([1, 2]),
        "first_step_ps": np.array([1, 1]) * PS,
        "step_increment_ps": np.array([0, 2]) * PS,
        "itl_tokens": np.array([0, 1]),
        "referenced_blocks": np.array([2, 2]),
        "referenced_blocks_first": np.array([2, 2]),
        "kv_tokens": np.array([6, 8]),
        "kv_tokens_first": np.array([6, 7]),
        "logical_blocks": np.array([2, 2]),
    }
    cache = replace(result.cache, num_blocks=4, tokens_per_block=4)
    found = summarise(replace(result, requests=requests, timeline=timeline, cache=cache), EngineConfig())
    assert found["rejected"] == {"exceeds_pool": 1}
    assert found["simulated_s"] == 6
    assert found["queue_s"]["p50"] == 1
    assert found["ttft_s"]["max"] == 2
    assert found["tpot_s"]["mean"] == 2  # (6 − 2) / (3 − 1)
    assert found["itl_s"] == {"mean": 2, "p50": 1, "p90": 3, "p99": 3, "max": 3}
    assert found["e2e_s"]["p99"] == 6
    assert found["goodput"] == {"share": 0, "rate": 0}  # TPOT 2 s misses 0.1 s
    assert found["kv_utilization"]["block"] == {"mean": pytest.approx(5 * 2 / 6 / 4), "p99": 0.5, "max": 0.5}
    # Tokens: 6 for 1 s, 7 for 1 s, 8 for 3 s, none for the first second.
    assert found["kv_utilization"]["token"]["mean"] == pytest.approx((6 + 7 + 24) / 6 / 16)
    assert found["internal_fragmentation"]["mean"] == pytest.approx(1 - (6 + 7 + 24) / 5 / 8)
    assert found["internal_fragmentation"]["final"] == 0  # 6 + 3 − 1 tokens in two blocks of 4


def test_an_empty_run_has_no_statistics() -> None:
    empty = NaiveEngine(1, 0).run()
    found = summarise(empty, EngineConfig())
    assert found["requests"] == found["steps"] == 0
    assert found["itl_s"]["p99"] is None
    assert found["sharing_saved_blocks"]["max"] is None
    assert found["throughput_tokens_per_s"] is None
    json.dumps(found, allow_nan=False)


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 40), st.integers(0, 9), st.integers(0, 7)), max_size=8
    ),
)
def test_progressions_equal_their_listing(rows: list[tuple[int, int, int, int]]) -> None:
    listed = sorted(f + j * i for f, i, n, w in rows for j in range(n) for _ in range(w))
    table = np.array(rows, np.int64).reshape(-1, 4)
    found = Progressions.of(*(table[:, column] for column in range(4)))
    assert found.count() == len(listed)
    assert found.total() == sum(listed)
    assert found.max() == (listed[-1] if listed else None)
    for percent in (1, 10, 25, 50, 75, 90, 99, 100):
        wanted = listed[math.ceil(Fraction(percent * len(listed), 100)) - 1] if listed else None
        assert found.percentile(percent) == wanted


def test_ten_million_steps_are_not_unfolded() -> None:
    """A hundred rows of a hundred thousand steps: the percentile is exact and no array grows."""
    first = np.arange(100, dtype=np.int64) * 10**9
    steps = np.full(100, 100_000, np.int64)
    found = Progressions.of(first, np.full(100, 7, np.int64), steps, np.full(100, 256, np.int64))
    assert found.count() == 100 * 100_000 * 256
    assert found.percentile(50) == 49 * 10**9 + 7 * 99_999
    assert found.percentile(100) == 99 * 10**9 + 7 * 99_999


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=6), max_size=4))
def test_levels_are_their_values_however_they_come(parts: list[list[tuple[int, int]]]) -> None:
    levels = Levels()
    for part in parts:
        levels.add(*np.array(part, dtype=np.int64).reshape(-1, 2).T)
    found = levels.progressions()
    unfolded = sorted(value for part in parts for value, weight in part for _ in range(weight))
    assert found.count() == len(unfolded)
    assert found.first.size == len(set(unfolded))
    for percent in (1, 50, 99, 100):
        rank = -(-percent * len(unfolded) // 100)
        assert found.percentile(percent) == (unfolded[rank - 1] if unfolded else None)


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=6))
@settings(max_examples=30)
def test_sums_and_dots_do_not_overflow(pairs: list[tuple[int, int]]) -> None:
    left, right = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    assert exact_sum(left) == sum(a for a, _ in pairs)
    assert exact_dot(left, right) == sum(a * b for a, b in pairs)


def test_bad_progressions_are_refused() -> None:
    one = np.array([1], np.int64)
    with pytest.raises(ValueError, match=r"first \(-1\) must not be negative"):
        Progressions.of(-one, one, one, one)
    with pytest.raises(ValueError, match=r"increment \(-1\) must not be negative"):
        Progressions.of(one, -one, one, one)
    with pytest.raises(ValueError, match=r"percent \(0\) must be in 1..100"):
        Progressions.plain(one).percentile(0)


def test_gaps_that_span_a_preemption_count() -> None:
    result = NaiveEngine(1, 80).run()
    assert inter_token_gaps(result).count() == int(
        (result.timeline["itl_tokens"] * result.timeline["steps"]).sum() + len(result.gaps_ps)
    )
