"""Beam search in the engine: schedules to follow by hand, against the naive engine, and where beams come from.

Every step takes 10 ps, and a token that is copied 1 ps. A row of a schedule is

    (start, end, steps, decoding sequences, prefill tokens, running, waiting)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, assert_as_naive, assert_identical, scenarios, unlike
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import MODEL_PRESETS, BuildConfig, CacheConfig
from sim.cost import RooflineCost
from sim.hardware import GPU_PRESETS
from sim.records import RunResult
from sim.request import Request
from sim.scheduler import beams
from sim.scheduler.beams import NEVER, beam_parents, next_reorder
from sim.scheduler.config import EngineConfig
from sim.workload import WorkloadConfig, generate

GREEDY = EngineConfig(admission="max_utilization")
NO_REUSE = CacheConfig(enable_block_reuse=False)


def _rows(result: RunResult, *names: str) -> list[list[int]]:
    rows: list[list[int]] = np.stack([result.timeline[name] for name in names], axis=1).tolist()
    return rows


def _schedule(result: RunResult) -> list[tuple[int, ...]]:
    names = ("start_ps", "end_ps", "steps", "decode_sequences", "prefill_tokens", "running", "waiting")
    return [tuple(row) for row in _rows(result, *names)]


def _check(scenario: Scenario) -> RunResult:
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


def _let_beams_be(monkeypatch: pytest.MonkeyPatch, parents: dict[int, list[int]]) -> None:
    """Let beams go on from others after so many tokens, and from themselves else."""

    def chosen(request_id: int, tokens: int, width: int) -> list[int]:
        return parents.get(tokens, list(range(width)))

    monkeypatch.setattr(beams, "beam_parents", chosen)
    monkeypatch.setattr("naive_engine.beam_parents", chosen)


def test_beams_share_copy_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beams, blocks of 4, a prompt of 6: after 2 tokens beam 1 ends and goes on from beam 0, after 3 the reverse.

    step 2   both write their 7th token: one of them copies the 2 of the prompt's last block
    step 3   and the 8th: the blocks are full
    step 4   beam 1 has let go of its block of 7 and 8, which stays cached; each takes a block
    step 5   beam 0 has let go of that one, which had a single token and is free; the token is copied
    """
    _let_beams_be(monkeypatch, {2: [0, 0], 3: [1, 1]})
    build = BuildConfig(4, 64, 64, tokens_per_block=4)
    result = _check(Scenario([Request(0, 0, 6, 6, beam_width=2)], build, 10, cost=LinearCost(10, copy=1)))
    names = ("start_ps", "end_ps", "decode_sequences", "free_blocks", "evictable_blocks", "referenced_blocks")
    assert _rows(result, *names, "saved_blocks", "logical_tokens") == [
        [0, 10, 0, 8, 0, 2, 0, 6],
        [10, 22, 2, 7, 0, 3, 1, 14],
        [22, 32, 2, 7, 0, 3, 1, 16],
        [32, 42, 2, 5, 1, 4, 2, 18],
        [42, 53, 2, 5, 1, 4, 2, 20],
        [53, 63, 2, 5, 1, 4, 2, 22],
    ]
    assert result.cache.cow_copies == 2
    assert result.cache.cow_tokens == 3
    requests = result.requests
    assert [requests[name].tolist() for name in ("num_samples", "blocks", "cow_copies")] == [[2], [6], [2]]


def test_a_search_is_preempted_as_a_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 5 blocks of 4; A wants 3 of them at its end, B, with two beams and a block shared, 5.

    step 6   A and both beams start a block each: B, which started last, goes, and forgets 4 tokens of each beam
    step 7   it begins anew with its prompt
    step 8   its beams lack a block: now it is A that goes, as B has been preempted before
    step 9   A, 11 tokens, has to wait for B to end
    """
    _let_beams_be(monkeypatch, {})
    requests = [Request(0, 0, 4, 9), Request(1, 0, 4, 9, beam_width=2)]
    build = BuildConfig(4, 64, 64, tokens_per_block=4)
    result = _check(Scenario(requests, build, 5, NO_REUSE, GREEDY))
    assert _schedule(result) == [
        (0, 10, 1, 0, 8, 2, 0),
        (10, 50, 4, 3, 0, 3, 0),
        (50, 60, 1, 1, 0, 1, 1),
        (60, 70, 1, 1, 4, 2, 0),
        (70, 80, 1, 2, 0, 2, 1),
        (80, 150, 7, 2, 0, 2, 1),
        (150, 160, 1, 0, 11, 1, 0),
        (160, 170, 1, 1, 0, 1, 0),
    ]
    assert result.requests["preemptions"].tolist() == [1, 1]
    assert result.requests["recomputed_tokens"].tolist() == [10, 4 + 2 * 4]
    assert sorted(result.gaps_ps.tolist()) == [20, 90]
    assert result.requests["first_token_ps"].tolist() == [10, 10]  # not that of the search that began anew


@pytest.mark.parametrize("mixed", [True, False])
def test_what_a_beam_lets_go_of_lets_the_next_request_start(
    monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """Of 22 blocks of one token, A may come to hold 17, B 7: there is room when beam 1 of A gives up 3 at 40 ps.

    With prompts first, only the admission of the step after sees it.
    """
    _let_beams_be(monkeypatch, {3: [0, 0]})
    requests = [Request(0, 0, 1, 9, beam_width=2), Request(1, 5, 2, 6)]
    build = BuildConfig(4, 64, 64, tokens_per_block=1)
    result = _check(Scenario(requests, build, 22, engine=EngineConfig(mixed_steps=mixed)))
    assert result.requests["admit_ps"].tolist() == [0, 40 if mixed else 50]


def test_who_copies_does_not_depend_on_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 13 tokens, when a block is about to leave the window, beam 0 goes on from beam 3: one of the two copies.

    The last block of beam 3 is the last to be freed, and the one that the next request gets.
    """
    _let_beams_be(monkeypatch, {8: [3, 1, 2, 3]})
    build = BuildConfig(4, 64, 64, tokens_per_block=4)
    cache, engine = CacheConfig(window=6), EngineConfig(block_map_samples=1000)
    requests = [Request(0, 0, 5, 10, beam_width=4), Request(1, 500, 2, 2)]
    scenario = Scenario(requests, build, 60, cache, engine)
    result = scenario.run()
    assert (result.timeline["steps"] > 2).any()
    assert_identical(result, scenario.run(skipping=False))


def test_stretches_end_where_beams_change_places() -> None:
    """Alone, with blocks to spare: rows begin at the steps before which beams change, and where one has copied."""
    request = Request(0, 0, 64, 200, beam_width=4)
    build = BuildConfig(4, 64, 512, tokens_per_block=64)
    result = _check(Scenario([request], build, 100))
    at, changes = 1, []
    while (at := next_reorder(0, at, 198, 4)) != NEVER:
        changes.append(at)
        at += 1
    assert len(changes) > 20
    decoded = np.cumsum(result.timeline["steps"][1:]) - result.timeline["steps"][1:]
    assert set(changes) <= set(decoded.tolist())
    copied = {change + 1 for change in changes if change % 64}
    assert set(decoded.tolist()) <= {0, *changes, *copied}


# ------------------------------------------------------------------ where beams come from


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(2, 16))
def test_parents_are_beams_and_always_the_same(request_id: int, tokens: int, width: int) -> None:
    parents = beam_parents(request_id, tokens, width)
    assert len(parents) == width
    assert all(0 <= parent < width for parent in parents)
    assert parents == beam_parents(request_id, tokens, width)
    following = next_reorder(request_id, tokens, tokens + 50, width)
    stay = list(range(width))
    quiet = range(tokens, min(following, tokens + 51))
    assert all(beam_parents(request_id, each, width) == stay for each in quiet)
    assert following == NEVER or beam_parents(request_id, following, width) != stay


def test_one_beam_in_eight_ends_and_its_place_goes_to_any() -> None:
    drawn = [beam_parents(request, tokens, 4) for request in range(100) for tokens in range(1, 101)]
    moved = Counter(
        (beam, parent) for parents in drawn for beam, parent in enumerate(parents) if beam != parent
    )
    assert sum(moved.values()) / 40_000 == pytest.approx(
        3 / 4 / 8, rel=0.05
    )  # of the drawn, one in four stays
    assert len(moved) == 12
    assert max(moved.values()) < 1.3 * min(moved.values())


# ------------------------------------------------------------------ against the naive engine


@st.composite
def searches(draw: st.DrawFn) -> Scenario:
    """A scenario in which most requests make a beam search."""
    scenario = draw(scenarios())
    requests = []
    for request in scenario.requests:
        width = draw(st.sampled_from([1, 2, 2, 3, 4]))
        ids = None if request.token_ids is None else request.token_ids[: request.prompt_tokens]
        changes: dict[str, Any] = {"beam_width": width, "num_samples": 1, "token_ids": ids}
        if request.named_tokens:
            changes["named_tokens"] = request.prompt_tokens
        if request.chunk_ids is not None:
            changes["chunk_ids"] = request.chunk_ids[: -(-request.prompt_tokens // request.granularity)]
        requests.append(request if width == 1 else dataclasses.replace(request, **changes))
    size = scenario.build.tokens_per_block
    needed = max(
        request.prompt_tokens // size + request.num_sequences * (request.output_tokens // size + 1)
        for request in requests
    )
    num_blocks = draw(st.sampled_from([scenario.num_blocks, needed, needed + 1, needed + 3]))
    return dataclasses.replace(scenario, requests=requests, num_blocks=max(num_blocks, scenario.num_blocks))


@different_examples(1.5)
@given(searches())
def test_beams_equal_the_naive_engine_skipping_or_not(scenario: Scenario) -> None:
    _check(scenario)


@different_examples()
@given(searches(), st.sampled_from(["window", "partial", "host"]), st.integers(1, 12))
def test_beams_skip_as_they_step_in_every_kind_of_cache(scenario: Scenario, kind: str, number: int) -> None:
    build = dataclasses.replace(scenario.build, enable_paged_kv_cache=True)
    cache, engine = scenario.cache, scenario.engine
    if kind == "window":
        cache = dataclasses.replace(cache, window=number, num_sinks=number % 3)
    elif kind == "partial":
        cache = dataclasses.replace(cache, enable_block_reuse=True, enable_partial_reuse=True)
    else:
        engine = dataclasses.replace(engine, preemption="swap")
    host = number if kind == "host" else 0
    scenario = dataclasses.replace(scenario, build=build, cache=cache, engine=engine, num_host_blocks=host)
    assert_identical(scenario.run(), scenario.run(skipping=False))


@pytest.mark.parametrize("victim", ["last_started", "last_arrived", "least_progress", "cheapest"])
@pytest.mark.parametrize("admission", ["guaranteed_no_evict", "max_utilization", "static_batch"])
def test_searches_in_a_pool_of_one_never_lock_up(admission: Any, victim: Any) -> None:
    """Five searches of three beams, each of which fills the pool alone; and samples between them."""
    for size, reuse, budget in ((1, True, 6), (2, True, 8), (4, False, 30), (4, True, 6)):
        shapes = [(4, 9), (4, 9), (8, 5), (3, 9), (1, 12)]
        requests = [Request(row, row, *shape, beam_width=3) for row, shape in enumerate(shapes)]
        requests += [Request(5 + row, 5, *shape, num_samples=2) for row, shape in enumerate(shapes)]
        needed = max(p // size + 3 * (-(-(p + o - 1) // size) - p // size) + reuse for p, o in shapes)
        engine = EngineConfig(admission=admission, victim=victim)
        build = BuildConfig(6, budget, 64, tokens_per_block=size)
        result = _check(Scenario(requests, build, needed, CacheConfig(enable_block_reuse=reuse), engine))
        assert (result.requests["status"] == "finished").all()


def test_what_can_never_run_is_rejected() -> None:
    """Three beams of 8 tokens behind a prompt of 4, blocks of 4: 1 + 3 · 2 blocks, and one more if that is cached."""
    build = BuildConfig(4, 64, 64, tokens_per_block=4)
    for num_blocks, cache, cause in (
        (7, NO_REUSE, ""),
        (6, NO_REUSE, "exceeds_pool"),
        (7, None, "exceeds_pool"),
    ):
        scenario = Scenario(
            [Request(0, 0, 4, 9, beam_width=3)], build, num_blocks, cache or CacheConfig(), GREEDY
        )
        assert _check(scenario).requests["reject_cause"].tolist() == [cause]
    wide = Scenario([Request(0, 0, 4, 4, beam_width=5)], build, 100)
    assert _check(wide).requests["reject_cause"].tolist() == ["exceeds_max_batch_size"]


def test_a_workload_of_searches_skips_as_it_steps() -> None:
    config = WorkloadConfig(
        num_requests=60,
        beam_share=0.5,
        sampling_share=0.2,
        turns_mean=2.0,
        output_tokens_mean=60.0,
        think_s_mean=1.0,
        requests_per_s=20.0,
    )
    requests = list(generate(config))
    searches = [request for request in requests if request.beam_width > 1]
    assert 15 < len(searches) < 40
    cost = RooflineCost(MODEL_PRESETS["llama-3-8b"], GPU_PRESETS["a100-80gb"])
    for engine in (EngineConfig(), GREEDY):
        scenario = Scenario(
            requests, BuildConfig(32, 512, 16384, tokens_per_block=16), 400, engine=engine, cost=cost
        )
        result = scenario.run()
        assert_identical(result, scenario.run(skipping=False))
        assert (result.timeline["preemptions"].sum() > 0) == (engine is GREEDY)
        assert result.cache.cow_copies > 100


def test_beams_without_others_are_like_samples() -> None:
    """As long as every beam goes on from itself, a search is a request of as many samples."""
    with pytest.MonkeyPatch.context() as patch:
        _let_beams_be(patch, {})
        build = BuildConfig(8, 16, 64, tokens_per_block=4)
        searched = [Request(0, 0, 9, 12, beam_width=4), Request(1, 25, 6, 7, beam_width=3)]
        result = _check(Scenario(searched, build, 40))
    sampled = Scenario(unlike((0, 9, 12, 4), (25, 6, 7, 3)), build, 40).run()
    assert_identical(result, sampled)
