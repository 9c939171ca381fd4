"""Sequences that go on from one another: sampling, branching, beams, truncation; and what sharing saves."""

from __future__ import annotations

import pytest

from allocator.config import CacheConfig
from allocator.content import ChunkContent, TokenContent, UniqueContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.rules.cost import count_lines


def compute(manager: KVCacheManager, ids: list[int]) -> KVSequence:
    """Admit a prompt and compute all that is not cached."""
    content = TokenContent(ids)
    match = manager.lookup(content)
    return manager.admit(content, len(ids) - match.hit_tokens, match)


def tables(*sequences: KVSequence) -> list[list[int]]:
    return [sequence.block_table.tolist() for sequence in sequences]


def saved(manager: KVCacheManager) -> tuple[int, int]:
    stats = manager.stats()
    assert stats.saved_blocks == manager.saved_blocks
    manager.check_invariants()
    return stats.saved_blocks, stats.saved_tokens


# ------------------------------------------------ parallel sampling


@pytest.mark.parametrize("in_batch", [False, True])
def test_sampling_shares_full_blocks_and_copies_the_partial_one(in_batch: bool) -> None:
    """Four samples of 6 tokens: the first block is shared for ever, the second copied for all but one of them."""
    manager = KVCacheManager(16, 4)
    parent = compute(manager, [1] * 6)
    batch = manager.batch()
    if in_batch:
        batch.add(parent)
    samples = [parent, *manager.fork(parent, 3)]
    assert saved(manager) == (6, 18)
    if in_batch:
        for sample in samples[1:]:
            batch.add(sample)
    slots = manager.append(batch if in_batch else samples, [1, 2, 3, 4])
    assert slots.tolist() == [10, 14, 18, 6]
    assert tables(*samples) == [[0, 2], [0, 3], [0, 4], [0, 1]]
    assert manager.pending_copies().tolist() == [[1, 2, 2], [1, 3, 2], [1, 4, 2]]
    assert [sample.cow_copies for sample in samples] == [1, 1, 1, 0]
    assert saved(manager) == (3, 12)
    manager.append(batch if in_batch else samples, [1, 2, 3, 4])
    assert manager.lookup(TokenContent([1] * 6 + [3, 3, 9])).hit_blocks == 2, "each sample's block is cached"
    for sample in samples:
        manager.release(sample)
    assert saved(manager) == (0, 0)
    assert manager.available_blocks == 16


def test_a_member_of_a_batch_leaves_its_block_to_the_fork_that_writes_later() -> None:
    manager = KVCacheManager(16, 4)
    batch = manager.batch()
    parent = compute(manager, [1] * 5)
    batch.add(parent)
    manager.append(batch, [2])
    (child,) = manager.fork(parent)
    assert manager.append(batch, [3]).tolist() == [10], "the parent writes first, and so copies"
    assert manager.pending_copies().tolist() == [[1, 2, 2]]
    assert manager.append([child], [4]).tolist() == [6], "the child has the block to itself now"
    assert not len(manager.pending_copies())
    assert tables(parent, child) == [[0, 2], [0, 1]]
    assert parent.content().prompt_keys(1) != child.content().prompt_keys(1)
    manager.check_invariants()


def test_samples_that_fill_blocks_never_copy() -> None:
    manager = KVCacheManager(16, 4)
    parent = compute(manager, [1] * 8)
    samples = [parent, *manager.fork(parent, 2)]
    assert manager.blocks_to_advance(samples) == 3
    manager.append(samples)
    assert not len(manager.pending_copies())
    assert manager.stats().cow_copies == 0
    assert saved(manager) == (4, 16)


# ------------------------------------------------ branching


@pytest.mark.parametrize("length", range(1, 10))
def test_branching_at_any_token_copies_at_most_once_and_only_to_write(length: int) -> None:
    """Fork, then truncate the child: it takes no block until it writes in the midst of one."""
    manager = KVCacheManager(16, 4)
    trunk = compute(manager, list(range(10)))
    (branch,) = manager.fork(trunk)
    manager.truncate(branch, length)
    assert manager.stats().referenced_blocks == 3
    assert not len(manager.pending_copies())
    assert saved(manager)[0] == -(-length // 4)
    assert manager.append([branch], [99]).size == 1
    copies = manager.pending_copies().tolist()
    if length % 4:
        assert copies == [[(length - 1) // 4, 3, length % 4]]
        assert branch.block_table.tolist() == [*range(length // 4), 3]
    else:
        assert copies == []
    assert trunk.block_table.tolist() == [0, 1, 2]
    manager.check_invariants()


@pytest.mark.parametrize(
    "content", [TokenContent([1] * 8), ChunkContent([1, 2, 3, 4], 2, 8), UniqueContent(8)]
)
def test_a_branch_says_its_own_from_there_on(content: TokenContent | ChunkContent | UniqueContent) -> None:
    manager = KVCacheManager(16, 4)
    trunk = manager.admit(content, 8)
    (branch,) = manager.fork(trunk)
    manager.truncate(branch, 5)
    manager.append([branch], None, 3)
    assert manager.lookup(content).miss_blocks == {"last_token": 1}
    manager.release(trunk)
    manager.append([branch])
    match = manager.lookup(branch.content())
    assert match.hit_blocks == 2
    manager.check_invariants()


# ------------------------------------------------ beams


def test_beam_search_step_by_step() -> None:
    """Three beams over blocks of two tokens, dead beams freed, survivors copied only where they part."""
    manager = KVCacheManager(12, 2)
    first = compute(manager, [7] * 3)
    beams = [first, *manager.fork(first, 2)]
    assert saved(manager) == (4, 6)

    manager.append(beams, [1, 2, 3])  # 7 7 | 7 x: the last to write keeps the prompt's last block
    assert manager.pending_copies().tolist() == [[1, 2, 1], [1, 3, 1]]
    assert tables(*beams) == [[0, 2], [0, 3], [0, 1]]

    manager.reorder_beams(beams, [1, 1, 2])  # beam 0 dies; its block is cached, so it can be evicted only
    assert tables(*beams) == [[0, 3], [0, 3], [0, 1]]
    assert manager.stats().evictable_blocks == 1
    assert saved(manager) == (3, 6)

    manager.append(beams, [4, 5, 6])  # each starts a block
    assert not len(manager.pending_copies())
    assert tables(*beams) == [[0, 3, 4], [0, 3, 5], [0, 1, 6]]

    manager.reorder_beams(beams, [2, 0, 0])  # blocks 5 dies uncached: free again
    assert tables(*beams) == [[0, 1, 6], [0, 3, 4], [0, 3, 4]]
    assert (manager.stats().free_blocks, manager.stats().evictable_blocks) == (6, 1)

    manager.append(beams, [1, 2, 3])  # of those two, one copies
    assert manager.pending_copies().tolist() == [[4, 5, 1]]
    assert tables(*beams) == [[0, 1, 6], [0, 3, 5], [0, 3, 4]]
    for ids in ([7, 7, 7, 3, 6, 1], [7, 7, 7, 2, 4, 2], [7, 7, 7, 2, 4, 3]):
        assert manager.lookup(TokenContent([*ids, 0])).hit_blocks == 3

    manager.reorder_beams(beams, [0, 1, 2])
    assert tables(*beams) == [[0, 1, 6], [0, 3, 5], [0, 3, 4]]
    for beam in beams:
        manager.release(beam)
    assert manager.available_blocks == 12
    assert saved(manager) == (0, 0)


def test_beams_of_a_batch_stay_in_it() -> None:
    manager = KVCacheManager(16, 4)
    batch = manager.batch()
    first = compute(manager, [7] * 5)
    beams = [first, *manager.fork(first)]
    for beam in beams:
        batch.add(beam)
    manager.append(batch, [1, 2])
    manager.pending_copies()
    manager.reorder_beams(beams, [1, 1])
    assert list(batch) == beams
    assert len({beam.table[1] for beam in beams}) == 1
    manager.append(batch, [3, 4])
    assert len(manager.pending_copies()) == 1
    assert [beam.history.keys(0, 2) for beam in beams].count(beams[0].history.keys(0, 2)) == 1
    manager.check_invariants()


def test_all_beams_from_one() -> None:
    manager = KVCacheManager(12, 4)
    first = compute(manager, [7] * 6)
    beams = [first, *manager.fork(first, 3)]
    manager.append(beams, [1, 2, 3, 4])
    manager.pending_copies()
    assert manager.stats().referenced_blocks == 5
    manager.reorder_beams(beams, [3] * 4)
    assert manager.stats().referenced_blocks == 2
    assert manager.stats().free_blocks == 10
    assert saved(manager) == (6, 21)


def test_refused_beams_change_nothing() -> None:
    manager = KVCacheManager(3, 4)
    first = compute(manager, [7] * 6)
    beams = [first, *manager.fork(first, 2)]
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free or evictable"):
        manager.append(beams, [1, 2, 3])
    assert tables(*beams) == [[0, 1]] * 3
    assert saved(manager) == (4, 12)
    manager.release(beams.pop())
    manager.append(beams, [1, 2])
    assert manager.pending_copies().tolist() == [[1, 2, 2]]


# ------------------------------------------------ truncation


@pytest.mark.parametrize("ghosts_below", [False, True])
def test_ghosts_do_not_decide_whether_a_write_copies(ghosts_below: bool) -> None:
    """What was evicted below a block is no reason to keep it: nothing cached builds on it."""
    manager = KVCacheManager(4, 4)
    if ghosts_below:
        manager.release(compute(manager, [1] * 16))
        manager.release(compute(manager, [2] * 8))  # evicts the last two blocks
        manager.pending_copies()
    sequence = compute(manager, [1] * 8 + [3])
    assert sequence.hit_blocks == (2 if ghosts_below else 0)
    manager.truncate(sequence, 6)
    table = sequence.block_table.tolist()
    assert manager.blocks_to_advance([sequence]) == 0
    assert manager.append([sequence], [5]).tolist() == [4 * table[1] + 2]
    assert manager.stats().cow_copies == 0
    manager.check_invariants()
    misses = manager.lookup(TokenContent([1] * 16)).miss_blocks
    assert misses == ({"evicted": 3} if ghosts_below else {"evicted": 1, "cold": 2})
    assert manager.append([sequence], [5]).tolist() == [4 * table[1] + 3]
    assert manager.lookup(TokenContent([1] * 6 + [5, 5, 9])).hit_blocks == 2
    manager.check_invariants()


def test_what_is_written_again_as_it_was_is_cached_again() -> None:
    manager = KVCacheManager(8, 4)
    sequence = compute(manager, [1] * 8)
    manager.truncate(sequence, 5)
    manager.append([sequence], [[1, 1, 1]], 3)
    assert manager.lookup(TokenContent([1] * 9)).hit_blocks == 2
    assert sequence.block_table.tolist() == [0, 1]
    manager.check_invariants()


def test_cached_content_below_a_block_keeps_it() -> None:
    manager = KVCacheManager(8, 4)
    manager.release(compute(manager, [1] * 12))
    sequence = compute(manager, [1] * 8 + [3])
    manager.truncate(sequence, 6)
    assert manager.blocks_to_advance([sequence]) == 1
    manager.append([sequence], [5])
    assert manager.pending_copies().tolist() == [[1, sequence.table[1], 2]]
    assert manager.lookup(TokenContent([1] * 13)).hit_blocks == 3


# ------------------------------------------------ what sharing saves


def test_a_block_held_beside_ones_own_saves_nothing() -> None:
    """Two compute the same at the same time: two blocks in tables, and the cached one counts while it is in one."""
    manager = KVCacheManager(8, 4)
    content = TokenContent([1] * 4)
    one = manager.admit(content, 4)
    other = manager.admit(content, 4)
    assert saved(manager) == (0, 0)
    manager.release(one)
    assert manager.stats().referenced_blocks == 2, "the cached block is held, but in no table"
    assert saved(manager) == (0, 0)
    (fork,) = manager.fork(other)
    assert saved(manager) == (1, 4)
    third = manager.admit(TokenContent([1] * 5), 1)
    assert saved(manager) == (1, 4)
    manager.release(fork)
    manager.release(third)
    manager.release(other)
    assert saved(manager) == (0, 0)


def test_the_source_of_a_pending_copy_saves_nothing() -> None:
    manager = KVCacheManager(8, 4, CacheConfig(enable_partial_reuse=True))
    manager.release(compute(manager, [1] * 8))
    manager.pending_copies()
    compute(manager, [1, 1, 2])
    stats = manager.stats()
    assert (stats.partial_copies, stats.referenced_blocks, stats.logical_blocks) == (1, 2, 1)
    assert saved(manager) == (0, 0)
    manager.pending_copies()
    assert manager.stats().referenced_blocks == 1
    assert saved(manager) == (0, 0)


# ------------------------------------------------ who computes the next block


def test_the_next_block_is_being_computed_by_another() -> None:
    manager = KVCacheManager(32, 4)
    content = TokenContent([1] * 12)
    assert manager.in_flight(manager.lookup(content)) is None
    filling = manager.admit(TokenContent([1] * 8 + [2] * 4), 1)
    match = manager.lookup(content)
    assert match.miss_blocks == {"in_flight": 2, "cold": 1}
    assert manager.in_flight(match) is filling
    further = manager.admit(content, 1)
    match = manager.lookup(content)
    assert match.miss_blocks == {"in_flight": 3}
    assert manager.in_flight(match) is further, "it computes more of what the prompt needs"
    assert manager.in_flight(manager.lookup(TokenContent([1, 1, 3, 3]))) is None
    assert manager.in_flight(manager.lookup(content, "other")) is None

    manager.extend(further, 6)  # 7 tokens: the first block is there
    match = manager.lookup(content)
    assert (match.hit_blocks, match.computed_by) == (1, further)
    assert manager.in_flight(manager.lookup(TokenContent([1] * 4))) is None, (
        "it is there, but for its last token"
    )
    stale = match
    manager.extend(further, 5)
    assert manager.in_flight(stale) is None, "a stale match is looked up again"
    assert manager.lookup(content).hit_blocks == 2

    manager.release(further)
    manager.release(filling)
    assert manager.in_flight(manager.lookup(TokenContent([1] * 8 + [2] * 4))) is None
    manager.check_invariants()


def test_a_lookup_costs_the_same_whatever_others_prefill() -> None:
    def cost(others: int) -> int:
        manager = KVCacheManager(2000, 4)
        for i in range(others):
            manager.admit(TokenContent([1, 1, 1, 1, i, 0, 0, 0, 0]), 4 if i % 2 else 1)
        content = TokenContent([1, 1, 1, 1, 500, 0, 0, 0, 0])
        assert manager.lookup(content).hit_blocks == 1
        return count_lines(lambda: manager.lookup(content))

    assert cost(400) == cost(40)


def test_what_fills_no_block_is_not_in_flight() -> None:
    manager = KVCacheManager(16, 4)
    manager.admit(TokenContent([1] * 7), 5)  # two tokens are left, of a block that the prompt does not fill
    match = manager.lookup(TokenContent([1] * 8))
    assert match.miss_blocks == {"cold": 1}
    assert manager.in_flight(match) is None


def test_a_fork_in_the_midst_of_its_prefill_computes_as_well() -> None:
    manager = KVCacheManager(16, 4)
    content = TokenContent([1] * 8)
    parent = manager.admit(content, 3)
    (child,) = manager.fork(parent)
    assert manager.in_flight(manager.lookup(content)) is parent
    manager.release(parent)
    assert manager.in_flight(manager.lookup(content)) is child
    manager.extend(child, 5)
    assert manager.in_flight(manager.lookup(TokenContent([1] * 9))) is None
    manager.check_invariants()
