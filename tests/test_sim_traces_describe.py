"""describe: published statistics come out, and sharing equals what a slow and plain count gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import TEXTS, write

from sim.distributions import Progressions
from sim.request import Request
from sim.traces import Trace, read_trace, write_trace
from sim.traces.describe import PERCENTILES, describe, render
from sim.traces.sharing import TOKENS_PER_CHUNK, sharing, stack_distances

S = 10**12


def spread(figures: dict[str, float]) -> list[int]:
    return [round(figures[name]) for name in ("mean", "p50", "p90", "p99")]


def test_the_public_azure_code_trace(traces_dir: Path) -> None:
    figures = describe(read_trace(traces_dir / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv"))
    assert figures["requests"] == 8819
    assert figures["requests_per_s"] == pytest.approx(2.57, abs=0.005)
    assert figures["arrival_cv"] == pytest.approx(13.2, abs=0.05)
    assert spread(figures["prompt_tokens"]) == [2048, 1469, 5194, 7436]  # published, interpolated: 5188
    assert spread(figures["output_tokens"]) == [28, 13, 55, 252]  # 251
    assert figures["content"] is None


def test_the_public_mooncake_conversation_trace(traces_dir: Path) -> None:
    trace = read_trace(traces_dir / "mooncake-fast25" / "conversation_trace.jsonl")
    figures = describe(trace)
    assert figures["requests"] == 12031
    assert figures["requests_per_s"] == pytest.approx(3.40, abs=0.005)
    assert spread(figures["prompt_tokens"]) == [12035, 6909, 27367, 85401]
    assert spread(figures["output_tokens"]) == [343, 350, 597, 1120]
    content = figures["content"]
    assert content["granularity"] == [512]
    assert content["distinct_chunks"] == 182790
    assert content["hit_rate_chunks"] == pytest.approx(0.366, abs=0.0005)
    assert content["hit_rate_tokens"] == pytest.approx(0.374, abs=0.0005)
    # published for an LRU cache of 10,000 and 30,000 chunks; distances say for each hit what cache it needs.
    # An engine's LRU drops a chunk's parent no earlier than the chunk, so the shares differ in the third digit.
    distances = sharing(trace).reuse_distances
    for chunks, published in ((3_000, 0.065), (10_000, 0.212), (30_000, 0.326)):
        assert (distances < chunks).sum() / content["prompt_chunks"] == pytest.approx(published, abs=0.004)


def request(row: int, chunks: list[int], prompt: int, named: int, salt: str = "") -> Request:
    return Request(
        request_id=row,
        arrival_ps=row * S,
        prompt_tokens=prompt,
        output_tokens=100,
        chunk_ids=np.array(chunks, dtype=np.int64),
        granularity=4,
        named_tokens=named,
        salt=salt,
    )


def test_sharing_of_a_trace_small_enough_to_follow() -> None:
    found = sharing(
        [
            request(0, [1, 2, 3], 10, 10),  # 1, 12, 123
            request(1, [1, 2, 4], 12, 12),  # hits 1, 12
            request(2, [2, 2, 3], 12, 12),  # another prefix: nothing
            request(3, [1, 2, 3, 5], 9, 16),  # hits 1, 12, and the first token of 123; stores 1235
            request(4, [1, 2, 3, 5], 15, 16),  # hits all four: the output too
            request(5, [1, 2, 3, 5], 16, 16, salt="x"),  # another salt: nothing
            Request(6, 6 * S, 5, 5),  # without content
            request(7, [1, 2, 3, 5], 9, 16),  # hits three; that its output is known already is no hit
        ]
    )
    assert (found.prompt_chunks, found.hit_chunks) == (3 + 3 + 3 + 3 + 4 + 4 + 3, 2 + 3 + 4 + 3)
    assert (found.prompt_tokens, found.hit_tokens) == (10 + 12 + 12 + 9 + 15 + 16 + 9, 8 + 9 + 15 + 9)
    assert found.distinct_chunks == 3 + 1 + 3 + 1 + 4
    assert found.reused_chunks == 4
    assert (found.reuse_gaps_ps // S).tolist() == [1, 1, 2, 2, 3, 1, 1, 1, 1, 3, 3, 3]
    # by hit: others between. Request 1: {12, 123}, {123, 1}; request 3: {12, 124, 2, 22, 223}, ...
    assert found.reuse_distances.tolist() == [2, 2, 5, 5, 6, 3, 3, 3, 3, 7, 7, 7]


def test_token_ids_are_compared_in_chunks() -> None:
    def of(row: int, ids: list[int], prompt: int) -> Request:
        return Request(row, 0, prompt, 50, token_ids=np.array(ids, dtype=np.int32), named_tokens=len(ids))

    long = list(range(40))
    assert TOKENS_PER_CHUNK == 16
    found = sharing(
        [of(0, long, 40), of(1, [*long[:20], 99], 21), of(2, long, 40), of(3, [7, *long[1:]], 40)]
    )
    assert found.prompt_chunks == 3 + 2 + 3 + 3
    assert (found.hit_chunks, found.hit_tokens) == (1 + 3, 16 + 40)


def naive_distances(uses: list[int]) -> tuple[list[int], list[int], list[int]]:
    now, previous, distances = [], [], []
    for at, item in enumerate(uses):
        if item in uses[:at]:
            before = at - 1 - uses[:at][::-1].index(item)
            now.append(at)
            previous.append(before)
            distances.append(len(set(uses[before + 1 : at])))
    return now, previous, distances


@given(st.lists(st.integers(0, 8), max_size=60))
def test_stack_distances_equal_the_definition(uses: list[int]) -> None:
    now, previous, distances = naive_distances(uses)
    found = stack_distances(np.array(now, dtype=np.int64), np.array(previous, dtype=np.int64))
    assert found.tolist() == distances


def test_sessions_and_sampling() -> None:
    rows = [
        Request(0, 0, 10, 5),
        Request(1, 1 * S, 20, 5, parent=0, think_ps=4 * S, num_samples=2),
        Request(2, 2 * S, 10, 5),
        Request(3, 4 * S, 30, 5, parent=1, think_ps=8 * S, beam_width=2),
    ]
    figures = describe(Trace("t", "synthetic", "00", rows))
    assert figures["sessions"] == {"count": 1, "turns_mean": 3.0, "turns_max": 3, "think_s_mean": 6.0}
    assert figures["sampled_requests"] == figures["searched_requests"] == 1
    assert figures["requests_per_s"] == pytest.approx(3 / 4)
    assert figures["arrival_cv"] == pytest.approx(np.std([1, 1, 2]) / (4 / 3))
    lengths = {"mean": 17.5, "p50": 10.0, "p90": 30.0, "p99": 30.0, "max": 30.0, "total": 70}
    assert figures["prompt_tokens"] == lengths
    text = render(figures)
    assert "1 of several turns: 3.00 on average, 3 at most, 6.0 s to think" in text
    assert "1 requests" in text
    assert "not known" in text


def test_percentiles_are_those_of_a_summary() -> None:
    rows = [Request(row, row * S, 5, 1 + row * row) for row in range(37)]
    found = describe(Trace("t", "synthetic", "00", rows))["output_tokens"]
    lengths = np.array([row.output_tokens for row in rows])
    summary = Progressions.plain(lengths).summary(1, PERCENTILES)
    assert {name: found[name] for name in summary} == summary
    assert found["p90"] == lengths[34 - 1]  # ⌈0.9 · 37⌉ = 34


def test_the_time_to_think_is_not_known_where_no_answer_s_end_is(tmp_path: Path) -> None:
    """Also once it is converted."""
    trace = read_trace(write(tmp_path, TEXTS["bailian"]))
    write_trace(trace, tmp_path / "native.parquet")
    for same in (trace, read_trace(tmp_path / "native.parquet")):
        figures = describe(same)
        assert figures["sessions"]["count"] > 0
        assert figures["sessions"]["think_s_mean"] is None
        assert "at most, time to think not known" in render(figures)


def test_one_request_has_no_rate() -> None:
    figures = describe(Trace("t", "synthetic", "00", [Request(0, 0, 10, 5)]))
    assert (figures["requests_per_s"], figures["arrival_cv"], figures["duration_s"]) == (None, None, 0.0)
    assert "arrivals" not in render(figures)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_format_can_be_described(tmp_path: Path, name: str) -> None:
    figures = describe(read_trace(write(tmp_path, TEXTS[name])))
    text = render(figures)
    assert f"trace ({name})" in text
    assert (figures["content"] is None) == (name in ("azure", "burstgpt"))
    assert len({line.index("  ") >= 0 for line in text.splitlines()}) == 1
