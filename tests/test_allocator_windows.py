"""Attention windows with sinks: which blocks leave, what hits, and what kernels are given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import CacheConfig
from allocator.content import TokenContent, UniqueContent
from allocator.eviction import POLICIES
from allocator.fuzz import AllocatorMachine
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.retention import RetentionConfig, TokenRange
from allocator.shadow import PromptSpec
from allocator.windows import AttentionWindow


def windowed(
    num_blocks: int,
    tokens_per_block: int,
    window: int,
    num_sinks: int = 0,
    policy: str = "lru",
    **options: int,
) -> KVCacheManager:
    config = CacheConfig(window=window, num_sinks=num_sinks, policy=policy)
    return KVCacheManager(num_blocks, tokens_per_block, config, **options)


def admit_all(manager: KVCacheManager, ids: list[int]) -> KVSequence:
    """Admit a prompt of these tokens and compute all that is not cached."""
    content = TokenContent(ids)
    match = manager.lookup(content)
    return manager.admit(content, len(ids) - match.hit_tokens, match)


# ------------------------------------------------------------------ what leaves, and when


def test_front_blocks_leave_when_the_next_query_needs_them_no_more() -> None:
    manager = windowed(8, 2, window=4)
    sequence = manager.admit(TokenContent(range(6)), 6)
    assert sequence.block_table.tolist() == [0, 1, 2]  # the chunk's first query had nothing before it to lose
    manager.append([sequence])  # the query at 6 attends to 3, 4, 5 and 6: token 2's block stays
    assert (sequence.block_table.tolist(), sequence.left, sequence.context_len) == ([1, 2, 3], 1, 5)
    manager.append([sequence])  # at 7, to 4 and later
    assert (sequence.block_table.tolist(), sequence.left, sequence.context_len) == ([2, 3], 2, 4)
    manager.append([sequence])
    assert (sequence.block_table.tolist(), sequence.num_tokens) == ([2, 3, 4], 9)
    stats = manager.stats()
    assert (stats.evictable_blocks, stats.referenced_blocks, stats.free_blocks) == (2, 3, 3)
    assert (stats.logical_blocks, stats.logical_tokens, stats.kv_tokens) == (3, 5, 5)
    manager.check_invariants()


def test_blocks_of_sinks_stay() -> None:
    manager = windowed(16, 4, window=3, num_sinks=5)
    sequence = manager.admit(UniqueContent(17), 17)
    manager.append(
        [sequence]
    )  # sinks 0 to 4 lie in two blocks; the window of 17 in the fifth, 15 being in the fourth
    assert sequence.block_table.tolist() == [0, 1, 3, 4]
    assert (sequence.left, sequence.context_len) == (1, 14)
    for _ in range(3):
        manager.append([sequence])
    assert (sequence.block_table.tolist(), sequence.num_tokens) == ([0, 1, 4, 5], 21)
    with pytest.raises(ValueError, match="tokens 8 to 12 must not lie in one of 2 blocks that have left"):
        sequence.slots(8, 12)
    assert sequence.slots(6, 8).tolist() == [6, 7]
    assert sequence.slots(16, 21).tolist() == [16, 17, 18, 19, 20]
    manager.check_invariants()


def test_a_chunk_keeps_the_window_of_its_first_query() -> None:
    manager = windowed(8, 2, window=3)
    sequence = manager.admit(TokenContent(range(12)), 4)
    manager.extend(sequence, 4)  # from 4 on: needs 2 and 3
    assert sequence.block_table.tolist() == [1, 2, 3]
    manager.extend(sequence, 4)  # from 8 on: needs 6 and 7
    assert sequence.num_blocks == 3
    assert sequence.left == 3
    manager.check_invariants()


def test_a_prompt_far_longer_than_the_pool_is_computed_in_chunks() -> None:
    manager = windowed(10, 16, window=64, num_sinks=4)
    content = UniqueContent(10_000)
    match = manager.lookup(content)
    assert manager.blocks_needed(match, 80) == 5  # a chunk, not the prompt
    sequence = manager.admit(content, 80, match)
    while sequence.num_tokens < 10_000:
        manager.extend(sequence, min(64, 10_000 - sequence.num_tokens))
    assert sequence.num_blocks <= 10
    for _ in range(1000):
        manager.append([sequence])
        assert sequence.num_blocks <= 1 + AttentionWindow(64, 4, 16).most_blocks
    manager.check_invariants()


def test_several_tokens_at_once_are_one_step() -> None:
    """The first of the queries still needs its window, so rejecting all but it is always possible."""
    manager = windowed(16, 2, window=4)
    sequence = manager.admit(TokenContent(range(8)), 8)
    slots = manager.append([sequence], None, 6)
    assert len(set(slots.tolist())) == 6
    assert (sequence.left, sequence.num_blocks) == (2, 5)  # the query at 8 needs 5 and later
    manager.truncate(sequence, 8)
    assert (sequence.left, sequence.block_table.tolist()) == (2, [2, 3])
    with pytest.raises(ValueError, match=r"num_tokens \(6\) must be at least 7: blocks that the window"):
        manager.truncate(sequence, 6)
    manager.truncate(sequence, 7)
    manager.append([sequence])
    manager.check_invariants()


def test_what_leaves_can_be_taken_in_the_same_call() -> None:
    manager = windowed(3, 2, window=3)
    sequence = manager.admit(TokenContent(range(6)), 6)
    assert manager.blocks_to_advance([sequence]) == -1  # takes one, lets go of two
    manager.append([sequence])
    shared = windowed(3, 2, window=3)
    sequence = shared.admit(TokenContent(range(6)), 6)
    other = shared.fork(sequence)[0]
    assert shared.blocks_to_advance([sequence]) == 1  # the other still holds them
    with pytest.raises(OutOfBlocks):
        shared.append([sequence])
    assert shared.blocks_to_advance([sequence, other]) == 0
    shared.append([sequence, other])
    shared.check_invariants()


def test_without_reuse_what_leaves_is_free() -> None:
    manager = KVCacheManager(4, 2, CacheConfig(enable_block_reuse=False, window=2))
    sequence = manager.admit(UniqueContent(4), 4)
    for _ in range(20):
        manager.append([sequence])
        assert manager.stats().evictable_blocks == 0
        manager.check_invariants()
    assert sequence.num_blocks <= 2
    manager.release(sequence)
    assert manager.stats().free_blocks == 4
    assert not manager.index.roots


# ------------------------------------------------------------------ what hits


def test_a_hit_needs_the_window_alone() -> None:
    manager = windowed(6, 2, window=3)
    manager.release(admit_all(manager, [1, 2, 3, 4, 5, 6, 7, 8]))
    manager.release(manager.admit(UniqueContent(8), 8))  # evicts the two first: parents leave first
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    match = manager.lookup(TokenContent(prompt))
    assert (match.hit_tokens, match.evictable_blocks, len(match.path)) == (8, 1, 1)
    sequence = admit_all(manager, prompt)
    assert (sequence.left, sequence.num_blocks, sequence.hit_tokens) == (3, 2, 8)
    assert manager.lookup(TokenContent(prompt[:4])).miss_blocks == {"evicted": 2}
    manager.check_invariants()


def test_a_hit_needs_the_sinks() -> None:
    manager = windowed(6, 2, window=3, num_sinks=1)
    manager.release(admit_all(manager, [1, 2, 3, 4, 5, 6, 7, 8]))  # the sinks' block is released last
    manager.release(manager.admit(UniqueContent(8), 8))
    prompt = TokenContent([1, 2, 3, 4, 5, 6, 7, 8, 9])
    match = manager.lookup(prompt)
    assert (match.hit_tokens, len(match.path)) == (8, 2)
    manager.release(manager.admit(UniqueContent(10), 10))
    assert manager.lookup(prompt).hit_tokens == 0


def test_a_hit_with_a_hole_in_its_window_ends_before_it() -> None:
    manager = windowed(8, 2, window=5)
    one = admit_all(manager, list(range(12)))
    content = TokenContent(list(range(13)))
    assert manager.lookup(content).hit_tokens == 12
    manager.release(one)
    manager.release(manager.admit(UniqueContent(6), 6))  # evicts block 0 alone: two were free
    assert manager.lookup(content).hit_tokens == 12
    assert manager.lookup(TokenContent([0, 1, 2, 3, 4])).hit_tokens == 0  # its window reaches to 0
    assert manager.lookup(TokenContent([0, 1, 2, 3, 4, 5, 6])).hit_tokens == 6


def test_misses_of_a_windowed_cache() -> None:
    manager = windowed(4, 2, window=3, ghost_blocks=2)
    manager.release(admit_all(manager, [1, 1, 2, 2]))
    assert manager.lookup(TokenContent([1, 1, 2, 2])).miss_blocks == {"last_token": 1}
    assert manager.lookup(TokenContent([1, 1, 2, 2, 3]), "other").miss_blocks == {
        "isolated": 2,
        "short_of_block": 1,
    }
    filling = manager.admit(TokenContent([7] * 8), 1)
    assert manager.lookup(TokenContent([7] * 6)).miss_blocks == {"in_flight": 3}
    manager.release(filling)
    manager.release(admit_all(manager, [3] * 8))  # evicts both and leaves two ghosts
    assert manager.lookup(TokenContent([1, 1, 2, 2, 4])).miss_blocks == {"evicted": 2, "short_of_block": 1}
    manager.release(admit_all(manager, [4] * 8))
    assert manager.lookup(TokenContent([1, 1, 2, 2, 4])).miss_blocks == {"unknown": 2, "short_of_block": 1}
    manager.check_invariants()


def test_readmission_after_preemption_hits_its_window() -> None:
    manager = windowed(8, 2, window=4)
    sequence = manager.admit(UniqueContent(6), 6)
    for _ in range(9):
        manager.append([sequence])
    content = sequence.content(16)
    manager.release(sequence)
    match = manager.lookup(content)
    assert match.hit_tokens == 14
    again = manager.admit(content, 2, match, readmission=True)
    assert again.num_tokens == 16
    assert again.num_blocks == 3
    manager.check_invariants()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"mru"}))
def test_parents_leave_first(policy: str) -> None:
    """Under every policy that prefers old blocks, what a window has passed goes before what it covers."""
    manager = windowed(8, 2, window=3, policy=policy)
    sequence = admit_all(manager, list(range(13)))
    manager.append([sequence])
    assert sequence.left == 5
    other = manager.admit(UniqueContent(2), 2)  # in the free block
    manager.append([other], None, 3)  # takes two
    root = sequence.root
    cached = [
        node.start for node in manager.index.extents() if node.ids and [*node.path()][-1].parent is root
    ]
    assert sorted(cached) == [2, 3, 4, 5, 6]


def test_part_of_a_block_is_hit_behind_a_window() -> None:
    """Two whole blocks and half of the third: of them it needs the second one, and copies or takes over the third."""
    for runs_on in (True, False):
        manager = KVCacheManager(8, 4, CacheConfig(window=4, enable_partial_reuse=True))
        first = admit_all(manager, list(range(12)))
        manager.pending_copies()  # the step ends; what it wrote can be a source now
        if not runs_on:
            manager.release(first)
        content = TokenContent([*range(10), 50, 51])
        match = manager.lookup(content)
        assert (match.hit_tokens, match.partial_tokens) == (10, 2)
        assert [node.start for node, _ in match.path] == [1]
        sequence = manager.admit(content, 2, match)
        assert (sequence.left, sequence.context_len) == (1, 8)
        third = 3 if runs_on else 2
        assert sequence.block_table.tolist() == [1, third]
        assert manager.pending_copies().tolist() == ([[2, 3, 2]] if runs_on else [])
        manager.append([sequence], [52])
        manager.check_invariants()


# ------------------------------------------------------------------ what kernels are given


def _attended(query: int, window: int, num_sinks: int) -> list[int]:
    return [key for key in range(query + 1) if key > query - window or key < num_sinks]


@given(
    window=st.integers(1, 12),
    num_sinks=st.integers(0, 6),
    size=st.sampled_from([1, 2, 4, 8]),
    prompt=st.integers(1, 40),
    steps=st.lists(st.integers(1, 5), max_size=12),
)
def test_a_kernel_needs_nothing_but_table_and_context(
    window: int, num_sinks: int, size: int, prompt: int, steps: list[int]
) -> None:
    """Masked by window and sinks, the table's keys are those of the definition, for each query of each step."""
    manager = windowed(200, size, window, num_sinks)
    sequence = manager.admit(UniqueContent(prompt), prompt)
    pool = np.full(200 * size, -1)  # each slot holds the position of its token
    pool[manager.prefill_slots(sequence)] = np.arange(prompt)
    for count in steps:
        first = sequence.num_tokens
        pool[manager.append([sequence], None, count)] = np.arange(first, first + count)
        (context,) = manager.context_lens([sequence]).tolist()
        table = manager.block_tables([sequence])[0]
        keys = pool[table[np.arange(context) // size] * size + np.arange(context) % size]
        for i in range(count):
            visible = context - count + i + 1  # DESIGN: query i of n sees the first context − n + i + 1 keys
            seen = keys[_attended(visible - 1, window, num_sinks)]
            assert seen.tolist() == _attended(first + i, window, num_sinks)
    last = sequence.num_tokens - (steps[-1] if steps else prompt)
    needed = {p // size for p in range(sequence.num_tokens) if p > last - max(window, 2) or p < num_sinks}
    assert sequence.num_blocks == len(needed)


@given(
    window=st.integers(1, 9),
    num_sinks=st.integers(0, 3),
    size=st.sampled_from([1, 2, 4]),
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    ticks=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_steps_taken_as_one_equal_single_ones(
    window: int, num_sinks: int, size: int, prompts: list[int], ticks: list[int]
) -> None:
    one, other = (windowed(300, size, window, num_sinks) for _ in range(2))
    batches = one.batch(), other.batch()
    for manager, batch in zip((one, other), batches, strict=True):
        for prompt in prompts:
            sequence = admit_all(manager, [prompt] * prompt)
            for branch in (sequence, *(manager.fork(sequence) if prompt % 2 else ())):
                batch.add(branch)
    for count in ticks:
        assert one.steps_within(batches[0], count) == count
        one.advance(batches[0], count)
        for _ in range(count):
            other.append(batches[1])
        one.check_invariants()
        one.pending_copies(), other.pending_copies()
        assert one.stats() == other.stats()
        assert [s.table for s in batches[0]] == [s.table for s in batches[1]]
        assert one.pool.free_ids().tolist() == other.pool.free_ids().tolist()


@given(
    window=st.integers(2, 9),
    size=st.sampled_from([1, 2, 4]),
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    forked=st.booleans(),
)
def test_steps_within_says_exactly_how_far_the_blocks_go(
    window: int, size: int, prompts: list[int], forked: bool
) -> None:
    blocks = sum(-(-prompt // size) for prompt in prompts) + 2
    manager = windowed(blocks, size, window)
    batch = manager.batch()
    for prompt in prompts:
        sequence = manager.admit(UniqueContent(prompt), prompt)
        for branch in (sequence, *(manager.fork(sequence) if forked else ())):
            batch.add(branch)
    possible = manager.steps_within(batch, 30)
    for _ in range(possible):
        manager.append(batch)
        manager.pending_copies()
    if possible < 30:
        with pytest.raises(OutOfBlocks):
            manager.append(batch)
        with pytest.raises(OutOfBlocks):
            manager.advance(batch, 2)
    manager.check_invariants()


# ------------------------------------------------------------------ sharing


def test_beams_of_a_windowed_cache() -> None:
    manager = windowed(20, 2, window=4, num_sinks=1)
    beams = [manager.admit(TokenContent(range(7)), 7)]
    beams += manager.fork(beams[0], 2)
    for parents in ([0, 0, 1], [2, 2, 2], [1, 0, 2], [0, 1, 0]) * 3:
        manager.append(beams, [[beam] for beam in range(3)])
        manager.pending_copies()
        manager.reorder_beams(beams, parents)
        manager.check_invariants()
    for beam in beams:
        assert beam.left == 6
        manager.release(beam)
    assert manager.stats().referenced_blocks == 0


# ------------------------------------------------------------------ the arithmetic


@given(
    window=st.integers(1, 12),
    num_sinks=st.integers(0, 5),
    size=st.sampled_from([1, 2, 4]),
    prompt=st.integers(1, 20),
    steps=st.integers(1, 30),
)
def test_remaining_blocks_bounds_what_a_table_grows_by(
    window: int, num_sinks: int, size: int, prompt: int, steps: int
) -> None:
    manager = windowed(100, size, window, num_sinks)
    sequence = manager.admit(UniqueContent(prompt), prompt)
    remaining, before, most = manager.remaining_blocks(sequence, prompt + steps), sequence.num_blocks, 0
    for _ in range(steps):
        manager.append([sequence])
        most = max(most, sequence.num_blocks)
    assert most <= before + remaining
    if steps > window + 2 * size and prompt > num_sinks:  # long enough to be as unaligned as can be
        assert before > most or most == before + remaining


def test_quotas_count_what_tables_hold() -> None:
    manager = KVCacheManager(20, 2, CacheConfig(window=4), quotas={"a": 3})
    sequence = manager.admit(UniqueContent(6), 6, tenant="a")
    batch = manager.batch()
    batch.add(sequence)
    for _ in range(12):
        manager.append(batch)
        assert manager.tenant_blocks("a") == sequence.num_blocks <= 3
    manager.release(sequence)
    assert manager.tenant_blocks("a") == 0


@given(
    window=st.integers(2, 40),
    num_sinks=st.integers(0, 20),
    size=st.sampled_from([1, 2, 4, 16]),
    position=st.integers(0, 200),
)
def test_the_arithmetic_counts_positions(window: int, num_sinks: int, size: int, position: int) -> None:
    arithmetic = AttentionWindow(window, num_sinks, size)
    needed = {p // size for p in range(position) if p > position - window or p < num_sinks}
    before = set(range(-(-position // size)))
    assert arithmetic.left(position) == len(before - needed)
    with_own = needed | {position // size}
    assert len(with_own) <= arithmetic.blocks_held(position + 1)
    beyond = {block for block in with_own if block >= arithmetic.sink_blocks}
    assert len(beyond) <= arithmetic.most_blocks


def test_the_most_blocks_of_a_window_are_needed_at_some_position() -> None:
    for window in range(2, 40):
        for size in (1, 2, 4, 16):
            arithmetic = AttentionWindow(window, 0, size)
            spans = [(p // size) - max(p - window + 1, 0) // size + 1 for p in range(200)]
            assert max(spans) == arithmetic.most_blocks == arithmetic.blocks_held(200)


def test_a_block_is_taken_back_under_a_sequence_that_has_let_go_of_it() -> None:
    """It goes on further down and needs the block no more, so whoever is cut back into it need not copy it."""
    state = AllocatorMachine()
    state.start(
        host_blocks=0,
        window=15,
        without=(),
        policy=91,
        reuse=True,
        num_sinks=0,
        log=26,
        tokens_per_block=4,
        num_blocks=11,
        ghosts=0,
        partial=10,
        lag=False,
    )
    state.lookup(
        prompt=PromptSpec(kind="runs", symbols=[1, 0], cut=0, named=False, granularity=4), again=5, salt=""
    )
    state.admit_retained(
        prompt=PromptSpec(kind="chunks", symbols=[0, 0, 1, 0], cut=1, named=False, granularity=1),
        again=2,
        salt="",
        chunk=9,
        retention=RetentionConfig(
            ranges=(
                TokenRange(start=1, end=6, priority=100, duration=None),
                TokenRange(start=6, end=10, priority=100, duration=5),
            ),
            decode_priority=35,
            decode_duration=None,
        ),
    )
    state.admit_branch(index=6, keep=11, more=3, fill=False, salt="other", chunk=9)
    state.admit_halves(
        prompt=PromptSpec(kind="tokens", symbols=[1, 1, 0, 0, 0, 0, 0, 0], cut=2, named=False, granularity=1),
        salt="",
        chunk=3,
    )
    state.admit(
        prompt=PromptSpec(kind="runs", symbols=[1, 1], cut=0, named=True, granularity=1),
        salt="other",
        chunk=2,
    )
    state.admit_retained(
        prompt=PromptSpec(kind="tokens", symbols=[0], cut=3, named=True, granularity=2),
        again=6,
        salt="",
        chunk=1,
        retention=RetentionConfig(
            ranges=(TokenRange(start=2, end=None, priority=100, duration=None),),
            decode_priority=50,
            decode_duration=None,
        ),
    )
    state.sample(index=5, n=3, bits=None, wait=4, ends=True)
    state.check()
    state.admit(
        prompt=PromptSpec(kind="runs", symbols=[0, 1], cut=2, named=True, granularity=2), salt="", chunk=99
    )
    state.check()
    state.join_or_leave(index=2)
    state.release(index=2, count=2)
    state.serve(symbols=[0, 1, 0], salt="", chunk=9, count=4, in_batch=False)
    state.join_or_leave(index=4)
    state.release(index=0, count=3)
    state.decode(bits=12, wait=2)
    state.check()
    state.admit_with_match(index=6, chunk=9)
    state.check()
    state.race(
        symbols=[1, 0, 0, 1],
        wishes=(
            RetentionConfig(
                ranges=(TokenRange(start=6, end=9, priority=100, duration=None),),
                decode_priority=100,
                decode_duration=2,
            ),
            RetentionConfig(
                ranges=(TokenRange(start=7, end=None, priority=20, duration=None),),
                decode_priority=35,
                decode_duration=None,
            ),
        ),
        count=0,
    )
    state.truncate(index=4, keep=18)
    state.admit_retained(
        prompt=PromptSpec(kind="chunks", symbols=[1, 1], cut=0, named=False, granularity=6),
        again=6,
        salt="",
        chunk=2,
        retention=RetentionConfig(ranges=(), decode_priority=50, decode_duration=None),
    )
    state.check()
    state.append(chosen=99, count=2, bits=10, wait=0)
