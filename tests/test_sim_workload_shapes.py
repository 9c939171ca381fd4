"""Arrivals, published lengths, retrieved documents, trees and closed loops: each has the structure it promises."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import as_values, same_requests

from allocator.config import BuildConfig, CacheConfig
from sim.engine import simulate
from sim.request import PS_PER_S, Request
from sim.scheduler.config import EngineConfig
from sim.stream import RequestStream
from sim.traces.describe import describe
from sim.workload import LENGTH_MODELS, WorkloadConfig, WorkloadShape, generate
from sim.workload.draws import Draws
from sim.workload.lengths import Lognormal, Quantiles

SHORT: dict[str, Any] = {
    "user_tokens_mean": 20.0,
    "user_tokens_min": 1,
    "user_tokens_max": 60,
    "output_tokens_mean": 10.0,
    "output_tokens_max": 30,
}


def ids(request: Request) -> list[int]:
    assert request.chunk_ids is not None
    return request.chunk_ids.tolist()


configs = st.builds(
    WorkloadConfig,
    num_requests=st.integers(1, 60),
    workload_seed=st.integers(0, 2**40),
    arrivals=st.sampled_from(["gamma", "on_off"]),
    requests_per_s=st.floats(0.01, 100),
    on_s_mean=st.sampled_from([0.01, 1.0, 50.0]),
    off_s_mean=st.sampled_from([0.0, 5.0]),
    system_prompts=st.integers(0, 2),
    system_prompt_tokens=st.just(32),
    system_prompt_share=st.sampled_from([0.5, 1.0]),
    documents=st.sampled_from([0, 3, 20]),
    document_tokens=st.sampled_from([16, 48]),
    documents_per_session=st.integers(1, 3),
    document_zipf=st.sampled_from([0.0, 1.0, 50.0]),
    document_order=st.sampled_from(["drawn", "fixed"]),
    turns_mean=st.sampled_from([1.0, 3.0, 12.0]),
    turns_max=st.integers(1, 20),
    branch_share=st.sampled_from([0.0, 0.3, 1.0]),
    branches=st.integers(2, 4),
    session_tokens_max=st.sampled_from([None, 300, 500]),
    think_s_mean=st.sampled_from([0.0, 0.1, 30.0]),
    content_tokens_per_chunk=st.sampled_from([1, 4, 16]),
    **{name: st.just(value) for name, value in SHORT.items()},
)


def texts(config: WorkloadConfig, rows: list[Request]) -> list[list[Any]]:
    """Return what each request's chunks must say, written out from the parent links alone.

    A prompt is its opening, or all that its parent said and the answer, and then new text; each token is named
    after the request that brought it in. A chunk says what its tokens are, and all before them.
    """
    grain = config.content_tokens_per_chunk
    said: list[list[Any]] = []
    for row, request in enumerate(rows):
        if request.parent >= 0:
            before = rows[request.parent]
            text = [*said[request.parent]]
            assert len(text) == before.prompt_tokens + before.output_tokens
        else:
            opening = opening_tokens(config, request)
            text = [("shared", ids(request)[at // grain], at % grain) for at in range(opening)]
        new = request.prompt_tokens - len(text)
        assert config.user_tokens_min <= new <= config.user_tokens_max
        text += [("user", row, at) for at in range(new)]
        text += [("answer", row, at) for at in range(request.output_tokens)]
        said.append(text)
    return said


def opening_tokens(config: WorkloadConfig, request: Request) -> int:
    """Return how many tokens of a first prompt are shared: those of chunks whose ids are no session's own."""
    system_chunks = config.system_prompts * (config.system_prompt_tokens // config.content_tokens_per_chunk)
    document_chunks = config.documents * (config.document_tokens // config.content_tokens_per_chunk)
    shared = list(itertools.takewhile(lambda chunk: chunk < system_chunks + document_chunks, ids(request)))
    return len(shared) * config.content_tokens_per_chunk


@given(configs)
def test_prompts_say_what_was_said_before(config: WorkloadConfig) -> None:
    rows = list(generate(config))
    assert len(rows) == config.num_requests
    assert rows[0].arrival_ps == 0
    assert all(one.arrival_ps <= other.arrival_ps for one, other in itertools.pairwise(rows))
    for request in rows:
        if request.parent >= 0:
            assert request.arrival_ps == rows[request.parent].arrival_ps + request.think_ps
        if config.session_tokens_max is not None:
            assert request.prompt_tokens + request.output_tokens <= config.session_tokens_max
    if not config.shares_content:
        assert all(request.chunk_ids is None for request in rows)
        return
    said = texts(config, rows)
    grain = config.content_tokens_per_chunk
    meaning: dict[tuple[int, ...], list[Any]] = {}
    whole: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for request, text in zip(rows, said, strict=True):
        chunks = ids(request)
        for count in range(1, request.named_tokens // grain + 1):
            prefix, content = tuple(chunks[:count]), text[: count * grain]
            # equal ids behind equal prefixes, equal content; and the other way round but where branches part
            assert meaning.setdefault(prefix, content) == content
            if config.branch_share == 0:
                assert whole.setdefault(tuple(content), prefix) == prefix
    roots = [request for request in rows if request.parent < 0]
    for one, other in itertools.combinations(roots, 2):  # sessions share their openings and nothing else
        assert not set(ids(one)[opening_tokens(config, one) // grain :]) & set(ids(other))


@given(configs)
def test_branches_share_what_went_before(config: WorkloadConfig) -> None:
    rows = list(generate(config))
    children = Counter(request.parent for request in rows if request.parent >= 0)
    most = config.branches if config.branch_share else 1
    assert all(count <= most for count in children.values())
    if not config.shares_content:
        return
    grain = config.content_tokens_per_chunk
    followers: dict[int, list[Request]] = {}
    for request in rows:
        followers.setdefault(request.parent, []).append(request)
    for parent, siblings in followers.items():
        if parent < 0:
            continue
        common = (rows[parent].prompt_tokens + rows[parent].output_tokens) // grain
        assert all(ids(request)[:common] == ids(rows[parent])[:common] for request in siblings)
        for one, other in itertools.combinations(siblings, 2):
            assert not set(ids(one)[common:]) & set(ids(other)[common:])


@given(configs, st.sampled_from(["gamma", "on_off", "closed_loop"]))
def test_a_workload_that_is_streamed_is_the_same(config: WorkloadConfig, arrivals: str) -> None:
    share = 0.0 if arrivals == "closed_loop" else config.branch_share
    config = dataclasses.replace(config, arrivals=arrivals, branch_share=share)
    kept = generate(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.workload.generator.STREAMED_REQUESTS", 0)
        streamed = generate(config)
    assert isinstance(streamed.requests, RequestStream)
    assert len(streamed) == len(kept)
    assert same_requests(streamed, kept)
    assert same_requests(streamed, kept)
    longer = generate(dataclasses.replace(config, num_requests=config.num_requests + 7))
    first = list(longer)[: len(kept)]
    assert [as_values(request) for request in first] == [as_values(request) for request in kept]


# ------------------------------------------------------------------ arrivals


@pytest.mark.parametrize(("on", "off"), [(5.0, 5.0), (2.0, 18.0), (30.0, 1.0)])
def test_on_off_arrivals_vary_as_an_interrupted_poisson_process_does(on: float, off: float) -> None:
    shape = WorkloadShape(arrivals="on_off", requests_per_s=4.0, on_s_mean=on, off_s_mean=off)
    gaps = np.diff(list(itertools.islice(Draws(shape).start_ps, 300_000)))
    while_on = 4.0 * (on + off) / on
    squared = 1 + 2 * while_on * (1 / on) / (1 / on + 1 / off) ** 2  # Kuczura, 1973
    assert PS_PER_S / gaps.mean() == pytest.approx(
        4.0, rel=0.04
    )  # some 10,000 periods, twice their standard error
    assert gaps.std() / gaps.mean() == pytest.approx(math.sqrt(squared), rel=0.04)


def test_never_off_is_always_on() -> None:
    plain = WorkloadConfig(num_requests=200, arrival_cv=2.0)
    on = dataclasses.replace(plain, arrivals="on_off", off_s_mean=0.0)
    for one, other in zip(generate(plain), generate(on), strict=True):
        assert one.arrival_ps == pytest.approx(other.arrival_ps, abs=500)


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    """Each client has one request in the engine or is thinking; the next comes when the last is done."""
    config = WorkloadConfig(
        num_requests=200, arrivals="closed_loop", clients=5, turns_mean=2.0, think_s_mean=0.3, **SHORT
    )
    rows = list(generate(config))
    roots = [request for request in rows if request.parent < 0]
    assert len(roots) == 5
    assert all(request.arrival_ps == 0 for request in roots)
    assert max(Counter(request.parent for request in rows if request.parent >= 0).values()) == 1
    result = simulate(
        rows,
        BuildConfig(tokens_per_block=16),
        CacheConfig(),
        EngineConfig(),
        num_blocks=5000,
        cost=Millisecond(),
    )
    arrive, finish = (result.requests[name].tolist() for name in ("arrival_ps", "finish_ps"))
    for request in rows:
        if request.parent >= 0:
            assert arrive[request.request_id] == finish[request.parent] + request.think_ps
    events = sorted([(at, 1) for at in arrive] + [(at, -1) for at in finish])
    in_flight = list(itertools.accumulate(change for _, change in events))
    assert max(in_flight) == 5


class Millisecond:
    """Every step takes a millisecond."""

    def step(self, batch: object) -> int:
        return PS_PER_S // 1000

    def decode_affine(self, decode_sequences: int) -> tuple[int, int]:
        return PS_PER_S // 1000, 0


def test_fewer_requests_than_clients() -> None:
    rows = list(generate(WorkloadConfig(num_requests=3, arrivals="closed_loop", clients=10**6)))
    assert [(request.arrival_ps, request.parent) for request in rows] == [(0, -1)] * 3


# ------------------------------------------------------------------ lengths


def drawn(lengths: Lognormal | Quantiles, count: int = 400_000) -> np.ndarray:
    return lengths.draw(np.random.default_rng(1), count)


@pytest.mark.parametrize("name", sorted(LENGTH_MODELS))
def test_published_statistics_come_out(name: str) -> None:
    model = LENGTH_MODELS[name]
    means = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
    for place, lengths in enumerate((model.prompt, model.output)):
        assert isinstance(lengths, Lognormal | Quantiles)
        sample = drawn(lengths)
        assert 1 <= sample.min() <= sample.max() <= lengths.longest
        if isinstance(lengths, Quantiles):
            assert sample.mean() == pytest.approx(lengths.mean, rel=0.01)
            published = [lengths.p50, lengths.p90, lengths.p99]
            assert np.percentile(sample, [50, 90, 99]) == pytest.approx(published, rel=0.02, abs=1)
        else:
            assert lengths.clipped_mean == pytest.approx(means[name][place], rel=1e-9)
            assert sample.mean() == pytest.approx(means[name][place], rel=0.01)
    assert model.source


@given(st.floats(1, 500), st.floats(0.05, 2), st.integers(1, 20), st.integers(30, 3000))
def test_the_mean_of_a_clipped_lognormal(mean: float, sigma: float, low: int, high: int) -> None:
    lengths = Lognormal(mean, sigma, low, high)
    z = np.linspace(-9, 9, 200_001)  # the integral over the normal density, as a sum
    values = np.clip(np.exp(math.log(mean) - sigma**2 / 2 + sigma * z), low, high)
    density = np.exp(-(z**2) / 2)
    assert lengths.clipped_mean == pytest.approx(float(values @ density / density.sum()), rel=1e-4)


def test_a_length_model_draws_prompts_and_outputs() -> None:
    figures = describe(generate(WorkloadConfig(num_requests=30_000, length_model="azure_conversation")))
    assert figures["prompt_tokens"]["mean"] == pytest.approx(1155, rel=0.02)
    assert figures["prompt_tokens"]["p90"] == pytest.approx(2734, rel=0.03)
    assert figures["output_tokens"]["mean"] == pytest.approx(211, rel=0.02)
    assert figures["output_tokens"]["p50"] == pytest.approx(129, rel=0.03)


# ------------------------------------------------------------------ documents


def documents_of(config: WorkloadConfig, request: Request) -> list[int]:
    """Return the documents that a first prompt holds, in order, told from its content ids."""
    chunks = config.document_tokens // config.content_tokens_per_chunk
    firsts = ids(request)[: config.documents_per_session * chunks : chunks]
    return [first // chunks for first in firsts]


def test_documents_are_drawn_by_popularity_without_repeats() -> None:
    config = WorkloadConfig(
        num_requests=20_000,
        documents=4,
        documents_per_session=2,
        document_tokens=16,
        document_zipf=1.0,
        **SHORT,
    )
    pairs = Counter(tuple(documents_of(config, request)) for request in generate(config))
    weights = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    total = weights.sum()
    for one, other in itertools.permutations(range(4), 2):  # successive draws without replacement
        share = weights[one] / total * weights[other] / (total - weights[one])
        assert pairs.pop((one, other)) / 20_000 == pytest.approx(share, abs=0.012)
    assert not pairs


def test_a_fixed_order_shares_longer_prefixes() -> None:
    def hit_rate(order: str) -> float:
        config = WorkloadConfig(
            num_requests=400,
            documents=8,
            documents_per_session=4,
            document_tokens=64,
            document_order=order,  # type: ignore[arg-type]
            **SHORT,
        )
        if order == "fixed":
            assert all(
                documents_of(config, request) == sorted(documents_of(config, request))
                for request in generate(config)
            )
        rate: float = describe(generate(config))["content"]["hit_rate_tokens"]
        return rate

    assert hit_rate("fixed") > hit_rate("drawn") + 0.1


def test_system_prompt_and_documents_stand_side_by_side() -> None:
    config = WorkloadConfig(
        num_requests=50,
        system_prompts=1,
        system_prompt_tokens=32,
        documents=3,
        documents_per_session=3,
        document_tokens=48,
        **SHORT,
    )
    for request in generate(config):
        assert ids(request)[:2] == [0, 1]
        held = ids(request)[2:11]
        assert sorted(held) == list(range(2, 11))
        assert all(held[at + 1] == held[at] + 1 for at in range(8) if at % 3 != 2)
        assert 32 + 3 * 48 < request.prompt_tokens <= 32 + 3 * 48 + 60


# ------------------------------------------------------------------ trees


def test_an_agent_sends_out_sub_agents() -> None:
    config = WorkloadConfig(
        num_requests=3000,
        turns_mean=20.0,
        turns_max=13,
        branch_share=1.0,
        branches=3,
        requests_per_s=0.001,
        think_s_mean=0.01,
        **SHORT,
    )
    rows = list(generate(config))
    children = Counter(request.parent for request in rows if request.parent >= 0)
    trees = Counter[int]()
    root = list(range(len(rows)))
    for request in rows:
        if request.parent >= 0:
            root[request.request_id] = root[request.parent]
        trees[root[request.request_id]] += 1
    full = [tree for tree, size in trees.items() if size == 13]
    assert len(full) > 100
    for tree in full:  # 1 + 3 + 9
        assert children[tree] == 3
        assert (
            sum(root[request.request_id] == tree and not children[request.request_id] for request in rows)
            == 9
        )


def test_half_of_the_turns_branch() -> None:
    config = WorkloadConfig(
        num_requests=20_000,
        turns_mean=200.0,
        turns_max=400,
        branch_share=0.25,
        branches=2,
        requests_per_s=0.01,
        think_s_mean=0.0,
        content_tokens_per_chunk=4096,
        **SHORT,
    )
    children = Counter(request.parent for request in generate(config) if request.parent >= 0)
    counts = Counter(children.values())
    assert counts[2] / (counts[1] + counts[2]) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"arrivals": "burst"},
            r"^arrivals \('?burst'?\) must be one of gamma, on_off, closed_loop",
        ),
        ({"length_model": "gpt"}, r"^length_model \('?gpt'?\) must be one of lognormal, sharegpt, "),
        ({"clients": 0}, r"^clients \(0\) must be at least 1$"),
        ({"on_s_mean": 0.0}, r"^on_s_mean \(0.0\) must be in \[1e-06, 1e\+06\]$"),
        ({"branches": 1}, r"^branches \(1\) must be at least 2$"),
        ({"branch_share": 2.0}, r"^branch_share \(2.0\) must be in \[0, 1\]$"),
        (
            {"arrivals": "closed_loop", "branch_share": 0.5},
            r"^branch_share \(0.5\) must be 0 in a closed loop: a client waits for one request$",
        ),
        (
            {"length_model": "alpaca", "output_tokens_max": 100},
            r"^output_tokens_max \(100\) must not be given with length_model alpaca, only with lognormal$",
        ),
        (
            {"documents": 3},
            r"^documents_per_session \(4\) must be at most documents \(3\)$",
        ),
        (
            {"documents": 9, "document_tokens": 100},
            r"^document_tokens \(100\) must be a multiple of content_tokens_per_chunk \(16\) where there are documents",
        ),
        (
            {"documents": 9, "system_prompts": 1, "system_prompt_tokens": 100},
            r"^system_prompt_tokens \(100\) must be a multiple of content_tokens_per_chunk \(16\) where there are ",
        ),
        (
            {"documents": 9, "document_tokens": 8},
            r"^document_tokens \(8\) must be at least content_tokens_per_chunk \(16\), or nothing is shared$",
        ),
        (
            {"documents": 9, "session_tokens_max": 12_000},
            r"^session_tokens_max \(12000\) must hold the longest first turn: .* 12288 tokens$",
        ),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkloadConfig(**fields)


def test_turns_that_leave_the_clock_are_refused() -> None:
    config = WorkloadConfig(
        num_requests=2000,
        turns_mean=10_000.0,
        turns_max=10_000,
        think_s_mean=86_400.0,
        requests_per_s=0.001,
        **SHORT,
    )
    with pytest.raises(
        ValueError, match=r"^requests_per_s \(0.001\) must be higher or think_s_mean \(86400.0\) lower"
    ):
        generate(config)
