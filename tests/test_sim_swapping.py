"""Preempted jobs in host memory, and what moves between the tiers: golden schedules, and against the naive engine.

Every step takes 10 ps, and a token that is swapped 1 ps, unless said otherwise. A row of the timeline is written as

    (start, end, steps, decoding sequences, prefill tokens, running, waiting)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, alike, assert_as_naive, assert_identical, scenarios, unlike
from hypothesis import assume, given
from hypothesis import strategies as st
from naive_host import Unclear

from allocator.config import BuildConfig, CacheConfig
from allocator.model import ModelSpec
from sim.cost import RooflineCost, StepBatch
from sim.hardware import GPUSpec
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig

SWAP = EngineConfig(admission="max_utilization", preemption="swap")


def _run(
    requests: Sequence[Request],
    engine: EngineConfig = SWAP,
    *,
    num_blocks: int = 4,
    host: int = 10,
    cache: CacheConfig | None = None,
    swap: int = 1,
    tokens: int = 100,
) -> RunResult:
    build = BuildConfig(8, tokens, 100, tokens_per_block=4)
    cost = LinearCost(10, swap=swap)
    scenario = Scenario(list(requests), build, num_blocks, cache or CacheConfig(), engine, cost, host)
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))
    return result


def _schedule(result: RunResult) -> list[tuple[int, ...]]:
    names = ("start_ps", "end_ps", "steps", "decode_sequences", "prefill_tokens", "running", "waiting")
    return [tuple(row) for row in np.stack([result.timeline[name] for name in names], axis=1).tolist()]


NO_REUSE = CacheConfig(enable_block_reuse=False)


def test_a_swapped_job_goes_on_where_it_was() -> None:
    """Four blocks. A comes to hold 3, B as well; B goes when each needs one more, and comes back when A has ended."""
    requests = unlike((0, 4, 9), (0, 8, 5))
    result = _run(requests, cache=NO_REUSE)
    assert _schedule(result) == [
        (0, 10, 1, 0, 12, 2, 0),
        (10, 28, 1, 1, 0, 1, 1),  # B's 2 blocks of 4 tokens move out first
        (28, 98, 7, 1, 0, 1, 1),
        (98, 106, 1, 0, 0, 1, 0),  # and back: a step that computes nothing
        (106, 116, 1, 1, 0, 1, 0),  # its first token in a while: a row of its own
        (116, 146, 3, 1, 0, 1, 0),
    ]
    assert result.requests["preemptions"].tolist() == [0, 1]
    assert result.requests["recomputed_tokens"].tolist() == [0, 0]
    assert result.gaps_ps.tolist() == [106]  # B's first token came at 10, its second at 116
    host = result.cache.host
    assert host is not None
    assert (host.swapped_out_blocks, host.swapped_in_blocks) == (2, 2)
    recomputed = _run(requests, dataclasses.replace(SWAP, preemption="recompute"), cache=NO_REUSE)
    assert recomputed.requests["recomputed_tokens"].tolist() == [0, 8]


def test_what_the_gpu_still_has_need_not_come_back() -> None:
    """With reuse, B's 2 full blocks stay cached; A takes the free one, and then B's last: only that is moved back."""
    result = _run(unlike((0, 4, 6), (0, 8, 5)))
    host = result.cache.host
    assert host is not None
    assert host.swapped_out_blocks == 2
    assert host.swapped_in_blocks == 1
    assert result.requests["recomputed_tokens"].tolist() == [0, 0]


def test_without_room_in_host_memory_the_job_is_computed_again() -> None:
    result = _run(unlike((0, 4, 9), (0, 8, 5)), host=1, cache=NO_REUSE)
    assert result.requests["recomputed_tokens"].tolist() == [0, 8]
    assert result.cache.host is not None
    assert result.cache.host.swapped_out_blocks == 0


@pytest.mark.parametrize(("swap", "swaps"), [(0, True), (100, False)])
def test_cheaper_asks_the_cost_model(swap: int, swaps: bool) -> None:
    """Computing B's 9 tokens again takes a step, 10 ps; moving its 2 blocks twice takes 16 tokens' time."""
    engine = dataclasses.replace(SWAP, preemption="cheaper")
    result = _run(unlike((0, 4, 9), (0, 8, 5)), engine, cache=NO_REUSE, swap=swap)
    assert result.cache.host is not None
    assert (result.cache.host.swapped_out_blocks > 0) == swaps
    assert result.requests["recomputed_tokens"].tolist() == [0, 0 if swaps else 8]


def test_swapping_needs_host_memory() -> None:
    with pytest.raises(ValueError, match=r"^preemption \(swap\) needs host memory"):
        _run(unlike((0, 4, 4)), host=0)
    build = BuildConfig(8, 100, 32, tokens_per_block=4, enable_paged_kv_cache=False)
    with pytest.raises(ValueError, match=r"^num_host_blocks \(4\) must be 0 when paging is off$"):
        Scenario(unlike((0, 4, 4)), build, 20, num_host_blocks=4).run()


def test_evicted_content_comes_back_from_the_host() -> None:
    """A's 3 blocks are pushed out by B's 4; C says what A said, and finds 2 of them, 8 tokens, in host memory."""
    ids = np.zeros(12, dtype=np.int64)
    first = Request(0, 0, 12, 1, ids, 1, named_tokens=12)
    again = Request(2, 40, 12, 1, ids, 1, named_tokens=12)
    requests = [first, Request(1, 20, 16, 1), again]
    result = _run(requests, EngineConfig())
    assert result.requests["hit_tokens"].tolist() == [0, 0, 8]
    assert _schedule(result) == [
        (0, 10, 1, 0, 12, 1, 0),
        (20, 42, 1, 0, 16, 1, 0),  # A's 3 blocks move out
        (42, 42 + 10 + 8 + 12, 1, 0, 4, 1, 0),  # B's 3 last blocks out, A's first 2 back
    ]
    assert _run(requests, EngineConfig(), host=0).requests["hit_tokens"].tolist() == [0, 0, 0]


def test_a_hit_on_the_host_takes_a_block_as_a_miss_does() -> None:
    """Five blocks. B hits two of its three on the host, and waits for C, which was promised four."""
    a, b = alike((0, 8, 1), (45, 9, 1))
    b = dataclasses.replace(b, request_id=3)
    others = [Request(1, 20, 20, 1), Request(2, 40, 3, 14)]  # the first of these has A's two blocks offloaded
    scenario = Scenario([a, *others, b], BuildConfig(8, 100, 100, tokens_per_block=4), 5, num_host_blocks=10)
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert result.requests["admit_ps"].tolist() == [0, 20, 40, 180]
    assert result.requests["hit_tokens"].tolist() == [0, 0, 0, 8]


@different_examples(1.5)
@given(
    scenarios(),
    st.sampled_from(["recompute", "swap", "swap", "cheaper"]),
    st.integers(1, 30),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([True, True, True, False]),
)
def test_equals_the_naive_engine_with_host_memory(
    scenario: Scenario, preemption: Any, host: int, swap: int, greedy: bool
) -> None:
    """All three agree, the naive engine as far as it says what becomes of a prefix when the host is full."""
    assume(scenario.build.enable_paged_kv_cache)
    admission = "max_utilization" if greedy else scenario.engine.admission
    scenario = dataclasses.replace(
        scenario,
        engine=dataclasses.replace(
            scenario.engine, admission=admission, preemption=preemption, watermark=0.0, events=False
        ),
        cost=dataclasses.replace(scenario.cost, swap=swap),
        num_host_blocks=host,
    )
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))
    if scenario.cache.enable_block_reuse:
        with contextlib.suppress(Unclear):
            assert_as_naive(result, scenario.naive())


@given(
    scenarios(),
    st.sampled_from(["recompute", "swap", "swap"]),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(30, 100),
    st.booleans(),
)
def test_windowed_skipping_equals_stepping_with_host_memory(
    scenario: Scenario, preemption: Any, host: int, window: int, num_sinks: int, share: int, partial: bool
) -> None:
    """Windows are swapped out and in, and the blocks that have left them go to host memory and come back."""
    build = dataclasses.replace(scenario.build, enable_paged_kv_cache=True)
    scenario = dataclasses.replace(
        scenario,
        build=build,
        num_blocks=max(scenario.num_blocks * share // 100, 1),
        cache=dataclasses.replace(
            scenario.cache,
            window=window,
            num_sinks=num_sinks,
            enable_partial_reuse=partial and scenario.cache.enable_block_reuse,
        ),
        engine=dataclasses.replace(scenario.engine, preemption=preemption, events=False),
        cost=dataclasses.replace(scenario.cost, swap=1),
        num_host_blocks=host,
    )
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))


def test_a_preempted_window_waits_in_host_memory() -> None:
    """Blocks of 4, a window of 8: each job holds 2 or 3 blocks in turn, and 5 are too few when both have 3."""
    cache = CacheConfig(window=8, enable_block_reuse=False)
    engine = dataclasses.replace(SWAP, admission="max_utilization")
    result = _run(unlike((0, 4, 40), (0, 8, 40)), engine, num_blocks=5, cache=cache, host=10)
    assert (result.requests["status"] == "finished").all()
    swapped = result.cache.host
    assert swapped is not None
    assert swapped.swapped_out_blocks == swapped.swapped_in_blocks > 0
    assert result.requests["preemptions"].sum() > 0
    assert result.requests["recomputed_tokens"].sum() == 0


def test_who_comes_back_attends_to_nothing_yet() -> None:
    """A key costs 1 ps. C comes back while A goes on: that step has A's 9 keys, and C's 8 tokens to move."""
    build = BuildConfig(8, 100, 100, tokens_per_block=4)
    requests = unlike((0, 4, 14), (0, 4, 5), (0, 8, 6))
    scenario = Scenario(requests, build, 6, NO_REUSE, SWAP, LinearCost(10, key=1, swap=1), 10)
    result = scenario.run()
    assert _schedule(result)[3:5] == [
        (110, 110 + 10 + 9 + 8, 1, 1, 0, 2, 0),
        (137, 137 + 10 + 10 + 9, 1, 2, 0, 2, 0),
    ]
    assert_identical(result, scenario.run(skipping=False))


def test_who_comes_back_and_goes_in_one_step_pauses_twice() -> None:
    """Prompts go first: C is moved in when nothing is left to compute, and out again by what decodes in that step."""
    requests = alike((0, 1, 7), (0, 1, 4), (0, 1, 3))
    engine = dataclasses.replace(SWAP, mixed_steps=False)
    scenario = Scenario(
        requests, BuildConfig(2, 2, 32, tokens_per_block=2), 4, engine=engine, num_host_blocks=1
    )
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))
    pauses = list(zip(*(result.pauses[name].tolist() for name in ("paused_ps", "resumed_ps")), strict=True))
    assert len(pauses) == result.requests["preemptions"].sum()
    assert any(one[1] == other[0] for one, other in itertools.pairwise(pauses))


def test_moves_take_the_links_time_and_copies_the_memorys() -> None:
    """Llama-2-7B: 524,288 bytes a token; PCIe 4 at 25.6 GB/s, an A100's memory at 1.713 TB/s both ways."""
    cost = RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb"))
    still = cost.step(StepBatch(4, 1000))
    moved = cost.step(StepBatch(4, 1000, swapped_tokens=160)) - still
    assert moved / 1e12 == pytest.approx(160 * 524_288 / 25.6e9, rel=1e-6)
    copied = cost.step(StepBatch(4, 1000, copied_tokens=160)) - still
    assert copied / 1e12 == pytest.approx(2 * 160 * 524_288 / (2.039e12 * 0.84), rel=1e-6)
    assert cost.step(StepBatch(0, 0, swapped_tokens=16)) == moved // 10


def test_alike_jobs_share_what_is_in_host_memory() -> None:
    """Four samples of one prompt in a pool that two fill: they swap, and all of them finish."""
    result = _run(alike((0, 8, 9, 8, 4), (0, 8, 9, 8)), num_blocks=7, host=20)
    assert result.requests["status"].tolist() == ["finished", "finished"]
    assert result.requests["preemptions"].sum() > 0


def test_a_job_comes_back_to_what_the_gpu_still_has() -> None:
    """Two that say the same in a pool of two blocks: nothing has to move when the second comes back."""
    build = BuildConfig(2, 2, 32, tokens_per_block=2)
    scenario = Scenario(alike((0, 1, 3, 4), (0, 1, 3, 4)), build, 2, engine=SWAP, num_host_blocks=1)
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))
    assert _schedule(result) == [
        (0, 10, 1, 0, 2, 2, 0),
        (10, 20, 1, 2, 0, 2, 0),
        (20, 30, 1, 1, 0, 1, 1),
        (30, 30, 1, 0, 0, 1, 0),
        (30, 40, 1, 1, 0, 1, 0),
    ]


def test_who_comes_back_may_have_to_go_again_at_once() -> None:
    """Three samples in a pool of two blocks, none of which is free in the step that brings one of them back."""
    build = BuildConfig(4, 4, 32, tokens_per_block=2)
    engine = dataclasses.replace(SWAP, mixed_steps=False)
    scenario = Scenario(unlike((0, 2, 2, 3)), build, 2, engine=engine, num_host_blocks=1)
    result = scenario.run()
    assert_identical(result, scenario.run(skipping=False))
    pauses = {name: np.asarray(column) for name, column in result.pauses.items()}
    assert (pauses["paused_ps"] <= pauses["resumed_ps"]).all()
    assert pauses["sample"].size == result.requests["preemptions"].sum()
