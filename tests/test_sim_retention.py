"""Retention in the simulator: who is hit by hand, the naive engine, and skipping against stepping."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from cluster_cases import ClusterScenario, assert_same_cluster
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, assert_as_naive, assert_identical
from hypothesis import given
from hypothesis import strategies as st
from retention_cases import is_refused, retaining, says

from allocator.config import BuildConfig, CacheConfig
from allocator.eviction import POLICIES
from sim.cluster.config import ClusterConfig
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.retention import RetentionOptions
from sim.workload import WorkloadConfig, generate


def _check(scenario: Scenario) -> RunResult:
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


# ------------------------------------------------------------------ by hand
#
# One request at a time, a step of 10 ps each, blocks of 4 tokens. A request's letters are its blocks; it generates one
# token unless said otherwise, whose KV is never written.


def _serve(requests: Sequence[Request], retention: RetentionOptions | None, num_blocks: int) -> RunResult:
    return _check(
        Scenario(
            requests,
            BuildConfig(1, 100, 100, tokens_per_block=4),
            num_blocks,
            CacheConfig(policy="priority"),
            cost=LinearCost(10),
            retention=retention,
        )
    )


@pytest.mark.parametrize(
    ("retention", "hits"),
    [
        (None, 0),
        (RetentionOptions(head_tokens=4, head_priority=35), 0),
        (RetentionOptions(head_tokens=4, head_priority=90), 4),
        (RetentionOptions(head_tokens=4, head_priority=90, head_duration_s=15e-12), 0),
        (RetentionOptions(head_tokens=4, head_priority=90, head_duration_s=25e-12), 4),
        (RetentionOptions(head_tokens=1, head_priority=90), 4),
        (RetentionOptions(head_tokens=4, head_priority=20, prompt_priority=0), 4),
        (RetentionOptions(head_tokens=4, head_priority=20, prompt_priority=90), 0),
    ],
)
def test_a_system_prompt_is_kept_more_dearly_than_what_follows(
    retention: RetentionOptions | None, hits: int
) -> None:
    """Of 4 blocks, A leaves S and a at 10, and B leaves T and b at 30. C, at 40, takes two; D, at 60, begins with S.

    The least recently used go first, a and then S. Where heads are kept more dearly, it is a and then b. For 15 ps
    only, S is over at 25, before b is given back; for 25 ps, it is over at 35, and counts as used then. Where heads are
    kept less dearly than what follows them, a goes all the same before S is exposed, but then S does.
    """
    requests = [says(0, 0, "Sa"), says(1, 20, "Tb"), says(2, 40, "cd"), says(3, 60, "Se")]
    result = _serve(requests, retention, 4)
    assert result.requests["hit_tokens"].tolist() == [0, 0, 0, hits]


@pytest.mark.parametrize(
    ("priority", "think_ps", "hits"), [(None, 100, 0), (90, 100, 8), (90, 21, 8), (90, 20, 0), (20, 100, 0)]
)
def test_a_session_is_pinned_until_its_next_turn_is_due(
    priority: int | None, think_ps: int, hits: int
) -> None:
    """Of 4 blocks, A leaves 2 at 10, and B, at 30, the other two. C, which waits for B, takes two of them.

    The least recently used are A's, unless they are pinned. They are until A's next turn is due: at 30, when C starts,
    it is over, and they count as used before B's, which are given back then.
    """
    retention = None if priority is None else RetentionOptions(session_priority=priority)
    requests = [
        says(0, 0, "Aa"),
        says(1, 0, "Aae", parent=0, think_ps=think_ps),
        says(2, 20, "Bb"),
        says(3, 25, "cd"),
    ]
    result = _serve(requests, retention, 4)
    assert result.requests["hit_tokens"].tolist() == [0, hits, 0, 0]


def test_the_last_turn_of_a_session_lets_go() -> None:
    """Of 5 blocks, A and its next turn, at 80, leave 3, and B the other two at 100. C takes two: the least recently
    used, e and a, as nobody follows any more; A is left for D.

    By the trace, that turn is due at 70. This is 70 after A was admitted, so the pin would last until 80.
    """
    requests = [
        says(0, 0, "Aa"),
        says(1, 70, "Aae", parent=0),
        says(2, 90, "Bb"),
        says(3, 110, "cd"),
        says(4, 130, "Aaf"),
    ]
    result = _serve(requests, RetentionOptions(session_priority=90), 5)
    assert result.requests["hit_tokens"].tolist() == [0, 8, 0, 0, 4]


def test_a_turn_that_comes_late_waits_for_no_turn_that_has_passed() -> None:
    """Two turns follow A: one after 50, at 60, and one that the trace lets arrive at 1000. When that ends, nobody is to
    come: of 5 blocks, B takes the one of the first turn and a free one, and C f and a.
    """
    requests = [
        says(0, 0, "Aa"),
        says(1, 0, "Aae", parent=0, think_ps=50),
        says(2, 1000, "Aaf", parent=0),
        says(3, 1010, "Bb"),
        says(4, 1030, "cd"),
        says(5, 1050, "Aag"),
    ]
    result = _serve(requests, RetentionOptions(session_priority=90), 5)
    assert result.requests["hit_tokens"].tolist() == [0, 8, 8, 0, 0, 4]


def test_a_turn_keeps_what_others_go_on_from_as_well() -> None:
    """The same, but a second turn follows A, at 210: the first one, over at 40, leaves its three blocks pinned."""
    requests = [
        says(0, 0, "Aa"),
        says(1, 0, "Aae", parent=0, think_ps=20),
        says(2, 0, "Aaf", parent=0, think_ps=200),
        says(3, 90, "Bb"),
        says(4, 110, "cd"),
    ]
    result = _serve(requests, RetentionOptions(session_priority=90), 5)
    assert result.requests["hit_tokens"].tolist() == [0, 8, 8, 0, 0]


def test_a_stretch_ends_where_a_retention_was_to_be_over_that_its_first_step_evicts() -> None:
    """X, at 10, and Y, at 20, leave 3 blocks for 45 ps each. P's first step of decoding, at 30, evicts X."""
    requests = [says(0, 0, "X"), says(1, 0, "Yy"), says(2, 0, "Pp", output=5)]
    result = _serve(requests, RetentionOptions(prompt_priority=20, prompt_duration_s=45e-12), 5)
    rows = np.stack([result.timeline[name] for name in ("start_ps", "end_ps", "evicted_blocks")], axis=1)
    assert rows.tolist() == [[0, 10, 0], [10, 20, 0], [20, 30, 0], [30, 60, 1], [60, 70, 0]]


# ------------------------------------------------------------------ at random


@different_examples(1.5)
@given(retaining())
def test_equals_the_naive_engine_skipping_or_not(scenario: Scenario) -> None:
    _check(scenario)


@different_examples(1)
@given(retaining(), st.integers(1, 12), st.integers(0, 5))
def test_windows_equal_the_naive_engine_skipping_or_not(
    scenario: Scenario, window: int, num_sinks: int
) -> None:
    cache = dataclasses.replace(scenario.cache, window=window, num_sinks=num_sinks)
    engine = dataclasses.replace(scenario.engine, protect_waiting_hits=False)
    _check(dataclasses.replace(scenario, cache=cache, engine=engine))


@st.composite
def _variants(draw: st.DrawFn) -> Scenario:
    """The same with what the naive engine has not: windows, host memory, swapping, blocks that are hit in part."""
    scenario = draw(retaining())
    engine, cache = scenario.engine, scenario.cache
    if draw(st.booleans()):
        window, num_sinks = draw(st.integers(1, 12)), draw(st.integers(0, 5))
        cache = dataclasses.replace(cache, window=window, num_sinks=num_sinks)
        engine = dataclasses.replace(engine, protect_waiting_hits=False)
    host = draw(st.sampled_from([0, 1, 5, 20]))
    if host:
        cache = dataclasses.replace(cache, offload_min_priority=draw(st.sampled_from([0, 30, 35, 50])))
        engine = dataclasses.replace(engine, preemption=draw(st.sampled_from(["recompute", "swap"])))
    return dataclasses.replace(scenario, engine=engine, cache=cache, num_host_blocks=host)


@different_examples(1.5)
@given(_variants())
def test_skipping_equals_stepping_whatever_else_there_is(scenario: Scenario) -> None:
    assert_identical(scenario.run(), scenario.run(skipping=False))


@different_examples(1)
@given(retaining(), st.sampled_from([1, 2, 3]), st.booleans())
def test_skipping_equals_stepping_on_several_replicas(scenario: Scenario, replicas: int, apart: bool) -> None:
    fields = {each.name: getattr(scenario, each.name) for each in dataclasses.fields(scenario)}
    cost, retention = dataclasses.replace(scenario.cost, base=7), scenario.retention
    cluster = ClusterConfig(replicas, "least_loaded")
    if apart:
        cluster = ClusterConfig(replicas + 1, "longest_prefix", 1)
        retention = dataclasses.replace(retention, session_priority=None)
        if is_refused(dataclasses.replace(scenario, retention=retention)):
            retention = RetentionOptions(output_priority=20)
        if scenario.engine.admission == "static_batch":
            fields["engine"] = dataclasses.replace(scenario.engine, admission="max_utilization")
    fields.update(cost=cost, retention=retention)
    several = ClusterScenario(**fields, cluster=cluster)
    assert_same_cluster(several.run(), several.run(skipping=False))


@different_examples()
@given(retaining())
def test_a_replica_alone_is_the_plain_engine(scenario: Scenario) -> None:
    scenario = dataclasses.replace(scenario, cost=dataclasses.replace(scenario.cost, base=7))
    fields = {each.name: getattr(scenario, each.name) for each in dataclasses.fields(scenario)}
    alone, plain = ClusterScenario(**fields).run(), scenario.run()
    for name in ("admit_ps", "first_token_ps", "finish_ps", "hit_tokens", "preemptions"):
        assert alone.requests[name].tolist() == plain.requests[name].tolist()
    assert alone.cache.evicted_blocks == plain.cache.evicted_blocks


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"priority"}))
def test_the_policies_that_are_refused_look_at_other_things(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is said of blocks changes nothing that they do; the one that is accepted does other things."""
    trace = generate(
        WorkloadConfig(
            num_requests=60,
            requests_per_s=40.0,
            system_prompts=4,
            system_prompt_tokens=64,
            turns_mean=3.0,
            user_tokens_max=200,
            output_tokens_max=60,
            session_tokens_max=1500,
            think_s_mean=1.0,
        )
    )
    said = RetentionOptions(64, 90, prompt_priority=20, prompt_duration_s=0.5, session_priority=80)
    scenario = Scenario(
        list(trace), BuildConfig(8, 256, 2048, tokens_per_block=16), 140, cost=LinearCost(10**10)
    )
    with pytest.raises(ValueError, match=rf"head_priority \(90\) needs policy priority: {policy} looks at"):
        dataclasses.replace(scenario, cache=CacheConfig(policy=policy), retention=said).run()
    monkeypatch.setattr(RetentionOptions, "check", lambda *_, **__: None)
    for name in (policy, "priority"):
        silent = dataclasses.replace(scenario, cache=CacheConfig(policy=name)).run()
        heard = dataclasses.replace(scenario, cache=CacheConfig(policy=name), retention=said).run()
        assert silent.cache.evicted_blocks > 0
        same = silent.requests["hit_blocks"].tolist() == heard.requests["hit_blocks"].tolist()
        assert same == (name != "priority")
