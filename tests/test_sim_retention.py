"""Retention in the simulator: who is hit by hand, the naive engine, skipping against stepping, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_cases import ClusterScenario, assert_same_cluster
from engine_cases import LinearCost, Scenario, assert_as_naive, assert_identical, scenarios
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.config import BuildConfig, CacheConfig
from allocator.eviction import POLICIES
from experiments.tools import sweep
from sim.cluster.config import ClusterConfig
from sim.records import RunResult
from sim.replay import main
from sim.request import PS_PER_S, Request
from sim.scheduler.retention import RetentionOptions
from sim.workload import WorkloadConfig, generate

PRIORITIES = st.sampled_from([None, None, 0, 20, 35, 36, 90])
DURATIONS_PS = st.sampled_from([None, None, 1, 5, 10, 14, 25, 60, 200])


def _seconds(duration_ps: int | None) -> float | None:
    return None if duration_ps is None else duration_ps / PS_PER_S


@st.composite
def _options(draw: st.DrawFn, has_sessions: bool) -> RetentionOptions:
    parts: dict[str, Any] = {}
    for part in ("head", "prompt", "output"):
        parts[f"{part}_priority"] = priority = draw(PRIORITIES)
        if priority not in (None, 35):
            parts[f"{part}_duration_s"] = _seconds(draw(DURATIONS_PS))
    if parts["head_priority"] is not None:
        parts["head_tokens"] = draw(st.integers(1, 20))
    if has_sessions:
        parts["session_priority"] = draw(PRIORITIES)
    return RetentionOptions(**parts)


def _begins_with(request: Request, symbol: int) -> Request:
    """Return the same request, if it says anything, with another beginning."""
    changes: dict[str, Any] = {}
    for name in ("chunk_ids", "token_ids"):
        if (ids := getattr(request, name)) is not None:
            changes[name] = ids.copy()
            changes[name][0] = symbol
    return dataclasses.replace(request, **changes)


@st.composite
def _conversations(draw: st.DrawFn, requests: Sequence[Request]) -> list[Request]:
    """Twice as many requests, which begin in one of four ways, and some of which follow others."""
    found: list[Request] = []
    for request in (*requests, *requests):
        row, parent = len(found), -1
        if row and draw(st.integers(0, 2)) == 0:
            parent = draw(st.integers(max(0, row - 2), row - 1))
        again = dataclasses.replace(
            request,
            request_id=row,
            arrival_ps=(found[-1].arrival_ps if row else 0) + draw(st.sampled_from([0, 10, 15, 30, 90])),
            parent=parent,
            think_ps=0 if parent < 0 else draw(st.sampled_from([0, 3, 20, 50, 100])),
        )
        found.append(_begins_with(again, draw(st.integers(10, 13))))
    return found


@st.composite
def retaining(draw: st.DrawFn) -> Scenario:
    """A scenario in which requests want their blocks kept, and some of them follow others."""
    scenario = draw(scenarios())
    requests = draw(_conversations(scenario.requests))
    options = draw(_options(any(request.parent >= 0 for request in requests)))
    cache = dataclasses.replace(
        scenario.cache,
        policy="priority",
        enable_block_reuse=True,
        enable_partial_reuse=draw(st.sampled_from([False, False, True])),
        copy_on_partial_reuse=draw(st.booleans()),
    )
    build = dataclasses.replace(scenario.build, enable_paged_kv_cache=True)
    engine = dataclasses.replace(
        scenario.engine, protect_waiting_hits=draw(st.sampled_from([False, False, True]))
    )
    scenario = dataclasses.replace(
        scenario,
        requests=requests,
        num_blocks=scenario.num_blocks + draw(st.integers(0, scenario.num_blocks)),
        cache=cache,
        build=build,
        engine=engine,
        retention=options,
    )
    if _is_refused(scenario):
        return dataclasses.replace(scenario, retention=RetentionOptions(prompt_priority=90))
    return scenario


def _is_refused(scenario: Scenario) -> bool:
    assert scenario.retention is not None
    try:
        scenario.retention.check(scenario.build, scenario.cache, has_host=scenario.num_host_blocks > 0)
    except ValueError:
        return True
    return False


def _check(scenario: Scenario) -> RunResult:
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


# ------------------------------------------------------------------ by hand
#
# One request at a time, a step of 10 ps each, blocks of 4 tokens. A request's letters are its blocks; it generates one
# token unless said otherwise, whose KV is never written.


def _says(row: int, arrival_ps: int, blocks: str, output: int = 1, **fields: Any) -> Request:
    ids = np.array([ord(block) for block in blocks], dtype=np.int64)
    tokens = 4 * len(blocks)
    return Request(row, arrival_ps, tokens, output, ids, 4, named_tokens=tokens, **fields)


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
    requests = [_says(0, 0, "Sa"), _says(1, 20, "Tb"), _says(2, 40, "cd"), _says(3, 60, "Se")]
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
        _says(0, 0, "Aa"),
        _says(1, 0, "Aae", parent=0, think_ps=think_ps),
        _says(2, 20, "Bb"),
        _says(3, 25, "cd"),
    ]
    result = _serve(requests, retention, 4)
    assert result.requests["hit_tokens"].tolist() == [0, hits, 0, 0]


def test_the_last_turn_of_a_session_lets_go() -> None:
    """Of 5 blocks, A and its next turn, at 80, leave 3, and B the other two at 100. C takes two: the least recently
    used, e and a, as nobody follows any more; A is left for D.

    By the trace, that turn is due at 70. This is 70 after A was admitted, so the pin would last until 80.
    """
    requests = [
        _says(0, 0, "Aa"),
        _says(1, 70, "Aae", parent=0),
        _says(2, 90, "Bb"),
        _says(3, 110, "cd"),
        _says(4, 130, "Aaf"),
    ]
    result = _serve(requests, RetentionOptions(session_priority=90), 5)
    assert result.requests["hit_tokens"].tolist() == [0, 8, 0, 0, 4]


def test_a_turn_keeps_what_others_go_on_from_as_well() -> None:
    """The same, but a second turn follows A, at 210: the first one, over at 40, leaves its three blocks pinned."""
    requests = [
        _says(0, 0, "Aa"),
        _says(1, 0, "Aae", parent=0, think_ps=20),
        _says(2, 0, "Aaf", parent=0, think_ps=200),
        _says(3, 90, "Bb"),
        _says(4, 110, "cd"),
    ]
    result = _serve(requests, RetentionOptions(session_priority=90), 5)
    assert result.requests["hit_tokens"].tolist() == [0, 8, 8, 0, 0]


def test_a_stretch_ends_where_a_retention_was_to_be_over_that_its_first_step_evicts() -> None:
    """X, at 10, and Y, at 20, leave 3 blocks for 45 ps each. P's first step of decoding, at 30, evicts X."""
    requests = [_says(0, 0, "X"), _says(1, 0, "Yy"), _says(2, 0, "Pp", output=5)]
    result = _serve(requests, RetentionOptions(prompt_priority=20, prompt_duration_s=45e-12), 5)
    rows = np.stack([result.timeline[name] for name in ("start_ps", "end_ps", "evicted_blocks")], axis=1)
    assert rows.tolist() == [[0, 10, 0], [10, 20, 0], [20, 30, 0], [30, 60, 1], [60, 70, 0]]


# ------------------------------------------------------------------ at random


@settings(max_examples=3 * settings().max_examples)
@given(retaining())
def test_equals_the_naive_engine_skipping_or_not(scenario: Scenario) -> None:
    _check(scenario)


@settings(max_examples=2 * settings().max_examples)
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


@settings(max_examples=3 * settings().max_examples)
@given(_variants())
def test_skipping_equals_stepping_whatever_else_there_is(scenario: Scenario) -> None:
    assert_identical(scenario.run(), scenario.run(skipping=False))


@settings(max_examples=2 * settings().max_examples)
@given(retaining(), st.sampled_from([1, 2, 3]), st.booleans())
def test_skipping_equals_stepping_on_several_replicas(scenario: Scenario, replicas: int, apart: bool) -> None:
    fields = {each.name: getattr(scenario, each.name) for each in dataclasses.fields(scenario)}
    cost, retention = dataclasses.replace(scenario.cost, base=7), scenario.retention
    cluster = ClusterConfig(replicas, "least_loaded")
    if apart:
        cluster = ClusterConfig(replicas + 1, "longest_prefix", 1)
        retention = dataclasses.replace(retention, session_priority=None)
        if _is_refused(dataclasses.replace(scenario, retention=retention)):
            retention = RetentionOptions(output_priority=20)
        if scenario.engine.admission == "static_batch":
            fields["engine"] = dataclasses.replace(scenario.engine, admission="max_utilization")
    fields.update(cost=cost, retention=retention)
    several = ClusterScenario(**fields, cluster=cluster)
    assert_same_cluster(several.run(), several.run(skipping=False))


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


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_priority": 101, "head_tokens": 4}, r"head_priority (101) must be at most 100"),
        ({"output_priority": -1}, r"output_priority (-1) must be at least 0"),
        ({"head_tokens": -1}, r"head_tokens (-1) must be at least 0"),
        ({"head_tokens": 4}, r"head_tokens (4) needs head_priority"),
        ({"head_priority": 90}, r"head_priority (90) needs head_tokens, to say of how many"),
        ({"prompt_duration_s": 1.0}, r"prompt_duration_s (1.0) needs a prompt_priority other than 35"),
        (
            {"prompt_priority": 35, "prompt_duration_s": 1.0},
            r"prompt_duration_s (1.0) needs a prompt_priority other than 35, to which it returns",
        ),
        (
            {"output_priority": 9, "output_duration_s": 0.0},
            r"output_duration_s (0.0) must be above 0 and at most 1e+06",
        ),
        (
            {"output_priority": 9, "output_duration_s": float("nan")},
            r"output_duration_s (nan) must be above 0 and at most 1e+06",
        ),
    ],
)
def test_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        RetentionOptions(**fields)


KEPT = RetentionOptions(prompt_priority=90)


@pytest.mark.parametrize(
    ("retention", "build", "cache", "message"),
    [
        (KEPT, {"enable_paged_kv_cache": False}, {}, "prompt_priority (90) needs enable_paged_kv_cache"),
        (KEPT, {}, {"enable_block_reuse": False}, "prompt_priority (90) needs enable_block_reuse"),
        (
            RetentionOptions(prompt_priority=90, output_priority=90),
            {},
            {},
            "prompt_priority (90) needs a part that is kept otherwise: all would be kept alike",
        ),
        (
            RetentionOptions(4, 90, 2.0, 90, 2.0, 90, 2.0),
            {},
            {},
            "head_priority (90) needs a part that is kept otherwise",
        ),
        (RetentionOptions(session_priority=80), {}, {}, "session_priority (80) needs a trace with sessions"),
    ],
)
def test_what_makes_no_difference_is_refused(
    retention: RetentionOptions, build: dict[str, Any], cache: dict[str, Any], message: str
) -> None:
    scenario = Scenario(
        [_says(0, 0, "ab"), _says(1, 0, "cd")],
        BuildConfig(1, 100, 100, tokens_per_block=4, **build),
        40,
        CacheConfig(**{"policy": "priority", **cache}),
        retention=retention,
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        scenario.run()


@settings(max_examples=2 * settings().max_examples)
@given(retaining(), st.sampled_from([36, 90, 20]), st.sampled_from([None, 1, 14, 25, 60]), st.integers(0, 9))
def test_where_all_is_kept_alike_it_is_as_if_nothing_were_said(
    scenario: Scenario, priority: int, duration_ps: int | None, head_tokens: int
) -> None:
    """Why that is refused: what is used last is over last."""
    wish = (priority, _seconds(duration_ps if priority > 35 else None))
    head = wish if head_tokens else (None, None)
    retention = RetentionOptions(head_tokens, *head, *wish, *wish)
    assert _is_refused(dataclasses.replace(scenario, retention=retention))
    silent = dataclasses.replace(scenario, retention=None).run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetentionOptions, "check", lambda *_, **__: None)
        heard = dataclasses.replace(scenario, retention=retention).run()
    for name, column in silent.requests.items():
        assert column.tolist() == heard.requests[name].tolist()


def test_host_memory_takes_what_is_kept_dearly_whatever_the_policy() -> None:
    """A's two blocks are evicted for B's three. Host memory takes the first, of 90, and not the other, below 50."""
    requests = [_says(0, 0, "Aa"), _says(1, 20, "Bbc"), _says(2, 40, "Aac")]
    scenario = Scenario(
        requests, BuildConfig(1, 100, 100, tokens_per_block=4), 3, CacheConfig(offload_min_priority=50)
    )
    scenario = dataclasses.replace(scenario, num_host_blocks=4)
    assert scenario.run().requests["hit_tokens"].tolist() == [0, 0, 0]
    said = dataclasses.replace(scenario, retention=RetentionOptions(head_tokens=4, head_priority=90))
    assert said.run().requests["hit_tokens"].tolist() == [0, 0, 4]
    low = dataclasses.replace(scenario, retention=RetentionOptions(head_tokens=4, head_priority=40))
    message = "head_priority (40) needs policy priority, or offload_min_priority (50) between it and 35: lru looks at"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        low.run()


def test_sessions_are_not_pinned_where_prefill_is_apart() -> None:
    fields = {"retention": RetentionOptions(session_priority=80), "cache": CacheConfig(policy="priority")}
    requests = [_says(0, 0, "ab"), _says(1, 0, "abc", parent=0)]
    scenario = ClusterScenario(
        requests,
        BuildConfig(1, 100, 100, tokens_per_block=4),
        40,
        cluster=ClusterConfig(2, "round_robin", 1),
        **fields,
    )
    with pytest.raises(
        ValueError, match=r"^session_priority \(80\) must not be given with prefill_replicas: "
    ):
        scenario.run()


# ------------------------------------------------------------------ from the command line

RUN = ["synthetic", "--num-requests", "60", "--requests-per-s", "20", "--user-tokens-max", "400"]
RUN += ["--output-tokens-max", "60", "--turns-mean", "3", "--think-s-mean", "1", "--system-prompts", "3"]
RUN += [
    "--session-tokens-max",
    "2048",
    "--max-seq-len",
    "4096",
    "--num-blocks",
    "300",
    "--tokens-per-block",
    "16",
]
KEEPING = [
    "--policy",
    "priority",
    "--head-tokens",
    "512",
    "--head-priority",
    "90",
    "--session-priority",
    "80",
]
KEEPING += ["--output-priority", "20", "--output-duration-s", "0.5"]
TABLES = ("requests.parquet", "timeline.parquet")


def _replay(out: Path, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--no-figures", "--out", str(out)]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_flags_reach_the_run_and_its_manifest(tmp_path: Path) -> None:
    silent = _replay(tmp_path / "silent", *RUN, "--policy", "priority")
    kept = _replay(tmp_path / "kept", *RUN, *KEEPING)
    assert kept["hit_tokens"] != silent["hit_tokens"]
    said = json.loads((tmp_path / "kept" / "manifest.json").read_text())["config"]["retention"]
    assert said == dataclasses.asdict(
        RetentionOptions(512, 90, output_priority=20, output_duration_s=0.5, session_priority=80)
    )
    _replay(tmp_path / "again", "--from-manifest", str(tmp_path / "kept" / "manifest.json"))
    _replay(tmp_path / "stepped", *RUN, *KEEPING, "--no-event-skipping")
    for name in TABLES:
        kept_bytes = (tmp_path / "kept" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == kept_bytes
        assert (tmp_path / "stepped" / name).read_bytes() == kept_bytes


def test_flags_vary_in_a_sweep(tmp_path: Path) -> None:
    flags = ["--jobs", "1", "--no-figures", "--vary", "session_priority=35,80", "--out", str(tmp_path)]
    assert sweep.main([*flags, "--", *RUN, "--policy", "priority"]) == 0
    with (tmp_path / sweep.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["session_priority"] for row in rows] == ["35", "80"]
    assert rows[0]["hit_tokens"] != rows[1]["hit_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--head-tokens", "512", "--head-priority", "90"],
            "head_priority (90) needs policy priority: lru looks at",
        ),
        (["--policy", "priority", "--head-tokens", "512"], "head_tokens (512) needs head_priority"),
        (
            ["--policy", "priority", "--prompt-priority", "80", "--output-priority", "80"],
            "prompt_priority (80) needs a part that is kept otherwise",
        ),
        (
            ["--policy", "priority", "--session-priority", "80", "--turns-mean", "1"],
            "session_priority (80) needs a trace with sessions",
        ),
        (
            [
                "--policy",
                "priority",
                "--session-priority",
                "80",
                "--num-replicas",
                "2",
                "--prefill-replicas",
                "1",
            ],
            "session_priority (80) must not be given with prefill_replicas",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *flags, "--no-figures", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
