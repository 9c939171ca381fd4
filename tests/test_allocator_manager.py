"""KVCacheManager: one life of a sequence after another, and what the fuzz machines once found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from allocator.config import CacheConfig
from allocator.content import ChunkContent, TokenContent, UniqueContent
from allocator.events import rebuild
from allocator.eviction import LRU
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks


def admit_all(manager: KVCacheManager, ids: list[int], salt: str = "") -> KVSequence:
    """Admit a prompt of these tokens and compute all that is not cached."""
    content = TokenContent(ids)
    match = manager.lookup(content, salt)
    return manager.admit(content, len(ids) - match.hit_tokens, match, salt)


def test_a_life() -> None:
    manager = KVCacheManager(8, 4)
    sequence = manager.admit(TokenContent(range(10)), 6)
    assert manager.prefill_slots(sequence).tolist() == [0, 1, 2, 3, 4, 5]
    assert manager.extend(sequence, 4).tolist() == [6, 7, 8, 9]
    assert manager.append([sequence], [7]).tolist() == [10]
    assert manager.append([sequence], [[8, 9, 10]], 3).tolist() == [11, 12, 13]
    assert sequence.block_table.tolist() == [0, 1, 2, 3]
    assert sequence.num_tokens == 14
    stats = manager.stats()
    assert (stats.free_blocks, stats.referenced_blocks, stats.kv_tokens) == (4, 4, 14)
    manager.release(sequence)
    stats = manager.stats()
    assert (stats.free_blocks, stats.evictable_blocks, stats.kv_tokens) == (5, 3, 0)
    again = manager.lookup(TokenContent([*range(10), 7, 8, 99]))
    assert (again.hit_blocks, again.miss_blocks) == (3, {"short_of_block": 1})
    manager.check_invariants()


def test_the_last_token_is_always_computed() -> None:
    manager = KVCacheManager(8, 4)
    manager.release(admit_all(manager, [1] * 8))
    match = manager.lookup(TokenContent([1] * 8))
    assert (match.hit_tokens, match.query_blocks, match.miss_blocks) == (4, 2, {"last_token": 1})
    assert manager.lookup(TokenContent([1] * 9)).hit_tokens == 8


def test_miss_causes() -> None:
    manager = KVCacheManager(4, 2, ghost_blocks=2)
    manager.release(admit_all(manager, [1, 1, 2, 2]))
    assert manager.lookup(TokenContent([1, 1, 2, 2, 3]), "other").miss_blocks == {
        "isolated": 2,
        "short_of_block": 1,
    }
    assert manager.lookup(TokenContent([5, 5, 5])).miss_blocks == {"cold": 1, "short_of_block": 1}
    filling = manager.admit(TokenContent([7] * 8), 1)
    assert manager.lookup(TokenContent([7] * 6)).miss_blocks == {"in_flight": 3}
    manager.release(filling)
    assert manager.lookup(TokenContent([7] * 6)).miss_blocks == {"cold": 3}
    manager.release(admit_all(manager, [3] * 8))  # evicts both, tail first, and leaves two ghosts
    assert manager.lookup(TokenContent([1, 1, 2, 2, 4])).miss_blocks == {"evicted": 2, "short_of_block": 1}
    manager.release(admit_all(manager, [4] * 8))  # evicts four more: only two ghosts are remembered
    assert manager.lookup(TokenContent([1, 1, 2, 2, 4])).miss_blocks == {"unknown": 2, "short_of_block": 1}
    assert manager.lookup(TokenContent([3] * 8)).miss_blocks == {"evicted": 2, "unknown": 2}
    manager.check_invariants()


def test_without_reuse_nothing_is_found_or_kept() -> None:
    manager = KVCacheManager(8, 2, CacheConfig(enable_block_reuse=False))
    sequence = admit_all(manager, [1] * 6)
    assert manager.lookup(TokenContent([1] * 6)).miss_blocks == {"cold": 3}
    twin = manager.admit(TokenContent([1] * 6), 6)
    manager.check_invariants()
    manager.release(sequence)
    manager.release(twin)
    assert manager.stats().free_blocks == 8
    assert not manager.index.roots


def test_refusals_change_nothing() -> None:
    manager = KVCacheManager(4, 2)
    sequence = admit_all(manager, [1] * 6)
    match = manager.lookup(TokenContent([2] * 4))
    assert not manager.can_admit(match, 4)
    assert manager.can_admit(match, 2)
    with pytest.raises(OutOfBlocks) as refused:
        manager.admit(TokenContent([2] * 4), 4)
    assert (refused.value.needed, refused.value.available) == (2, 1)
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free or evictable"):
        manager.append([sequence], None, 3)
    assert sequence.num_tokens == 6
    assert manager.append([sequence], None, 2).tolist() == [6, 7]


def test_hits_count_against_what_is_available() -> None:
    manager = KVCacheManager(4, 2)
    manager.release(admit_all(manager, [1] * 8))
    match = manager.lookup(TokenContent([1] * 6 + [2] * 4))
    assert match.hit_blocks == 3
    assert manager.blocks_needed(match, 4) == 5
    with pytest.raises(OutOfBlocks):
        manager.admit(match.content, 4, match)
    assert manager.admit(match.content, 2, match).block_table.tolist() == [0, 1, 2, 3]


def test_copy_on_write() -> None:
    manager = KVCacheManager(8, 4)
    parent = admit_all(manager, [1] * 6)
    one, two = manager.fork(parent, 2)
    assert manager.stats().logical_blocks == 6
    assert manager.append([parent, one, two]).tolist() == [10, 14, 6]
    assert manager.pending_copies().tolist() == [[1, 2, 2], [1, 3, 2]]
    assert manager.pending_copies().shape == (0, 3)
    assert manager.stats().cow_tokens == 4
    assert manager.block_tables([parent, one, two]).tolist() == [[0, 2], [0, 3], [0, 1]]


def test_a_pending_copy_keeps_its_source_from_reuse() -> None:
    manager = KVCacheManager(4, 4)
    parent = admit_all(manager, [1] * 2)
    (child,) = manager.fork(parent)
    manager.append([child])
    manager.release(parent)
    stats = manager.stats()
    assert (stats.free_blocks, stats.in_transfer_blocks) == (2, 1)
    other = admit_all(manager, [2] * 2)
    assert set(manager.fork(other)[0].table) == {2}
    manager.append([other])
    assert manager.pending_copies().tolist() == [[0, 1, 2], [2, 3, 2]]
    assert manager.stats().in_transfer_blocks == 0
    manager.check_invariants()


def test_a_copy_cannot_be_a_source_before_it_is_made() -> None:
    manager = KVCacheManager(8, 4)
    parent = admit_all(manager, [1] * 2)
    (child,) = manager.fork(parent)
    manager.append([child])
    (grandchild,) = manager.fork(child)
    with pytest.raises(
        ValueError, match=r"block 1 is still to be copied into: take pending_copies\(\) first"
    ):
        manager.append([grandchild])
    manager.pending_copies()
    manager.append([grandchild])
    assert manager.pending_copies().tolist() == [[1, 2, 3]]


def test_beams() -> None:
    manager = KVCacheManager(16, 2)
    first = admit_all(manager, [1] * 5)
    beams = [first, *manager.fork(first, 2)]
    manager.append(beams, [5, 6, 7])
    manager.reorder_beams(beams, [2, 2, 0])
    manager.pending_copies()
    assert len({beam.table[2] for beam in beams}) == 2
    assert [beam.history.keys(2, 3)[4:] for beam in beams] == [np.int32(x).tobytes() for x in (7, 7, 5)]
    manager.check_invariants()
    manager.append(beams)
    manager.check_invariants()
    for beam in beams:
        manager.release(beam)
    assert manager.available_blocks == 16


def test_truncation_into_a_cached_block() -> None:
    manager = KVCacheManager(8, 4)
    sequence = admit_all(manager, [1] * 8)
    manager.truncate(sequence, 6)
    assert manager.append([sequence], [2]).tolist() == [6], (
        "nobody else holds the block: it is written in place"
    )
    assert manager.lookup(TokenContent([1] * 9)).hit_blocks == 1
    manager.append([sequence], [2])
    assert manager.lookup(TokenContent([1] * 6 + [2] * 3)).hit_blocks == 2
    other = admit_all(manager, [1] * 6 + [2] * 3)
    manager.truncate(other, 5)
    assert manager.append([other], [3]).tolist() == [4 * other.table[1] + 1]
    assert manager.pending_copies().tolist() == [[1, other.table[1], 1]]
    manager.check_invariants()


def test_equal_content_computed_twice_is_cached_once() -> None:
    manager = KVCacheManager(8, 2)
    one = manager.admit(TokenContent([1] * 4), 1)
    two = manager.admit(TokenContent([1] * 4), 1)
    manager.extend(one, 3)
    manager.extend(two, 3)
    assert set(one.table).isdisjoint(two.table)
    stats = manager.stats()
    assert (stats.free_blocks, stats.referenced_blocks) == (4, 4)
    manager.release(two)
    assert manager.stats().free_blocks == 6
    manager.append([one], [1])
    assert manager.lookup(TokenContent([1] * 6)).hit_blocks == 2
    manager.check_invariants()


def test_a_fork_in_the_middle_of_a_prefill_says_the_same_prompt() -> None:
    manager = KVCacheManager(8, 2)
    for content in (TokenContent([1] * 6), ChunkContent([7], 6, 6), UniqueContent(6)):
        parent = manager.admit(content, 3)
        (child,) = manager.fork(parent)
        manager.extend(parent, 3)
        manager.extend(child, 3)
        manager.pending_copies()
        assert child.history.keys(0, 3) == parent.history.keys(0, 3)
        manager.append([parent, child], None, 2)
        assert child.history.keys(3, 4) != parent.history.keys(3, 4)
        manager.check_invariants()
        manager.release(parent)
        manager.release(child)


def test_preempted_in_the_middle_of_its_prefill_a_prompt_stays_whole() -> None:
    manager = KVCacheManager(8, 2)
    content = UniqueContent(7)
    sequence = manager.admit(content, 3)
    resumed = sequence.content()
    manager.release(sequence)
    assert resumed.num_prompt_tokens == 7
    assert resumed.prompt_keys(2) == content.prompt_keys(2)


# ------------------------------------------------ found by the fuzz machines


def test_all_leave_their_shared_blocks_before_any_content_is_indexed() -> None:
    """What the first writes becomes equal to the cached block that the second was to take out of the index."""
    manager = KVCacheManager(2, 2)
    cut = admit_all(manager, [0, 1])
    manager.truncate(cut, 1)
    filling = admit_all(manager, [0])
    assert manager.available_blocks == 0
    assert manager.append([filling, cut], [1, 0]).tolist() == [3, 1]
    assert manager.lookup(TokenContent([0, 1, 5])).hit_blocks == 1
    assert manager.lookup(TokenContent([0, 0, 5])).hit_blocks == 1
    manager.check_invariants()


@pytest.mark.parametrize("in_batch", [False, True])
def test_all_have_their_blocks_before_any_content_is_indexed(in_batch: bool) -> None:
    """What the first writes repeats an evictable block, which the second was to get."""
    manager = KVCacheManager(6, 1)
    one, two = admit_all(manager, [0]), admit_all(manager, [5])
    (cached,) = manager.fork(one)
    manager.append([cached], [1])
    manager.release(cached)
    other = admit_all(manager, [7])
    assert (manager.stats().free_blocks, manager.stats().evictable_blocks) == (2, 1)
    manager.append([other])
    if in_batch:
        batch = manager.batch()
        batch.add(one)
        manager.append(batch, [[1, 1]], 2)
    else:
        manager.append([one, two], [1, 1])
    assert manager.available_blocks == 0
    manager.check_invariants()


def test_a_match_grows_stale_when_a_prefill_begins_or_ends() -> None:
    manager = KVCacheManager(8, 4)
    content = TokenContent([1] * 8)
    match = manager.lookup(content)
    filling = manager.admit(content, 1)  # fills no block, but is about to
    assert not manager.is_current(match)
    match = manager.lookup(content)
    assert match.miss_blocks == {"in_flight": 2}
    manager.release(filling)
    assert not manager.is_current(match)


def test_a_match_grows_stale_when_what_it_missed_is_cached() -> None:
    manager = KVCacheManager(8, 4)
    content = TokenContent([1] * 12)
    filling = manager.admit(content, 4)
    for missed in ({"in_flight": 2}, {"in_flight": 1}):
        match = manager.lookup(content)
        assert match.miss_blocks == missed
        manager.extend(filling, 4)  # of what is this sequence's own, more
        assert not manager.is_current(match)


def test_tokens_of_a_block_that_is_a_tail_here_and_full_there() -> None:
    manager = KVCacheManager(8, 4)
    cached = admit_all(manager, [1] * 4)
    twin = manager.admit(TokenContent([1] * 4), 4)
    (child,) = manager.fork(twin)
    manager.truncate(child, 2)
    assert child.table == twin.table != cached.table
    assert manager.kv_tokens == 8
    manager.release(twin)
    assert manager.kv_tokens == 6


# ------------------------------------------------ bad input


def test_bad_input_is_named() -> None:
    for size in (0, 3, -4):
        with pytest.raises(
            ValueError, match=rf"tokens_per_block \({size}\) must be (a power of two|at least 1)"
        ):
            KVCacheManager(4, size)
    with pytest.raises(ValueError, match=r"num_blocks \(0\) must be at least 1"):
        KVCacheManager(0, 4)
    with pytest.raises(ValueError, match=r"ghost_blocks \(-1\) must be at least 0"):
        KVCacheManager(4, 4, ghost_blocks=-1)

    manager = KVCacheManager(8, 4)
    content = TokenContent([1] * 6)
    for tokens in (0, 7):
        with pytest.raises(
            ValueError,
            match=rf"num_tokens \({tokens}\) must be (at least 1|at most the prompt's remaining 6)",
        ):
            manager.admit(content, tokens)
    with pytest.raises(ValueError, match="match must come from a lookup of the same content object and salt"):
        manager.admit(content, 1, manager.lookup(content), "salt")
    sequence = manager.admit(content, 4)
    with pytest.raises(ValueError, match="must have its prompt of 6 complete"):
        manager.append([sequence])
    with pytest.raises(ValueError, match="past its prefill to be truncated"):
        manager.truncate(sequence, 3)
    with pytest.raises(ValueError, match=r"num_tokens \(3\) must be at most the prompt's remaining 2"):
        manager.extend(sequence, 3)
    manager.extend(sequence, 2)
    with pytest.raises(ValueError, match=r"num_tokens \(0\) must be at least 1"):
        manager.append([sequence], None, 0)
    with pytest.raises(ValueError, match=r"sequences \(2\) must be distinct"):
        manager.append([sequence, sequence])
    with pytest.raises(ValueError, match=r"tokens \(2 of them\) must be as many as sequences \(1\)"):
        manager.append([sequence], [1, 2])
    with pytest.raises(ValueError, match=r"tokens \(1 for a sequence\) must be num_tokens \(2\)"):
        manager.append([sequence], [[1]], 2)
    with pytest.raises(ValueError, match=r"tokens \(-1\) must not be negative"):
        manager.append([sequence], [-1])
    for length in (0, 7):
        with pytest.raises(
            ValueError, match=rf"num_tokens \({length}\) must be (at least 1|at most the sequence's 6)"
        ):
            manager.truncate(sequence, length)
    with pytest.raises(ValueError, match=r"n \(0\) must be at least 1"):
        manager.fork(sequence, 0)
    with pytest.raises(ValueError, match=r"parents \(2 of them\) must be as many as sequences \(1\)"):
        manager.reorder_beams([sequence], [0, 0])
    with pytest.raises(ValueError, match=r"parents \(\[1\]\) must index the 1 sequences"):
        manager.reorder_beams([sequence], [1])
    manager.release(sequence)
    for refused in (manager.release, manager.fork, lambda s: manager.append([s])):
        with pytest.raises(ValueError, match="must not have been released"):
            refused(sequence)
    manager.check_invariants()
    assert manager.append([]).shape == (0,)
    assert manager.block_tables([]).shape == (0, 0)


def test_what_is_of_another_kind_is_named() -> None:
    wrong: Any = [1, 2]
    manager = KVCacheManager(16, 4)
    for refused in (lambda: manager.lookup(wrong), lambda: manager.admit(wrong, 2)):
        with pytest.raises(ValueError, match=r"content \(\[1, 2\]\) must be a Content"):
            refused()
    with pytest.raises(ValueError, match=r"config \('lru'\) must be a CacheConfig"):
        KVCacheManager(16, 4, "lru")
    sequence = manager.admit(TokenContent([1] * 6), 6)
    for unlike in (None, "sequence"):
        nothing: Any = unlike
        for call in (manager.release, manager.fork, manager.room, manager.reclaimable_blocks):
            with pytest.raises(ValueError, match=r"sequence \(.*\) must be a KVSequence"):
                call(nothing)
    alone: Any = sequence
    with pytest.raises(ValueError, match="must be a list of them, or a Batch"):
        manager.append(alone, [1])
    for token, text in ((1.5, "1.5"), ("a", "'a'"), (True, "True")):
        odd: Any = [token]
        with pytest.raises(ValueError, match=rf"tokens \({text}\) must be an integer"):
            manager.append([sequence], odd)
    for parents in ([0.0], [True]):
        odd = parents
        with pytest.raises(ValueError, match=r"parents \(.*\) must be an integer"):
            manager.reorder_beams([sequence], odd)
    with pytest.raises(ValueError, match="must not have its prompt of 6 complete"):
        manager.extend(sequence, 1)
    for length in (0, 8):
        with pytest.raises(ValueError, match=rf"num_tokens \({length}\) must be in 1..7"):
            sequence.content(length)
    assert sequence.content(7).num_prompt_tokens == 7
    no_log: Any = manager.events
    with pytest.raises(
        ValueError, match=r"log \(None\) must be an EventLog, which a manager made with events=True"
    ):
        rebuild(no_log)
    assert sequence.num_tokens == 6
    manager.check_invariants()


def test_plans_are_for_what_runs() -> None:
    manager = KVCacheManager(16, 4)
    one, other = (manager.admit(TokenContent([symbol] * 6), 6) for symbol in (1, 2))
    assert manager.blocks_to_advance([one, other], 3) == 2
    with pytest.raises(ValueError, match=r"sequences \(2\) must be distinct"):
        manager.blocks_to_advance([one, one])
    with pytest.raises(ValueError, match=r"num_tokens \(0\) must be at least 1"):
        manager.blocks_to_advance([one], 0)
    manager.release(one)
    stranger = KVCacheManager(16, 4).admit(TokenContent([1] * 6), 6)
    for gone, state in ((one, "have been released already"), (stranger, "be another manager's")):
        for call in (
            lambda s: manager.room(s),
            lambda s: manager.blocks_to_advance([other, s]),
            lambda s: manager.block_tables([other, s]),
            lambda s: manager.remaining_blocks(s, 9),
        ):
            with pytest.raises(ValueError, match=f"must not {state}"):
                call(gone)


def test_a_stale_match_of_something_else_is_refused() -> None:
    manager = KVCacheManager(16, 4)
    one, other = TokenContent([1] * 6), TokenContent([2] * 6)
    match = manager.lookup(one)
    manager.release(manager.admit(other, 6))
    assert not manager.is_current(match)
    for content, salt in ((other, ""), (one, "salt")):
        with pytest.raises(ValueError, match="must come from a lookup of the same content object and salt"):
            manager.admit(content, 2, match, salt)
    manager.release(manager.admit(one, 2, match))
    manager.check_invariants()


def test_a_policy_belongs_to_one_pool() -> None:
    policy = LRU()
    KVCacheManager(16, 4, policy=policy)
    with pytest.raises(ValueError, match="made and not yet in use"):
        KVCacheManager(16, 4, policy=policy)


def test_out_of_blocks_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(OutOfBlocks(3, 2)))
    assert (error.needed, error.available, str(error)) == (3, 2, "3 blocks needed, 2 free or evictable")


def test_sequences_of_another_manager_are_refused() -> None:
    mine, other = KVCacheManager(8, 4), KVCacheManager(8, 4)
    stranger = other.admit(TokenContent([1] * 4), 4)
    calls = (
        mine.release,
        mine.fork,
        lambda s: mine.append([s]),
        lambda s: mine.truncate(s, 1),
        lambda s: mine.extend(s, 1),
        lambda s: mine.reorder_beams([s], [0]),
        mine.batch().add,
    )
    for call in calls:
        with pytest.raises(ValueError, match="must not be another manager's"):
            call(stranger)
    batch = other.batch()
    batch.add(stranger)
    with pytest.raises(ValueError, match="a batch of 1 sequences must be this manager's own"):
        mine.append(batch)
    mine.check_invariants()
    other.check_invariants()


def test_beams_must_be_complete_distinct_and_alike() -> None:
    manager = KVCacheManager(16, 4)
    content = TokenContent([1] * 6)
    partial = manager.admit(content, 2)
    with pytest.raises(ValueError, match="must have its prompt of 6 complete"):
        manager.reorder_beams([partial], [0])
    one = manager.admit(TokenContent([2] * 5), 5)
    salted = manager.admit(TokenContent([2] * 5), 5, salt="other")
    with pytest.raises(ValueError, match=r"sequences \(2\) must be distinct"):
        manager.reorder_beams([one, one], [0, 1])
    with pytest.raises(ValueError, match="equal lengths, salts and tenants"):
        manager.reorder_beams([one, salted], [1, 0])
    manager.check_invariants()


def test_naming_tokens_of_chunked_content_changes_nothing() -> None:
    manager = KVCacheManager(16, 4)
    named = manager.admit(TokenContent([2] * 4), 4)
    chunked = manager.admit(ChunkContent([1], 4, 4), 4)
    before = named.content().prompt_keys(4)
    with pytest.raises(ValueError, match="cannot be named one by one"):
        manager.append([named, chunked], [7, 7])
    assert named.num_tokens == chunked.num_tokens == 4
    assert named.content().prompt_keys(4) == before
    manager.check_invariants()


@pytest.mark.parametrize("count", [1.0, 1.5, "1", None, True])
def test_counts_must_be_integers(count: Any) -> None:
    manager = KVCacheManager(16, 4)
    content = TokenContent([1] * 6)
    sequence = manager.admit(content, 6)
    match = manager.lookup(content)
    calls = (
        lambda: manager.admit(content, count),
        lambda: manager.append([sequence], None, count),
        lambda: manager.truncate(sequence, count),
        lambda: manager.fork(sequence, count),
        lambda: manager.can_admit(match, count),
        lambda: KVCacheManager(count, 4),
        lambda: KVCacheManager(4, count),
        lambda: KVCacheManager.contiguous(3, count),
        lambda: UniqueContent(count),
        lambda: ChunkContent([1], count, 1),
    )
    for call in calls:
        with pytest.raises(ValueError, match="must be an integer"):
            call()
    manager.check_invariants()
    assert sequence.num_tokens == 6


def test_numpy_integers_count() -> None:
    manager = KVCacheManager(np.int64(16), np.int32(4))
    sequence = manager.admit(TokenContent([1] * 6), np.int64(6))
    manager.append([sequence], None, np.int64(3))
    assert type(sequence.num_tokens) is int
    manager.check_invariants()


def test_a_match_of_another_manager_is_looked_up_again() -> None:
    mine, other = KVCacheManager(8, 4), KVCacheManager(8, 4)
    content = TokenContent([1] * 9)
    for manager in (mine, other):
        manager.release(manager.admit(content, 9))
    match = other.lookup(content)
    assert match.version == mine.index.version
    assert not mine.is_current(match)
    mine.admit(content, 1, match)
    mine.check_invariants()
    other.check_invariants()


class Wrong(LRU):
    """Chooses what `answer` says."""

    answer: Any = None

    def victim(self, wanted: int) -> Any:
        extent, count = super().victim(wanted)
        return self.answer(extent, count)


@pytest.mark.parametrize(
    "answer",
    [
        lambda extent, count: None,
        lambda extent, count: "lru",
        lambda extent, count: (extent, 0),
        lambda extent, count: (extent, -1),
        lambda extent, count: (extent, 1.0),
        lambda extent, count: (extent, count + 100),
        lambda extent, count: (extent.parent, 1),
    ],
)
def test_a_policy_that_chooses_nonsense_is_named(answer: Any) -> None:
    policy = Wrong()
    policy.answer = answer
    manager = KVCacheManager(2, 4, policy=policy)
    manager.release(manager.admit(TokenContent([1] * 8), 8))
    with pytest.raises(
        ValueError, match=r"policy Wrong chose .* a victim must be an extent without references"
    ):
        manager.admit(TokenContent([2] * 8), 8)


def test_what_is_no_policy_is_refused() -> None:
    for policy in (LRU, "lru"):
        with pytest.raises(ValueError, match="must be an EvictionPolicy"):
            KVCacheManager(2, 4, policy=policy)


def test_more_blocks_than_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_blocks \(2147483648\) must be at most 2147483647"):
        KVCacheManager(2**31, 4)


@pytest.mark.parametrize("ids", [np.array([1.5]), np.array([[1, 2]]), np.array(["a"])])
def test_ids_must_be_a_row_of_integers(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"token_ids .* must be a row of integers"):
        TokenContent(ids)
    with pytest.raises(ValueError, match=r"chunk_ids .* must be a row of integers"):
        ChunkContent(ids, 16, 5)
