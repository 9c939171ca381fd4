"""Workloads: reproducible, of the statistics asked for, and with content that is shared exactly as said."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import as_values, same_requests

from sim.request import PS_PER_S, Request
from sim.traces.describe import describe
from sim.workload import WorkloadConfig, generate

configs = st.builds(
    WorkloadConfig,
    num_requests=st.integers(1, 60),
    workload_seed=st.integers(0, 2**40),
    requests_per_s=st.floats(0.01, 100),
    arrival_cv=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    user_tokens_mean=st.floats(1, 80),
    user_tokens_sigma=st.sampled_from([0.0, 0.7, 2.0]),
    user_tokens_min=st.integers(1, 5),
    user_tokens_max=st.integers(5, 90),
    output_tokens_mean=st.floats(1, 40),
    output_tokens_max=st.integers(1, 60),
    system_prompts=st.integers(0, 4),
    system_prompt_tokens=st.integers(17, 60),
    system_prompt_share=st.sampled_from([0.0, 0.5, 1.0]),
    turns_mean=st.sampled_from([1.0, 2.5, 8.0]),
    turns_max=st.integers(1, 10),
    session_tokens_max=st.one_of(st.none(), st.integers(210, 600)),
    think_s_mean=st.sampled_from([0.0, 0.1, 30.0]),
    sampling_share=st.sampled_from([0.0, 0.3, 1.0]),
    beam_share=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    content_tokens_per_chunk=st.integers(1, 17),
)


COARSE: dict[str, Any] = {"content_tokens_per_chunk": 4096}
"""Few content ids, where it is not content that is looked at: describing them takes most of the time."""


def ids(request: Request) -> list[int]:
    assert request.chunk_ids is not None
    return request.chunk_ids.tolist()


@given(configs)
def test_any_workload_keeps_its_promises(config: WorkloadConfig) -> None:
    trace = generate(config)
    rows = list(trace)
    assert len(rows) == config.num_requests
    assert rows[0].arrival_ps == 0
    assert all(a.arrival_ps <= b.arrival_ps for a, b in itertools.pairwise(rows))
    system = config.system_prompt_tokens if config.system_prompts else 0
    followed = {request.parent for request in rows}
    for row, request in enumerate(rows):
        assert request.request_id == row
        assert config.output_tokens_min <= request.output_tokens <= config.output_tokens_max
        assert request.num_samples in (1, config.samples_per_request)
        assert request.beam_width in ((1, config.beams_per_request) if request.num_samples == 1 else (1,))
        if config.session_tokens_max is not None:
            assert request.prompt_tokens + request.output_tokens <= config.session_tokens_max
        if request.parent == -1:
            assert request.think_ps == 0
            user = request.prompt_tokens
            assert (
                config.user_tokens_min <= user <= config.user_tokens_max
                or config.user_tokens_min <= user - system <= config.user_tokens_max
            )
            continue
        before = rows[request.parent]
        said = before.prompt_tokens + before.output_tokens
        assert config.user_tokens_min <= request.prompt_tokens - said <= config.user_tokens_max
        assert request.arrival_ps == before.arrival_ps + request.think_ps
        # the turn repeats the prompt and the answer before it, as its predecessor named them
        # but for the answer of a beam search
        named = said if before.beam_width == 1 else before.prompt_tokens
        assert before.named_tokens == named
        assert ids(before) == ids(request)[: -(-named // config.content_tokens_per_chunk)]
        assert sum(other.parent == request.parent for other in rows) == 1
    named = [request.named_tokens for request in rows]
    if config.shares_content:
        assert all(
            tokens
            == request.prompt_tokens + (row in followed and request.beam_width == 1) * request.output_tokens
            or (row not in followed and tokens > request.prompt_tokens)  # its follower was cut off
            for row, (request, tokens) in enumerate(zip(rows, named, strict=True))
        )
    else:
        assert not any(named)


@given(configs)
@settings(max_examples=20)
def test_the_same_configuration_gives_the_same_requests(config: WorkloadConfig) -> None:
    trace, again = generate(config), generate(dataclasses.replace(config))
    assert same_requests(trace, again)
    assert trace.sha256 == again.sha256 == config.sha256
    other = dataclasses.replace(config, workload_seed=config.workload_seed + 1)
    assert other.sha256 != config.sha256


def test_content_is_shared_by_system_prompt_and_by_session_only() -> None:
    config = WorkloadConfig(
        num_requests=300,
        system_prompts=3,
        system_prompt_tokens=100,
        system_prompt_share=0.7,
        turns_mean=2.0,
        content_tokens_per_chunk=16,
        user_tokens_mean=60,
    )
    rows = list(generate(config))
    session = list(range(len(rows)))
    for request in rows:
        if request.parent >= 0:
            session[request.request_id] = session[request.parent]
    shared = 100 // 16
    owner: dict[int, int] = {}
    place: dict[int, int] = {}
    systems = set()
    for request in rows:
        for position, chunk in enumerate(ids(request)):
            assert place.setdefault(chunk, position) == position  # an id has one place in its prompts
            if chunk < config.system_prompts * shared:
                assert position < shared
                systems.add((chunk // shared, request.parent == -1))
            else:  # the straddling chunk included
                assert owner.setdefault(chunk, session[request.request_id]) == session[request.request_id]
        begins = ids(request)[0]
        if begins < config.system_prompts * shared:
            assert ids(request)[:shared] == list(range(begins, begins + shared))
            assert len(ids(request)) == shared or ids(request)[shared] >= config.system_prompts * shared
    assert {system for system, first in systems if first} == {0, 1, 2}
    first_turns = [request for request in rows if request.parent == -1]
    with_system = sum(ids(request)[0] < config.system_prompts * shared for request in first_turns)
    assert with_system / len(first_turns) == pytest.approx(0.7, abs=0.1)


def test_outputs_are_named_only_where_a_turn_repeats_them() -> None:
    # no pauses and far between: only the last session can be cut off by the number of requests
    config = WorkloadConfig(
        num_requests=200,
        requests_per_s=0.01,
        think_s_mean=0.0,
        turns_mean=6.0,
        user_tokens_max=500,
        output_tokens_max=300,
        session_tokens_max=1000,
    )
    rows = list(generate(config))
    followed = {request.parent for request in rows}
    ended = [request for request in rows[:-1] if request.request_id not in followed]
    assert sum(request.parent >= 0 for request in ended) > 10
    assert all(request.named_tokens == request.prompt_tokens for request in ended)


def test_single_prompts_share_nothing() -> None:
    """Where nothing can be shared, nothing needs a name: a request without ids equals no other."""
    trace = generate(WorkloadConfig(num_requests=50))
    assert all(request.chunk_ids is None and request.granularity == 0 for request in trace)
    assert describe(trace)["content"] is None


def test_statistics_are_those_asked_for() -> None:
    config = WorkloadConfig(
        num_requests=20_000,
        requests_per_s=7.0,
        user_tokens_mean=300,
        user_tokens_sigma=0.5,
        user_tokens_min=1,
        user_tokens_max=10**6,
        output_tokens_mean=50,
        output_tokens_sigma=1.0,
        output_tokens_max=10**6,
        sampling_share=0.25,
        beam_share=0.5,
        **COARSE,
    )
    trace = generate(config)
    figures = describe(trace)
    # standard errors at 20,000 draws are below 1%; seeds are fixed, so these hold or do not
    assert figures["requests_per_s"] == pytest.approx(7.0, rel=0.03)
    assert figures["arrival_cv"] == pytest.approx(1.0, abs=0.03)
    assert figures["prompt_tokens"]["mean"] == pytest.approx(300, rel=0.02)
    assert figures["prompt_tokens"]["p50"] == pytest.approx(300 * math.exp(-(0.5**2) / 2), rel=0.02)
    assert figures["output_tokens"]["mean"] == pytest.approx(50, rel=0.04)
    logs = np.log([request.prompt_tokens for request in trace])
    assert logs.std() == pytest.approx(0.5, rel=0.02)
    assert figures["sampled_requests"] / 20_000 == pytest.approx(0.25, abs=0.01)
    assert figures["searched_requests"] / 20_000 == pytest.approx(0.75 * 0.5, abs=0.01)


@pytest.mark.parametrize("cv", [0.0, 0.5, 3.0])
def test_arrivals_have_the_variation_asked_for(cv: float) -> None:
    figures = describe(
        generate(WorkloadConfig(num_requests=20_000, requests_per_s=10, arrival_cv=cv, **COARSE))
    )
    assert figures["arrival_cv"] == pytest.approx(cv, rel=0.06, abs=1e-6)
    assert figures["requests_per_s"] == pytest.approx(10, rel=0.06)


def test_zipf_popularity() -> None:
    config = WorkloadConfig(
        num_requests=20_000,
        system_prompts=4,
        system_prompt_tokens=16,
        system_prompt_zipf=2.0,
        user_tokens_sigma=0,
    )
    first = np.array([ids(request)[0] for request in generate(config)])
    shares = np.bincount(first, minlength=4) / first.size
    weights = 1 / np.arange(1, 5) ** 2
    assert shares == pytest.approx(weights / weights.sum(), abs=0.01)


def test_sessions_have_the_turns_and_pauses_asked_for() -> None:
    # many sessions, slowly: the cut after so many requests hardly touches them
    config = WorkloadConfig(
        num_requests=20_000,
        turns_mean=3.0,
        think_s_mean=2.0,
        requests_per_s=0.5,
        user_tokens_mean=20,
        **COARSE,
    )
    trace = generate(config)
    starts = sum(request.parent == -1 for request in trace)
    assert len(trace) / starts == pytest.approx(3.0, rel=0.03)
    figures = describe(trace)
    assert figures["sessions"]["think_s_mean"] == pytest.approx(2.0, rel=0.03)
    assert figures["requests_per_s"] == pytest.approx(0.5, rel=0.03)
    assert figures["sessions"]["turns_max"] <= config.turns_max


def test_changing_one_thing_leaves_the_other_draws_alone() -> None:
    base = WorkloadConfig(num_requests=200, system_prompts=2)
    slower = dataclasses.replace(base, requests_per_s=base.requests_per_s / 2)
    for left, right in zip(generate(base), generate(slower), strict=True):
        changed = {"arrival_ps"}
        one, other = as_values(left), as_values(right)
        assert {name for name in one if one[name] != other[name]} <= changed
        assert other["arrival_ps"] == pytest.approx(2 * one["arrival_ps"], abs=200)
    longer = dataclasses.replace(base, output_tokens_mean=300.0)
    assert [request.arrival_ps for request in generate(base)] == [r.arrival_ps for r in generate(longer)]
    assert [request.prompt_tokens for request in generate(base)] == [
        r.prompt_tokens for r in generate(longer)
    ]


def test_the_draws_are_these() -> None:
    """A golden excerpt: a change of it is a change of every published result, and of GENERATOR_VERSION."""
    config = WorkloadConfig(
        num_requests=6,
        system_prompts=1,
        system_prompt_tokens=32,
        turns_mean=2.0,
        think_s_mean=0.2,
        workload_seed=1,
    )
    assert [
        (r.arrival_ps, r.prompt_tokens, r.output_tokens, r.parent, r.think_ps, ids(r)[0], ids(r)[-1])
        for r in generate(config)
    ] == [
        (0, 116, 46, -1, 0, 0, 9),
        (18538099339, 856, 119, -1, 0, 0, 73),
        (135741168755, 1218, 183, 1, 117203069416, 0, 89),
        (311130991111, 133, 82, -1, 0, 0, 109),
        (837334329671, 571, 22, -1, 0, 0, 150),
        (966526435325, 834, 155, -1, 0, 0, 214),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_requests": 0}, r"^num_requests \(0\) must be at least 1$"),
        ({"num_requests": 1.5}, r"^num_requests \(1.5\) must be an integer$"),
        ({"workload_seed": -1}, r"^workload_seed \(-1\) must be at least 0$"),
        ({"requests_per_s": 0.0}, r"^requests_per_s \(0.0\) must be in \[1e-06, 1e\+09\]$"),
        ({"requests_per_s": math.inf}, r"^requests_per_s \(inf\) must be a finite number$"),
        ({"arrival_cv": -1.0}, r"^arrival_cv \(-1.0\) must be in \[0, 100\]$"),
        ({"user_tokens_mean": math.nan}, r"^user_tokens_mean \(nan\) must be a finite number$"),
        ({"output_tokens_sigma": "1"}, r"^output_tokens_sigma \('1'\) must be a finite number$"),
        ({"user_tokens_min": 0}, r"^user_tokens_min \(0\) must be at least 1$"),
        (
            {"user_tokens_min": 9, "user_tokens_max": 8},
            r"^user_tokens_max \(8\) must be in user_tokens_min \(9\)\.\.100000000$",
        ),
        (
            {"output_tokens_max": 10**9},
            r"^output_tokens_max \(1000000000\) must be in output_tokens_min \(1\)\.\.",
        ),
        ({"system_prompt_share": 1.5}, r"^system_prompt_share \(1.5\) must be in \[0, 1\]$"),
        ({"sampling_share": -0.1}, r"^sampling_share \(-0.1\) must be in \[0, 1\]$"),
        ({"turns_mean": 0.5}, r"^turns_mean \(0.5\) must be in \[1, 10000\]$"),
        ({"turns_max": 0}, r"^turns_max \(0\) must be at least 1$"),
        ({"think_s_mean": -1.0}, r"^think_s_mean \(-1.0\) must be in \[0, 86400\]$"),
        ({"content_tokens_per_chunk": 0}, r"^content_tokens_per_chunk \(0\) must be at least 1$"),
        ({"user_tokens_sigma": 1e300}, r"^user_tokens_sigma \(1e\+300\) must be in \[0, 10\]$"),
        ({"arrival_cv": 1e-300}, r"^arrival_cv \(1e-300\) must be 0, or at least 0.001$"),
        ({"arrival_cv": 1e300}, r"^arrival_cv \(1e\+300\) must be in \[0, 100\]$"),
        ({"turns_max": 10**20}, r"^turns_max \(100000000000000000000\) must be at most 1000000$"),
        ({"turns_mean": 1e300}, r"^turns_mean \(1e\+300\) must be in \[1, 10000\]$"),
        ({"think_s_mean": 1e300}, r"^think_s_mean \(1e\+300\) must be in \[0, 86400\]$"),
        ({"system_prompts": 10**12}, r"^system_prompts \(1000000000000\) must be at most 1000000$"),
        ({"requests_per_s": 1e-300}, r"^requests_per_s \(1e-300\) must be in \[1e-06, 1e\+09\]$"),
        (
            {"content_tokens_per_chunk": 10**20},
            r"^content_tokens_per_chunk \(100000000000000000000\) must be at most 1048576$",
        ),
        ({"num_requests": 10**12}, r"^num_requests \(1000000000000\) must be at most 1000000000$"),
        (
            {"samples_per_request": 10**20},
            r"^samples_per_request \(100000000000000000000\) must be at most 1000000$",
        ),
        (
            {"system_prompts": 1, "system_prompt_tokens": 10**20},
            r"^system_prompt_tokens \(100000000000000000000\) must be at most 100000000$",
        ),
        (
            {"system_prompts": 1, "system_prompt_tokens": 15},
            r"^system_prompt_tokens \(15\) must be at least content_tokens_per_chunk \(16\), or nothing is shared$",
        ),
        (
            {"session_tokens_max": 9000},
            r"^session_tokens_max \(9000\) must hold the longest first turn: system prompt, documents, "
            r"user's text and output, 10240 tokens$",
        ),
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkloadConfig(**fields)


def test_a_workload_beyond_the_clock_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^requests_per_s \(1e-06\) must be higher: 1000 requests would take \d+ days"
    ):
        generate(WorkloadConfig(requests_per_s=1e-6))
    assert generate(WorkloadConfig(num_requests=2, requests_per_s=1e-6)).duration_ps > 1000 * PS_PER_S
