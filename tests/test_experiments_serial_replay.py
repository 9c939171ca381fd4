"""The serial replay counts hits as it says, and its bound is the optimum, which no policy exceeds."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.eviction import LRU, POLICIES, Belady, make_policy
from experiments.tools.serial_replay import FORESIGHT, blocks_of, main, offline_bound, replay
from sim.traces import read_trace

Ids = tuple[int, ...]

_ids = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


def arrays(requests: list[Ids]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int64) for ids in requests]


def best(requests: list[Ids], num_blocks: int) -> int:
    """Return the most hits there can be, by trying every way to keep prefixes between requests."""

    @cache
    def hits_from(number: int, kept: frozenset[Ids]) -> int:
        if number == len(requests):
            return 0
        ids = requests[number]
        path = frozenset(ids[: i + 1] for i in range(len(ids)))
        choices = sorted(kept | path)
        return len(path & kept) + max(
            hits_from(number + 1, frozenset(chosen))
            for size in range(min(num_blocks, len(choices)) + 1)
            for chosen in combinations(choices, size)
            if all(len(prefix) == 1 or prefix[:-1] in chosen for prefix in chosen)
        )

    return hits_from(0, frozenset())


@given(st.lists(_ids, min_size=1, max_size=6), st.integers(1, 4))
def test_the_bound_is_the_optimum(requests: list[Ids], num_blocks: int) -> None:
    assert offline_bound(arrays(requests), num_blocks) == best(requests, num_blocks)


@pytest.mark.parametrize("name", [*FORESIGHT, *sorted(POLICIES)])
@settings(max_examples=25)
@given(requests=st.lists(_ids, min_size=1, max_size=60), num_blocks=st.integers(4, 12))
def test_no_policy_beats_the_bound(name: str, requests: list[Ids], num_blocks: int) -> None:
    policy = FORESIGHT[name]() if name in FORESIGHT else make_policy(name)
    bound = offline_bound(arrays(requests), num_blocks)
    assert replay(arrays(requests), num_blocks, policy) <= bound
    assert bound <= offline_bound(arrays(requests), num_blocks + 1)


@given(requests=st.lists(_ids, min_size=1, max_size=40), num_blocks=st.integers(4, 30))
def test_lru_is_that_of_single_blocks(requests: list[Ids], num_blocks: int) -> None:
    recent: dict[Ids, None] = {}
    hits = 0
    for ids in requests:
        path = [ids[: i + 1] for i in range(len(ids))]
        hits += sum(prefix in recent for prefix in path)
        for prefix in reversed(path):
            recent.pop(prefix, None)
            recent[prefix] = None
        for prefix in list(recent)[: max(0, len(recent) - num_blocks)]:
            del recent[prefix]
    assert replay(arrays(requests), num_blocks, LRU()) == hits


def test_a_prompt_cached_whole_is_hit_whole() -> None:
    requests = arrays([(1, 2, 3), (1, 2, 3), (1, 2, 4), (2, 2, 3)])
    assert replay(requests, 9, LRU()) == offline_bound(requests, 9) == 3 + 2


def write_trace(path: Path, requests: list[Ids]) -> Path:
    rows = [
        {"timestamp": i, "input_length": 512 * len(ids) - 1, "output_length": 5, "hash_ids": ids}
        for i, ids in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_prints_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cycle of three blocks: LRU never hits unless all fit, and only the bound can let one pass by."""
    trace = write_trace(tmp_path / "cycle.jsonl", [(1,), (2,), (3,), (1,), (2,), (3,)])
    policies = ["lru", "belady", "weighted_belady"]
    assert main([str(trace), "--num-blocks", "1", "2", "3", "--policies", *policies]) == 0
    printed = capsys.readouterr().out
    assert "6 requests, 6 blocks" in printed
    rows = [line.split() for line in printed[printed.rindex("─") + 1 :].splitlines()]
    assert [row for row in rows if row] == [
        ["lru", "0.0000", "0.0000", "0.5000"],
        ["belady", "0.0000", "0.3333", "0.5000"],
        ["weighted_belady", "0.0000", "0.3333", "0.5000"],  # all blocks lie equally deep
        ["offline", "bound", "0.1667", "0.3333", "0.5000"],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-blocks", "0"], "num_blocks (0) must be at least 1"),
        (["--num-blocks", "1"], "num_blocks (1) must hold request 0 of 2"),
        (["--policies", "clock"], "policy (clock) must be one of"),
    ],
)
def test_bad_input_ends_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_trace(tmp_path / "small.jsonl", [(1, 2)])), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_trace_has_to_name_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n")
    assert main([str(trace)]) == 2
    assert "trace azure (request 0) must name its content chunks" in capsys.readouterr().err


# What LRU, Belady and the bound hit of the Mooncake conversation trace, by the pool's size in blocks.
PUBLISHED_RATES = {
    1000: (0.0445, 0.1792, 0.1907),
    3000: (0.0653, 0.2916, 0.2945),
    10_000: (0.2116, 0.3664, 0.3664),
    30_000: (0.3257, 0.3664, 0.3664),
}


@pytest.fixture(scope="module")
def conversations(traces_dir: Path) -> list[np.ndarray]:
    requests = blocks_of(read_trace(traces_dir / "mooncake-fast25" / "conversation_trace.jsonl"))
    assert (len(requests), sum(map(len, requests))) == (12_031, 288_500)
    return requests


@pytest.mark.parametrize("size", PUBLISHED_RATES)
def test_published_rates_of_lru_and_the_bound(conversations: list[np.ndarray], size: int) -> None:
    lru, _, bound = PUBLISHED_RATES[size]
    assert round(replay(conversations, size, LRU()) / 288_500, 4) == lru
    assert round(offline_bound(conversations, size) / 288_500, 4) == bound


# Belady takes some seconds a size: every time, where it falls short of the bound, and where it reaches it.
@pytest.mark.parametrize(
    "size",
    [1000, pytest.param(3000, marks=pytest.mark.slow), 10_000, pytest.param(30_000, marks=pytest.mark.slow)],
)
def test_published_rates_of_belady(conversations: list[np.ndarray], size: int) -> None:
    assert round(replay(conversations, size, Belady()) / 288_500, 4) == PUBLISHED_RATES[size][1]
