"""Scheduling, in scenarios small enough to follow by hand: the expected schedule stands in the test.

Every step takes 10 ps unless said otherwise. A row of the timeline is written as

    (start, end, steps, decoding sequences, prefill tokens, running, waiting)

and blocks, where they matter, as (free, evictable, referenced) at the row's last step.
"""

from __future__ import annotations

import numpy as np
import pytest
from engine_cases import LinearCost, Scenario, alike, assert_as_naive, assert_identical, unlike

from allocator.config import BuildConfig, CacheConfig
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig

GREEDY = EngineConfig(admission="max_utilization")


def _run(
    requests: list[Request],
    *,
    num_blocks: int = 100,
    size: int = 4,
    batch: int = 8,
    tokens: int = 100,
    engine: EngineConfig | None = None,
    cache: CacheConfig | None = None,
    paged: bool = True,
    max_seq_len: int = 100,
) -> RunResult:
    """Run with `size` tokens a block, `batch` sequences and `tokens` tokens a step at most."""
    build = BuildConfig(batch, tokens, max_seq_len, enable_paged_kv_cache=paged, tokens_per_block=size)
    scenario = Scenario(
        requests, build, num_blocks, cache or CacheConfig(), engine or EngineConfig(), LinearCost(10)
    )
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


_SCHEDULE = (
    "start_ps",
    "end_ps",
    "steps",
    "decode_sequences",
    "prefill_tokens",
    "running",
    "waiting",
)


def _rows(result: RunResult, *names: str) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.stack([result.timeline[name] for name in names], axis=1).tolist()]


def _schedule(result: RunResult) -> list[tuple[int, ...]]:
    return _rows(result, *_SCHEDULE)


def _blocks(result: RunResult) -> list[tuple[int, ...]]:
    return _rows(result, "free_blocks", "evictable_blocks", "referenced_blocks")


def _column(result: RunResult, name: str) -> list[int]:
    values: list[int] = result.requests[name].tolist()
    return values


# ------------------------------------------------------------------ steps


def test_chunked_prefill_shares_steps_with_decoding() -> None:
    """Eight tokens a step: what decoding leaves of them, the prompt of B gets."""
    result = _run(unlike((0, 4, 4), (5, 10, 2)), tokens=8)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),  # A's prompt; B arrives meanwhile
        (10, 20, 1, 1, 7, 2, 0),  # A's second token, and 7 of B's 10
        (20, 30, 1, 1, 3, 2, 0),  # the other 3: B's first token
        (30, 40, 1, 2, 0, 2, 0),  # both end
    ]
    assert _column(result, "admit_ps") == [0, 10]
    assert _column(result, "first_token_ps") == [10, 30]
    assert _column(result, "finish_ps") == [40, 40]


def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole() -> None:
    result = _run(unlike((0, 4, 4), (5, 8, 2)), tokens=8, engine=EngineConfig(enable_chunked_prefill=False))
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),
        (10, 40, 3, 1, 0, 1, 1),  # A leaves 7 tokens of each step, B wants 8
        (40, 50, 1, 0, 8, 1, 0),
        (50, 60, 1, 1, 0, 1, 0),
    ]
    # One token less, and it fits beside A.
    result = _run(unlike((0, 4, 4), (5, 7, 2)), tokens=8, engine=EngineConfig(enable_chunked_prefill=False))
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),
        (10, 20, 1, 1, 7, 2, 0),
        (20, 30, 1, 2, 0, 2, 0),  # B ends
        (30, 40, 1, 1, 0, 1, 0),
    ]


def test_running_prompts_go_first_and_no_tokens_left_is_no_admission() -> None:
    result = _run(unlike((0, 9, 1), (0, 3, 1), (0, 1, 1)), tokens=6, batch=6)
    assert _schedule(result) == [
        (0, 10, 1, 0, 6, 1, 2),  # 6 of A's 9
        (10, 20, 1, 0, 6, 2, 1),  # A's last 3, then B's 3; nothing left for C
        (20, 30, 1, 0, 1, 1, 0),
    ]


def test_the_batch_is_full() -> None:
    result = _run(unlike((0, 2, 2), (0, 2, 3), (0, 2, 1)), batch=2)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 2, 1),
        (10, 20, 1, 2, 0, 2, 1),  # A ends
        (20, 30, 1, 1, 2, 2, 0),  # C takes its place; B and C end
    ]


def test_the_longer_the_context_the_longer_the_step() -> None:
    """Ten a step and one a key: the stretch has its first step and what each next one adds."""
    build = BuildConfig(8, 100, 100, tokens_per_block=4)
    result = Scenario(unlike((0, 5, 4), (0, 3, 4)), build, 100, cost=LinearCost(10, key=1)).run()
    names = ("start_ps", "end_ps", "steps", "first_step_ps", "step_increment_ps", "itl_tokens")
    assert _rows(result, *names) == [
        (0, 10, 1, 10, 0, 0),
        (10, 76, 3, 20, 2, 2),  # 6 + 4 keys, then 7 + 5, then 8 + 6
    ]


# ------------------------------------------------------------------ admission


def test_guaranteed_no_evict_starts_nobody_who_might_not_finish() -> None:
    """Four blocks. A will hold 2, B 3: B waits for A's end although its prompt of 2 would fit."""
    result = _run(unlike((0, 4, 5), (0, 8, 5)), num_blocks=4)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 1),
        (10, 50, 4, 1, 0, 1, 1),
        (50, 60, 1, 0, 8, 1, 0),
        (60, 100, 4, 1, 0, 1, 0),
    ]
    assert _column(result, "preemptions") == [0, 0]


def test_max_utilization_preempts_who_started_last_and_computes_it_again() -> None:
    """Four blocks. A comes to hold 3, B as well; both start, and B goes when A and B need one each."""
    result = _run(unlike((0, 4, 9), (0, 8, 5)), num_blocks=4, engine=GREEDY)
    assert _schedule(result) == [
        (0, 10, 1, 0, 12, 2, 0),  # A: 1 block, B: 2
        (10, 20, 1, 1, 0, 1, 1),  # both fill their blocks, one is free: B goes, its 2 stay cached
        (20, 80, 6, 1, 0, 1, 1),  # A's third block is B's second, the tail first
        (80, 90, 1, 1, 0, 1, 1),  # apart: were what A fills here like B's first block, both would be held
        (90, 100, 1, 0, 5, 1, 0),  # B again: 8 + 1 tokens, of which 4 are found
        (100, 130, 3, 1, 0, 1, 0),
    ]
    assert _blocks(result) == [
        (1, 0, 3),
        (0, 2, 2),
        (0, 1, 3),
        (0, 1, 3),
        (0, 1, 3),  # of A's three blocks, two were evicted for B
        (0, 1, 3),
    ]
    assert _rows(result, "preemptions", "out_of_block_steps", "evicted_blocks") == [
        (0, 0, 0),
        (1, 1, 0),
        (0, 0, 1),
        (0, 0, 0),
        (0, 0, 2),
        (0, 0, 0),
    ]
    assert _column(result, "preemptions") == [0, 1]
    assert _column(result, "recomputed_tokens") == [0, 4]  # 8 were written, 4 found
    assert _column(result, "hit_tokens") == [0, 0]  # hits count at first admission only
    assert result.gaps_ps.tolist() == [90]  # B's first token came at 10, its second at 100


def test_a_preempted_job_may_be_chunked_even_if_prompts_may_not() -> None:
    """Nine tokens a step, nothing reused: B, preempted, has 12 tokens to compute, and would wait for ever."""
    engine = EngineConfig(admission="max_utilization", enable_chunked_prefill=False)
    no_reuse = CacheConfig(enable_block_reuse=False)
    result = _run(unlike((0, 1, 12), (0, 8, 6)), num_blocks=4, tokens=9, engine=engine, cache=no_reuse)
    assert _schedule(result) == [
        (0, 10, 1, 0, 9, 2, 0),
        (10, 40, 3, 2, 0, 2, 0),  # the first of these steps gives B the last free block
        (40, 50, 1, 1, 0, 1, 1),  # A has filled its block: B goes, with 4 tokens sampled and 11 written
        (50, 120, 7, 1, 0, 1, 1),
        (120, 130, 1, 0, 9, 1, 0),  # A has ended
        (130, 140, 1, 0, 3, 1, 0),
        (140, 150, 1, 1, 0, 1, 0),
    ]
    assert _column(result, "recomputed_tokens") == [0, 11]
    assert result.gaps_ps.tolist() == [100]  # B's fourth token came at 40, its fifth at 140


def test_a_preempted_job_goes_before_those_who_wait() -> None:
    """C arrives before B is preempted, and is small enough to start; but B is first."""
    result = _run(unlike((0, 4, 6), (0, 8, 5), (5, 4, 1)), num_blocks=4, engine=GREEDY)
    assert _schedule(result) == [
        (0, 10, 1, 0, 12, 2, 0),
        (10, 20, 1, 1, 0, 1, 2),  # B is preempted: in this step nobody starts
        (20, 60, 4, 1, 0, 1, 2),  # B would hold 3 blocks, and A leaves 2: C waits as well
        (60, 70, 1, 0, 9, 2, 0),  # A has ended: of B, whose tail was evicted, 5; then C starts, and ends
        (70, 100, 3, 1, 0, 1, 0),
    ]
    assert _column(result, "admit_ps") == [0, 0, 60]


def test_the_first_that_does_not_fit_stops_admission() -> None:
    """First come, first served: C would fit beside A, but B is before it."""
    result = _run(unlike((0, 8, 5), (0, 12, 1), (0, 4, 1)), num_blocks=5)
    assert _schedule(result) == [
        (0, 10, 1, 0, 8, 1, 2),  # A will have 3 of 5 blocks, B wants 3
        (10, 50, 4, 1, 0, 1, 2),
        (50, 60, 1, 0, 16, 2, 0),
    ]


def test_watermark_is_left_free_while_something_runs() -> None:
    """Ten blocks, three of them reserved. A takes 4: 3 are left for others."""
    engine = EngineConfig(admission="max_utilization", watermark=0.3)
    assert _schedule(_run(unlike((0, 16, 3), (0, 12, 1)), num_blocks=10, engine=engine)) == [
        (0, 10, 1, 0, 28, 2, 0),  # B takes exactly 3
        (10, 30, 2, 1, 0, 1, 0),  # A grows into the reserve: it is for that
    ]
    assert _schedule(_run(unlike((0, 16, 3), (0, 13, 1)), num_blocks=10, engine=engine)) == [
        (0, 10, 1, 0, 16, 1, 1),  # B wants 4
        (10, 30, 2, 1, 0, 1, 1),
        (30, 40, 1, 0, 13, 1, 0),
    ]
    # With nothing running it does not count: the whole pool is there for one.
    assert _schedule(_run(unlike((0, 40, 1)), num_blocks=10, engine=engine)) == [(0, 10, 1, 0, 40, 1, 0)]


@pytest.mark.parametrize("admission", ["guaranteed_no_evict", "max_utilization"])
def test_blocks_found_in_the_cache_make_room(admission: str) -> None:
    """Five blocks. A holds 3; B says the same and needs one of its own, so both run together."""
    engine = EngineConfig(admission=admission)  # type: ignore[arg-type]
    result = _run(alike((0, 12, 4, 12), (10, 13, 3, 13)), num_blocks=5, engine=engine)
    assert _schedule(result) == [
        (0, 10, 1, 0, 12, 1, 0),
        (10, 20, 1, 1, 1, 2, 0),  # A starts its fourth block; of B, 12 are found
        (20, 40, 2, 2, 0, 2, 0),
    ]
    assert _blocks(result) == [(2, 0, 3), (0, 0, 5), (0, 0, 5)]
    assert _column(result, "hit_tokens") == [0, 12]
    assert result.cache.miss_blocks["short_of_block"] == 1
    assert result.cache.miss_blocks["cold"] == 3


# ------------------------------------------------------------------ samples, sessions, rejections


def test_samples_share_the_prompt_and_copy_its_last_block() -> None:
    """Six tokens in blocks of four, three samples: two copies, and the last to write keeps the block."""
    result = _run(unlike((0, 6, 4, 3)), num_blocks=10)
    assert _schedule(result) == [
        (0, 10, 1, 0, 6, 1, 0),
        (10, 20, 1, 3, 0, 3, 0),  # the copies are made in this step
        (20, 40, 2, 3, 0, 3, 0),
    ]
    names = ("referenced_blocks", "logical_blocks", "kv_tokens", "logical_tokens")
    assert _rows(result, *names) == [
        (2, 2, 6, 6),
        (4, 6, 4 + 3 * 3, 3 * 7),
        (7, 9, 4 + 3 * 5, 3 * 9),
    ]
    assert _column(result, "cow_copies") == [2]
    assert _column(result, "blocks") == [9]
    assert (result.cache.cow_copies, result.cache.cow_tokens) == (2, 4)
    assert _column(result, "first_token_ps") == [10]


def test_samples_of_whole_blocks_copy_nothing() -> None:
    result = _run(unlike((0, 8, 4, 3)), num_blocks=10)
    assert _schedule(result) == [(0, 10, 1, 0, 8, 1, 0), (10, 40, 3, 3, 0, 3, 0)]
    assert _blocks(result) == [(8, 0, 2), (5, 0, 5)]
    assert result.cache.cow_copies == 0


def test_samples_take_their_places_in_the_batch_when_the_prompt_starts() -> None:
    """Four places: three samples leave one, and the request after wants two."""
    result = _run(unlike((0, 4, 3, 3), (0, 4, 2, 2)), batch=4)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 1),
        (10, 30, 2, 3, 0, 3, 1),
        (30, 40, 1, 0, 4, 1, 0),
        (40, 50, 1, 2, 0, 2, 0),
    ]


@pytest.mark.parametrize(("stated_ps", "arrival_ps"), [(0, 75), (75, 75), (90, 90)])
def test_a_turn_arrives_when_its_predecessor_is_done_and_its_user_has_thought(
    stated_ps: int, arrival_ps: int
) -> None:
    """The first turn ends at 50; the user thinks for 25. The second prompt repeats the first's 9 tokens."""
    first = alike((0, 4, 5))[0]
    ids = np.zeros(12, dtype=np.int64)
    second = Request(1, stated_ps, 12, 2, ids, 1, named_tokens=12, parent=0, think_ps=25)
    result = _run([first, second])
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),
        (10, 50, 4, 1, 0, 1, 0),
        (arrival_ps, arrival_ps + 10, 1, 0, 4, 1, 0),  # 8 tokens had KV and are found: the ninth had none
        (arrival_ps + 10, arrival_ps + 20, 1, 1, 0, 1, 0),
    ]
    assert _column(result, "arrival_ps") == [0, arrival_ps]
    assert _column(result, "hit_tokens") == [0, 8]


def test_what_can_never_run_is_rejected_by_cause_and_its_turns_with_it() -> None:
    """Four blocks of four tokens, steps of 12 tokens, 4 sequences of at most 20."""
    engine = EngineConfig(enable_chunked_prefill=False)
    requests = [
        Request(0, 0, 16, 5),
        Request(1, 0, 4, 4, num_samples=5),
        Request(2, 0, 13, 1),
        Request(3, 0, 12, 6),
        Request(4, 0, 4, 5, num_samples=4),  # 1 + 4 blocks
        Request(5, 0, 12, 5),  # 16 tokens have KV: just fits
        Request(6, 0, 4, 4, parent=0),
        Request(7, 0, 4, 4, parent=6, think_ps=5),
    ]
    result = _run(requests, num_blocks=4, batch=4, tokens=12, max_seq_len=20, engine=engine)
    assert _column(result, "reject_cause") == [
        "exceeds_max_seq_len",
        "exceeds_max_batch_size",
        "exceeds_max_num_tokens",
        "exceeds_pool",
        "exceeds_pool",
        "",
        "follows_rejected",
        "follows_rejected",
    ]
    assert _column(result, "finish_ps") == [-1, -1, -1, -1, -1, 50, -1, -1]


def test_max_utilization_takes_what_one_sample_at_a_time_could_finish() -> None:
    """Three samples of 2 blocks each in a pool of 2: one after the other, by preemption."""
    result = _run(unlike((0, 4, 5, 3)), num_blocks=2, engine=GREEDY)
    assert _column(result, "status") == ["finished"]
    assert _column(result, "preemptions")[0] >= 2
    assert _column(_run(unlike((0, 4, 5, 3)), num_blocks=2), "reject_cause") == ["exceeds_pool"]


# ------------------------------------------------------------------ without paging


@pytest.mark.parametrize("admission", ["guaranteed_no_evict", "max_utilization"])
def test_without_paging_every_sequence_reserves_max_seq_len(admission: str) -> None:
    """Twenty blocks of 4 tokens hold two sequences of at most 32, whatever their length."""
    engine = EngineConfig(admission=admission)  # type: ignore[arg-type]
    requests = unlike(*((0, 3, 4) for _ in range(5)))
    result = _run(requests, num_blocks=20, max_seq_len=32, paged=False, engine=engine)
    assert _schedule(result) == [
        (0, 10, 1, 0, 6, 2, 3),
        (10, 40, 3, 2, 0, 2, 3),
        (40, 50, 1, 0, 6, 2, 1),
        (50, 80, 3, 2, 0, 2, 1),
        (80, 90, 1, 0, 3, 1, 0),
        (90, 120, 3, 1, 0, 1, 0),
    ]
    assert _blocks(result) == [(0, 0, 2)] * 4 + [(1, 0, 1)] * 2
    paged = _run(requests, num_blocks=20, max_seq_len=32, engine=engine)
    assert paged.timeline["running"].max() == 5


def test_without_paging_nothing_is_reused() -> None:
    result = _run(alike((0, 8, 4), (100, 8, 4)), num_blocks=20, max_seq_len=32, paged=False)
    assert _column(result, "hit_tokens") == [0, 0]
    assert result.timeline["evictable_blocks"].max() == 0
