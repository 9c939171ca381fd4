"""Protection of what waiting requests will hit: by hand, against the naive engine, and around every policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, assert_as_naive, assert_identical, scenarios
from hypothesis import example, given
from hypothesis import strategies as st

from allocator.config import MODEL_PRESETS, BuildConfig, CacheConfig
from allocator.content import TokenContent
from allocator.eviction import POLICIES, make_policy
from allocator.eviction.protecting import Protecting, protecting
from allocator.manager import KVCacheManager
from sim.cost import RooflineCost
from sim.hardware import GPU_PRESETS
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.workload import WorkloadConfig, generate

PROTECT = EngineConfig(protect_waiting_hits=True)


def _check(scenario: Scenario) -> RunResult:
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


def _says(row: int, arrival_ps: int, prompt: int, output: int, symbol: int) -> Request:
    return Request(row, arrival_ps, prompt, output, np.full(prompt, symbol), 1, named_tokens=prompt)


@pytest.mark.parametrize("protect", [False, True])
def test_what_a_waiting_request_will_hit_is_evicted_last(protect: bool) -> None:
    """Six blocks of 4, one request at a time. A and then B leave 2 blocks each; C takes 4 while D waits, which says
    what A said. C's third and fourth block come from A, who was served first, or, to leave D its hits, from B.

        a step takes 10 ps, and 1 for each prompt token
        A (0, 18), B (20, 38), C's prompt (40, 54) and 9 tokens (54, 144), D
    """
    requests = [_says(0, 0, 8, 1, 0), _says(1, 20, 8, 1, 1), Request(2, 40, 4, 10), _says(3, 45, 12, 1, 0)]
    build = BuildConfig(1, 16, 64, tokens_per_block=4)
    engine = EngineConfig(protect_waiting_hits=protect)
    result = _check(Scenario(requests, build, 6, engine=engine, cost=LinearCost(10, prefill=1)))
    assert result.requests["hit_tokens"].tolist() == [0, 0, 0, 8 if protect else 0]
    assert result.requests["finish_ps"].tolist() == [18, 38, 144, 144 + 10 + (4 if protect else 12)]
    assert result.requests["preemptions"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("output", "hits"), [(5, 8), (9, 4), (13, 0)])
def test_where_nothing_else_is_left_it_is_given_up(output: int, hits: int) -> None:
    """Four blocks: B takes one, then the free one, then the last that C would hit, and then the first."""
    requests = [_says(0, 0, 8, 1, 0), Request(1, 20, 4, output), _says(2, 25, 12, 1, 0)]
    build = BuildConfig(1, 16, 64, tokens_per_block=4)
    result = _check(Scenario(requests, build, 4, engine=PROTECT))
    assert result.requests["hit_tokens"].tolist() == [0, 0, hits]
    assert not result.timeline["preemptions"].any()


def test_what_is_cached_while_it_waits_is_protected_too() -> None:
    """C waits for B, which generates what C says; A's blocks are older, and would go last as the most recent."""
    story = np.zeros(12, dtype=np.int64)
    requests = [
        _says(0, 0, 8, 1, 1),
        Request(1, 10, 4, 8, story, 1, named_tokens=12),
        Request(2, 15, 12, 6, story, 1, named_tokens=12),
        Request(3, 16, 12, 1, story, 1, named_tokens=12),
    ]
    for policy in ("lru", "fifo"):
        build = BuildConfig(1, 16, 64, tokens_per_block=4)
        result = _check(Scenario(requests, build, 6, CacheConfig(policy=policy), PROTECT))
        assert result.requests["hit_tokens"].tolist() == [0, 0, 8, 8]


def test_nobody_is_looked_up_for_a_batch_that_is_full() -> None:
    """Else the step in which two beams fill a block renews the match of the prompt that waits, and ends the row."""
    requests = [dataclasses.replace(_says(0, 0, 3, 8, 0), beam_width=2), _says(1, 0, 2, 1, 0)]
    build = BuildConfig(2, 5, 32, tokens_per_block=4)
    engine = dataclasses.replace(PROTECT, queue_order="longest_prefix")
    scenario = Scenario(requests, build, 8, CacheConfig(window=2), engine, LinearCost(10))
    assert _check(scenario).timeline["steps"].tolist() == [1, 1, 1, 1, 1, 2, 1, 1]


@different_examples(1.5)
@given(scenarios(), st.sampled_from([1, 2, 16]))
def test_protection_equals_the_naive_engine_skipping_or_not(scenario: Scenario, jobs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.scheduler.protection.PROTECTED", jobs)
        patch.setattr("naive_engine.NaiveEngine.protected", jobs)
        engine = dataclasses.replace(scenario.engine, protect_waiting_hits=True)
        _check(dataclasses.replace(scenario, engine=engine))


@different_examples(1.5)
@given(
    scenarios(),
    st.sampled_from([1, 2, 16]),
    st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    st.sampled_from([0, 0, 1, 5]),
    st.sampled_from([0.3, 0.6, 1.0]),
)
def test_protection_equals_the_naive_engine_in_windowed_caches(
    scenario: Scenario, jobs: int, window: int, num_sinks: int, share: float
) -> None:
    """What a waiting request hits there are the blocks that its next query needs, and no others are protected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.scheduler.protection.PROTECTED", jobs)
        patch.setattr("naive_engine.NaiveEngine.protected", jobs)
        changes: dict[str, Any] = {
            "cache": dataclasses.replace(scenario.cache, window=window, num_sinks=num_sinks),
            "engine": dataclasses.replace(scenario.engine, protect_waiting_hits=True),
            "build": dataclasses.replace(scenario.build, enable_paged_kv_cache=True),
            "num_blocks": max(1, round(share * scenario.num_blocks)),
        }
        _check(dataclasses.replace(scenario, **changes))


@different_examples(1)
@given(
    scenarios(),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["", "host", "partial"]),
    st.integers(1, 12),
    st.sampled_from([None, None, 2, 3, 6]),
)
def test_protection_skips_as_it_steps_in_every_kind_of_cache(
    scenario: Scenario, policy: str, kind: str, host: int, window: int | None
) -> None:
    build = dataclasses.replace(scenario.build, enable_paged_kv_cache=True)
    cache = CacheConfig(policy=policy, enable_partial_reuse=kind == "partial", window=window)
    engine = dataclasses.replace(scenario.engine, protect_waiting_hits=True)
    if kind == "host":
        engine = dataclasses.replace(engine, preemption="swap")
    num_host_blocks = host if kind == "host" else 0
    changes: dict[str, Any] = {"build": build, "cache": cache, "engine": engine}
    scenario = dataclasses.replace(scenario, num_host_blocks=num_host_blocks, **changes)
    assert_identical(scenario.run(), scenario.run(skipping=False))


def test_it_pays_where_sessions_wait() -> None:
    """Sessions that come back to a queue, and a pool in which their earlier turns hardly survive: hits rise."""
    config = WorkloadConfig(
        num_requests=200, requests_per_s=30.0, turns_mean=4.0, think_s_mean=1.0, user_tokens_mean=128.0
    )
    requests = list(generate(config))
    cost = RooflineCost(MODEL_PRESETS["llama-3-8b"], GPU_PRESETS["a100-80gb"])
    hits = []
    for engine in (EngineConfig(), PROTECT):
        build = BuildConfig(8, 1024, 16384, tokens_per_block=16)
        result = Scenario(requests, build, 800, engine=engine, cost=cost).run()
        hits.append(result.cache.hit_tokens)
    assert hits[1] > 1.05 * hits[0]


@pytest.mark.parametrize("num_blocks", [4, 6])
@pytest.mark.parametrize("protect", [False, True])
def test_of_what_is_hit_only_the_window_is_protected(protect: bool, num_blocks: int) -> None:
    """Blocks of 4, a window of 4 tokens, one request at a time. A leaves 3 blocks, then B 2; D says what A said.

        a step takes 10 ps, and 1 for each prompt token
        A (0, 22), B (22, 40), C's prompt (40, 54) and 9 tokens (54, 144), D

    To go on behind A's 12 tokens, D needs A's third block alone. C takes 4 blocks in all. Of 6, one is free; then
    A's go, the first first, and the third is the fourth that C takes: or B's first, if it is kept for D. Of 4, B has
    taken A's first already; C takes the second, and then the third, or B's and what has left its own window.
    """
    requests = [_says(0, 0, 12, 1, 0), _says(1, 20, 8, 1, 1), Request(2, 40, 4, 10), _says(3, 45, 16, 1, 0)]
    build = BuildConfig(1, 16, 64, tokens_per_block=4)
    engine = EngineConfig(protect_waiting_hits=protect)
    cost = LinearCost(10, prefill=1)
    result = _check(Scenario(requests, build, num_blocks, CacheConfig(window=4), engine, cost))
    assert result.requests["hit_tokens"].tolist() == [0, 0, 0, 12 if protect else 0]
    assert result.requests["finish_ps"].tolist() == [22, 40, 144, 144 + 10 + (4 if protect else 16)]


def test_what_admission_looks_up_in_a_step_that_fills_a_block_is_protected_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three blocks of 2, a window of 1, one request protected. C, from 60 to 130, generates what D says.

    In the step at 70, C fills the block that D will hit. Admission sees it in that very step, but has no room for D.
    C lets go of the block at 90, and takes another at 100 and 120: its own second one, not the one kept for D.
    """
    for name in ("sim.scheduler.protection.PROTECTED", "naive_engine.NaiveEngine.protected"):
        monkeypatch.setattr(name, 1)
    story = np.zeros(11, dtype=np.int64)
    rows = [(0, 1, 1), (0, 1, 6), (0, 1, 7), (30, 3, 8)]
    requests = [
        Request(row, at, prompt, output, story[: prompt + output], 1, named_tokens=prompt + output)
        for row, (at, prompt, output) in enumerate(rows)
    ]
    build = BuildConfig(3, 3, 32, tokens_per_block=2)
    result = _check(Scenario(requests, build, 3, CacheConfig(window=1), PROTECT))
    assert result.requests["admit_ps"].tolist() == [0, 0, 60, 130]
    assert result.requests["hit_blocks"].tolist() == [0, 0, 0, 1]


# ------------------------------------------------------------------ the policy alone


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_protected_blocks_go_last_whatever_the_policy(name: str) -> None:
    """Four stories of 3 blocks fill the pool; two are protected, one of them in part, and others take 7 blocks."""
    policy = protecting(make_policy(name))
    manager = KVCacheManager(12, 2, policy=policy)
    stories = [TokenContent([story] * 6) for story in range(4)]
    for story in stories:
        manager.release(manager.admit(story, 6))
    paths = []
    for story, tokens in ((1, 6), (2, 5)):
        match = manager.lookup(TokenContent([story] * tokens))
        extent, blocks = match.path[0]
        paths.append(manager.pool.split(extent, blocks))
    policy.protect("one", paths[:1])
    policy.protect("two", paths[1:])
    manager.check_invariants()
    assert policy.num_protected == 4
    others = [manager.admit(TokenContent([10 + k] * 2), 2) for k in range(8)]  # all that is not protected
    manager.check_invariants()
    assert [manager.lookup(TokenContent([*[story] * 6, 9])).hit_blocks for story in range(4)] == [0, 2, 2, 0]
    assert policy.protects("one")
    others.append(manager.admit(TokenContent([20] * 2), 2))
    assert not policy.protects("one")
    assert policy.num_protected == 0
    assert sum(manager.lookup(TokenContent([*[story] * 6, 9])).hit_blocks for story in (1, 2)) == 3
    for sequence in others:
        manager.release(sequence)
    manager.check_invariants()
    assert manager.available_blocks == 12


@different_examples(1)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=40),
    st.sampled_from([None, 1, 3, 4]),
)
def test_any_order_of_protecting_and_using(
    name: str, moves: list[tuple[int, int]], window: int | None
) -> None:
    """Prompts of two symbols come, go and are protected; what is protected stays while another block could go."""
    policy = protecting(make_policy(name), windowed=window is not None)
    manager = KVCacheManager(8, 2, CacheConfig(window=window), policy=policy)
    running: list[Any] = []
    wanted: dict[int, TokenContent] = {}
    for move, number in moves:
        content = TokenContent([int(bit) for bit in f"{number % 32:05b}"[number % 3 :]] + [1] * (number % 4))
        before = {key: _protected(policy, key) for key in wanted if policy.protects(key)}
        evicted = manager.pool.evicted_blocks
        unprotected = manager.pool.num_evictable - policy.num_protected
        if move <= 2 and manager.can_admit(
            manager.lookup(content), content.num_prompt_tokens - manager.lookup(content).hit_tokens
        ):
            match = manager.lookup(content)
            free = manager.pool.num_free
            hits_of_others = match.evictable_blocks
            needed = -(-content.num_prompt_tokens // 2) - match.hit_blocks
            running.append(manager.admit(content, content.num_prompt_tokens - match.hit_tokens, match))
            if needed <= free + unprotected - hits_of_others:
                assert all(_protected(policy, key) == blocks for key, blocks in before.items())
                assert manager.pool.evicted_blocks - evicted <= max(needed - free, 0)
        elif move == 3 and running:
            manager.release(running.pop(number % len(running)))
        elif move == 4:
            path = []
            for extent, blocks in manager.lookup(content).path:
                whole = blocks * extent.width == len(extent.keys)
                path.append(extent if whole else manager.pool.split(extent, blocks))
            policy.protect(number % 3, path)
            wanted[number % 3] = content
        elif move == 5:
            policy.unprotect(number % 3)
        manager.check_invariants()
    for sequence in running:
        manager.release(sequence)
    everything = manager.admit(TokenContent([5] * 16), 16)
    assert manager.pool.num_evictable == 0
    manager.release(everything)
    manager.check_invariants()


def _protected(policy: Protecting, key: int) -> set[int]:
    """Return the blocks that are protected with a key."""
    return {block for extent, keys in policy._guards.items() if key in keys for block in extent.ids}


_IN_TWO_STEPS = Scenario(
    [
        Request(row, arrival, prompt, output, np.array(ids), 1, named_tokens=len(ids))
        for row, (arrival, prompt, output, ids) in enumerate(
            [(120, 3, 5, [0, 0, 0]), (120, 1, 1, [0, 0]), (150, 1, 1, [0, 1])]
        )
    ],
    BuildConfig(20, 220, 9, tokens_per_block=2),
    4,
    engine=EngineConfig(queue_order="shortest"),
    cost=LinearCost(1, prefill=7, windows=(5,), window_slopes=(1,)),
)
"""Found at random: with a log, its longest stretch began a step later."""


@different_examples(1)
@given(scenarios(), st.sampled_from(sorted(POLICIES)), st.integers(1, 3))
@example(_IN_TWO_STEPS, "slru", 1)
def test_a_log_changes_nothing_that_is_protected(scenario: Scenario, policy: str, jobs: int) -> None:
    """Nor where stretches are cut: a log wants to know of each block that fills, which else waits."""
    scenario = dataclasses.replace(scenario, cache=dataclasses.replace(scenario.cache, policy=policy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.scheduler.protection.PROTECTED", jobs)
        engine = dataclasses.replace(scenario.engine, protect_waiting_hits=True)
        without = dataclasses.replace(scenario, engine=engine).run()
        engine = dataclasses.replace(engine, events=True)
        assert_identical(dataclasses.replace(scenario, engine=engine).run(), without)
