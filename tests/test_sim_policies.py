"""Queue orders, static batches, prompts first, victims: golden schedules, small enough to follow by hand.

Every step takes 10 ps. A row of the timeline is written as

    (start, end, steps, decoding sequences, prefill tokens, running, waiting)
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from engine_cases import LinearCost, Scenario, alike, assert_as_naive, assert_identical, unlike
from hypothesis.stateful import invariant

from allocator.config import BuildConfig, CacheConfig
from allocator.fuzz import SharingMachine, run_machine
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import Admission, EngineConfig, QueueOrder, Victim


def _run(
    requests: Sequence[Request],
    engine: EngineConfig,
    *,
    num_blocks: int = 100,
    size: int = 4,
    batch: int = 8,
    tokens: int = 100,
    cache: CacheConfig | None = None,
) -> RunResult:
    build = BuildConfig(batch, tokens, 100, tokens_per_block=size)
    scenario = Scenario(list(requests), build, num_blocks, cache or CacheConfig(), engine, LinearCost(10))
    result = scenario.run()
    assert_as_naive(result, scenario.naive())
    assert_identical(result, scenario.run(skipping=False))
    return result


def _schedule(result: RunResult) -> list[tuple[int, ...]]:
    names = ("start_ps", "end_ps", "steps", "decode_sequences", "prefill_tokens", "running", "waiting")
    return [tuple(row) for row in np.stack([result.timeline[name] for name in names], axis=1).tolist()]


def _column(result: RunResult, name: str) -> list[int]:
    values: list[int] = result.requests[name].tolist()
    return values


def _with_priorities(requests: list[Request], priorities: Sequence[int]) -> list[Request]:
    return [dataclasses.replace(r, priority=p) for r, p in zip(requests, priorities, strict=True)]


# ------------------------------------------------------------------ queue order


def test_priority_goes_first_and_equals_as_they_came() -> None:
    """One at a time: A runs, and of B, C, D and E, which wait, C and E are urgent."""
    requests = _with_priorities(unlike(*((at, 4, 2) for at in (0, 1, 2, 3, 4))), (0, 0, 5, 1, 5))
    result = _run(requests, EngineConfig(queue_order="priority"), batch=1)
    assert _column(result, "admit_ps") == [0, 80, 20, 60, 40]
    assert _schedule(result)[:3] == [(0, 10, 1, 0, 4, 1, 0), (10, 20, 1, 1, 0, 1, 4), (20, 30, 1, 0, 4, 1, 3)]


def test_an_urgent_arrival_starts_before_one_that_waits_for_blocks() -> None:
    """Four blocks. A will hold 2; B wants 4 and waits for A's end; C, urgent, wants 1 and starts when it comes."""
    requests = _with_priorities(unlike((0, 4, 5), (5, 12, 5), (25, 4, 1)), (0, 0, 1))
    first_come = _run(requests, EngineConfig(), num_blocks=4)
    assert _column(first_come, "admit_ps") == [0, 50, 90 + 10]
    result = _run(requests, EngineConfig(queue_order="priority"), num_blocks=4)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),
        (10, 30, 2, 1, 0, 1, 1),  # ends where C can start
        (30, 40, 1, 1, 4, 2, 1),
        (40, 50, 1, 1, 0, 1, 1),
        (50, 60, 1, 0, 12, 1, 0),
        (60, 100, 4, 1, 0, 1, 0),
    ]


def test_the_shortest_goes_first() -> None:
    """By prompt and output together: D's 4 + 2, then B's 8 + 1, then C's 4 + 9."""
    requests = unlike((0, 4, 2), (1, 8, 1), (2, 4, 9), (3, 4, 2))
    result = _run(requests, EngineConfig(queue_order="shortest"), batch=1)
    assert _column(result, "admit_ps") == [0, 40, 50, 20]


def test_the_longest_cached_prefix_goes_first() -> None:
    """A leaves 2 blocks in the cache. Of B, C and D, which wait, C finds both, D one, B none."""

    def says(row: int, arrival: int, blocks: str) -> Request:
        ids = np.array([ord(block) for block in blocks], dtype=np.int64)
        tokens = 4 * len(blocks)
        return Request(row, arrival, tokens, 1, ids, 4, named_tokens=tokens)

    requests = [says(0, 0, "xyz"), says(1, 1, "pqr"), says(2, 2, "xyz"), says(3, 3, "xqq")]
    result = _run(requests, EngineConfig(queue_order="longest_prefix"), batch=1)
    assert _column(result, "hit_tokens") == [0, 0, 8, 4]
    assert _column(result, "admit_ps") == [0, 30, 10, 20]
    assert _column(_run(requests, EngineConfig(), batch=1), "admit_ps") == [0, 10, 20, 30]


@pytest.mark.parametrize("order", get_args(QueueOrder))
def test_who_was_preempted_goes_first_in_any_order(order: Any) -> None:
    """B is preempted at 10. C, waiting since 5, is urgent and short, and would fit beside A; B is first."""
    requests = _with_priorities(alike((0, 4, 6, 4), (0, 8, 5, 8), (5, 5, 1, 5)), (0, 0, 9))
    engine = EngineConfig(admission="max_utilization", queue_order=order)
    result = _run(requests, engine, num_blocks=4, cache=CacheConfig(enable_block_reuse=False))
    assert _column(result, "preemptions") == [0, 1, 0]
    assert _column(result, "admit_ps") == [0, 0, 100]


# ------------------------------------------------------------------ static batches


def test_a_static_batch_ends_before_the_next_begins() -> None:
    """A and B start together; C comes at 15 and waits for the longer of the two."""
    result = _run(unlike((0, 4, 2), (0, 4, 4), (15, 4, 1)), EngineConfig(admission="static_batch"))
    assert _schedule(result) == [
        (0, 10, 1, 0, 8, 2, 0),
        (10, 20, 1, 2, 0, 2, 0),  # A ends
        (20, 40, 2, 1, 0, 1, 1),
        (40, 50, 1, 0, 4, 1, 0),
    ]
    continuous = _run(unlike((0, 4, 2), (0, 4, 4), (15, 4, 1)), EngineConfig())
    assert _column(continuous, "admit_ps") == [0, 0, 20]


def test_a_static_batch_is_open_until_its_first_prompt_is_computed() -> None:
    """Six tokens a step: B starts in A's second step, and then, as A is computed, the batch is closed to C."""
    result = _run(
        unlike((0, 9, 2), (0, 3, 2), (0, 1, 1)), EngineConfig(admission="static_batch"), tokens=6, batch=6
    )
    assert _schedule(result) == [
        (0, 10, 1, 0, 6, 1, 2),
        (10, 20, 1, 0, 6, 2, 1),
        (20, 30, 1, 2, 0, 2, 1),
        (30, 40, 1, 0, 1, 1, 0),
    ]


def test_a_static_batch_takes_only_what_can_finish_together() -> None:
    """Four blocks: A will hold 2 of them and B 3."""
    result = _run(unlike((0, 4, 5), (0, 8, 5)), EngineConfig(admission="static_batch"), num_blocks=4)
    assert _column(result, "admit_ps") == [0, 50]
    assert _column(result, "preemptions") == [0, 0]


# ------------------------------------------------------------------ prompts first


def test_prompts_first_lets_decoding_wait() -> None:
    """B's prompt takes two steps of 8 tokens, in which A gets nothing."""
    requests = unlike((0, 4, 4), (5, 10, 2))
    result = _run(requests, EngineConfig(mixed_steps=False), tokens=8)
    assert _schedule(result) == [
        (0, 10, 1, 0, 4, 1, 0),
        (10, 20, 1, 0, 8, 2, 0),
        (20, 30, 1, 0, 2, 2, 0),  # B's first token
        (30, 40, 1, 2, 0, 2, 0),  # A's second, B's last
        (40, 60, 2, 1, 0, 1, 0),
    ]
    assert _column(result, "first_token_ps") == [10, 30]
    assert result.timeline["itl_tokens"].tolist() == [0, 0, 0, 1, 1]  # B's came in time
    assert result.gaps_ps.tolist() == [30]  # A's had waited from 10 to 40
    mixed = _run(requests, EngineConfig(), tokens=8)
    assert mixed.gaps_ps.size == 0


def test_prompts_first_decodes_when_no_prompt_finds_room() -> None:
    """Four blocks. B's prompt wants 3, and A leaves 2 after its first step: A decodes meanwhile, and ends."""
    result = _run(
        unlike((0, 8, 3), (0, 12, 1)),
        EngineConfig(admission="max_utilization", mixed_steps=False),
        num_blocks=4,
    )
    assert _schedule(result) == [(0, 10, 1, 0, 8, 1, 1), (10, 30, 2, 1, 0, 1, 1), (30, 40, 1, 0, 12, 1, 0)]


# ------------------------------------------------------------------ victims


def _preempting(
    requests: Sequence[Request], victim: Victim, num_blocks: int, order: QueueOrder = "fcfs"
) -> RunResult:
    """Run without reuse, so that a preempted job has all to compute again."""
    engine = EngineConfig(admission="max_utilization", victim=victim, queue_order=order)
    return _run(requests, engine, num_blocks=num_blocks, cache=CacheConfig(enable_block_reuse=False))


@pytest.mark.parametrize(("victim", "preempted"), [("last_started", [1, 0]), ("last_arrived", [0, 1])])
def test_who_started_last_need_not_have_arrived_last(victim: Any, preempted: list[int]) -> None:
    """A and B come together and fill the 4 blocks; B, urgent, starts first. Then each needs a third block."""
    requests = _with_priorities(unlike((0, 8, 6), (0, 8, 6)), (0, 1))
    result = _preempting(requests, victim, 4, "priority")
    assert _column(result, "preemptions") == preempted
    assert _schedule(result) == [
        (0, 10, 1, 0, 16, 2, 0),
        (10, 20, 1, 1, 0, 1, 1),  # one goes, with its first token sampled
        (20, 60, 4, 1, 0, 1, 1),
        (60, 70, 1, 0, 9, 1, 0),  # it computes its 8 tokens and that one
        (70, 110, 4, 1, 0, 1, 0),
    ]
    finish = [110, 60] if preempted == [1, 0] else [60, 110]
    assert _column(result, "finish_ps") == finish


def test_a_turn_arrives_when_its_time_has_come() -> None:
    """A is done at 10, so that B, its next turn, arrives at 100, after C, which stands behind it in the trace. The 4
    blocks are too few for both.
    """
    requests = unlike((0, 1, 1), (0, 4, 10), (50, 4, 10))
    requests[1] = dataclasses.replace(requests[1], parent=0, think_ps=90)
    result = _preempting(requests, "last_arrived", 4)
    assert _column(result, "arrival_ps") == [0, 100, 50]
    assert _column(result, "preemptions") == [0, 1, 0]


@pytest.mark.parametrize(
    ("victim", "preempted", "computed_again"),
    [("last_started", [0, 1], 9), ("least_progress", [1, 0], 10), ("cheapest", [1, 0], 10)],
)
def test_victims_differ(victim: Any, preempted: list[int], computed_again: int) -> None:
    """A has 8 tokens and B, started after it, 7; of 5 blocks, A takes a third at 10, and B needs one at 20.

    Both have sampled 2 tokens then, and A has the longer prompt. A would lose 9 tokens for 3 blocks, B 8 for 2.
    """
    result = _preempting(unlike((0, 8, 6), (0, 7, 6)), victim, 5)
    assert _column(result, "preemptions") == preempted
    assert _schedule(result) == [
        (0, 10, 1, 0, 15, 2, 0),
        (10, 20, 1, 2, 0, 2, 0),
        (20, 30, 1, 1, 0, 1, 1),
        (30, 60, 3, 1, 0, 1, 1),
        (60, 70, 1, 0, computed_again, 1, 0),
        (70, 100, 3, 1, 0, 1, 0),
    ]


# ------------------------------------------------------------------ all together


@pytest.mark.parametrize(
    ("admission", "order", "victim"),
    [
        combination
        for combination in itertools.product(get_args(Admission), get_args(QueueOrder), get_args(Victim))
        # the others preempt nobody
        if combination[0] == "max_utilization" or combination[2] == EngineConfig().victim
    ],
)
def test_nothing_lives_for_ever_in_a_pool_of_one_sequence(admission: Any, order: Any, victim: Any) -> None:
    """Six requests, alike and unlike, in a pool that the longest of them fills: all finish."""
    requests = [*alike((0, 9, 8), (0, 4, 13), (5, 16, 1)), *unlike((0, 1, 16), (0, 12, 5, 2), (0, 3, 3))]
    requests = [
        dataclasses.replace(r, request_id=i, arrival_ps=5 * i, priority=i % 3) for i, r in enumerate(requests)
    ]
    for mixed, chunked, reuse in itertools.product((True, False), repeat=3):
        engine = EngineConfig(
            admission=admission,
            queue_order=order,
            victim=victim,
            mixed_steps=mixed,
            enable_chunked_prefill=chunked,
        )
        cache = CacheConfig(enable_block_reuse=reuse)
        result = _run(requests, engine, num_blocks=5, batch=6, tokens=16, cache=cache)
        assert result.requests["status"].tolist() == ["finished"] * len(requests) or (
            "exceeds_pool" in result.requests["reject_cause"][4] and admission != "max_utilization"
        )


class Reclaims(SharingMachine):
    """What a release would make available is what it makes available, tried out on a copy of everything."""

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "manager") or self.writes:
            return
        for sequence in self.stories:
            manager, twin = copy.deepcopy((self.manager, sequence))
            before = manager.available_blocks
            said = manager.reclaimable_blocks(twin)
            manager.release(twin)
            assert manager.available_blocks - before == said


def test_reclaimable_blocks_are_what_a_release_reclaims() -> None:
    tally = run_machine(Reclaims, 400, seed_=1)
    assert tally.operations["fork"] > 0


@pytest.mark.parametrize(("field", "value"), [("queue_order", "x"), ("victim", "y"), ("admission", "z")])
def test_a_name_that_is_none_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} \('{value}'\) must be one of "):
        EngineConfig(**{field: value})  # type: ignore[arg-type]
