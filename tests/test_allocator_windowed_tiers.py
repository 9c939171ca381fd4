"""A host tier behind a windowed cache: single blocks go and come back, and sequences with what their windows hold."""

from __future__ import annotations

import numpy as np
import pytest
from test_allocator_windows import admit_all

from allocator.cache_state import CacheState
from allocator.config import CacheConfig
from allocator.content import TokenContent, UniqueContent
from allocator.events import rebuild
from allocator.manager import KVCacheManager, OutOfBlocks
from allocator.stats import HostStats


def tiered(
    num_blocks: int, num_host_blocks: int, window: int, num_sinks: int = 0, *, reuse: bool = True
) -> KVCacheManager:
    config = CacheConfig(window=window, num_sinks=num_sinks, enable_block_reuse=reuse)
    return KVCacheManager(num_blocks, 2, config, num_host_blocks=num_host_blocks)


def run_transfers(manager: KVCacheManager) -> tuple[list[list[int]], list[list[int]]]:
    """Execute what is pending at once; return the lists."""
    transfers = manager.pending_swaps()
    manager.transfers_done(transfers)
    return transfers.swap_outs.tolist(), transfers.swap_ins.tolist()


def host(manager: KVCacheManager) -> HostStats:
    stats = manager.stats().host
    assert stats is not None
    return stats


def test_evicted_blocks_of_a_window_come_back_one_by_one() -> None:
    manager = tiered(6, 4, window=5)
    manager.release(
        admit_all(manager, [1, 1, 2, 2, 3, 3, 4, 4])
    )  # blocks 0 to 3; the first is released first
    manager.release(manager.admit(UniqueContent(8), 8))  # takes the two free ones and pushes out 0 and 1
    assert run_transfers(manager) == ([[0, 0], [1, 1]], [])
    prompt = [1, 1, 2, 2, 3, 3, 4, 4, 5]
    match = manager.lookup(TokenContent(prompt))
    assert (match.hit_blocks, match.host_blocks, len(match.path)) == (
        4,
        0,
        2,
    )  # its window has not been pushed out
    shorter = manager.lookup(TokenContent(prompt[:7]))
    assert (shorter.hit_blocks, shorter.host_blocks, len(shorter.path)) == (
        3,
        1,
        2,
    )  # of the second, and the third
    assert manager.blocks_needed(shorter, 1) == 3, (
        "one for the token, one that comes back, one that is evictable"
    )
    sequence = manager.admit(shorter.content, 1, shorter)
    outs, ins = run_transfers(manager)
    assert (len(outs), ins) == (2, [[1, sequence.table[0]]])  # what it takes pushes out others
    assert (sequence.left, sequence.table[1], sequence.hit_tokens) == (1, 2, 6)
    assert host(manager).hit_blocks == host(manager).onboarded_blocks == 1
    manager.check_invariants()


def test_the_host_can_hold_what_comes_after_the_gpus() -> None:
    manager = tiered(4, 4, window=3, num_sinks=1)
    manager.release(admit_all(manager, [1, 1, 2, 2, 3, 3, 4, 4]))  # the sinks' block is released last
    other = manager.admit(UniqueContent(6), 6)
    assert run_transfers(manager) == ([[1, 0], [2, 1], [3, 2]], [])
    manager.release(other)
    match = manager.lookup(TokenContent([1, 1, 2, 2, 3, 3, 4, 4, 5]))
    assert [(node.start, bool(node.ids)) for node, _ in match.path] == [(0, True), (3, False)]
    sequence = manager.admit(match.content, 1, match)
    assert sequence.table[0] == 0
    assert run_transfers(manager)[1] == [[2, sequence.table[1]]]
    manager.check_invariants()


def test_a_swapped_sequence_takes_its_window_along() -> None:
    manager = tiered(8, 8, window=4, num_sinks=2)
    sequence = manager.admit(UniqueContent(6), 6)
    for _ in range(7):
        manager.append([sequence])
    assert (sequence.num_tokens, sequence.left, sequence.num_blocks) == (13, 3, 4)
    before = sequence.block_table.tolist()
    assert manager.blocks_to_swap_out(sequence) == 4
    manager.swap_out(sequence)
    outs, _ = run_transfers(manager)
    assert [source for source, _ in outs] == before
    assert (manager.logical_blocks, manager.logical_tokens) == (0, 0)
    manager.check_invariants()
    big = manager.admit(UniqueContent(16), 16)
    with pytest.raises(OutOfBlocks):
        manager.swap_in(sequence)
    manager.release(big)
    assert manager.blocks_to_swap_in(sequence) == 4
    manager.swap_in(sequence)
    _, ins = run_transfers(manager)
    assert ins == [[source, block] for (_, source), block in zip(outs, sequence.table, strict=True)]
    assert (sequence.left, sequence.context_len, manager.logical_tokens) == (3, 7, 7)
    for _ in range(4):
        manager.append([sequence])
    manager.check_invariants()
    manager.release(sequence)
    assert host(manager).held_blocks == 0


def test_a_block_computed_beside_the_cached_one_goes_and_comes_back() -> None:
    manager = tiered(8, 8, window=8)
    first = manager.admit(TokenContent([1] * 4), 1)
    second = manager.admit(TokenContent([1] * 4), 4)  # its blocks are cached
    manager.extend(first, 3)
    assert first.twins == {0, 1}
    manager.swap_out(first)
    outs, _ = run_transfers(manager)
    assert len(outs) == 2
    manager.check_invariants()
    manager.swap_in(first)
    assert run_transfers(manager)[1] == [
        [there, block] for (_, there), block in zip(outs, first.table, strict=True)
    ]
    assert first.twins == {0, 1}
    assert not set(first.table) & set(second.table)
    manager.check_invariants()


def test_what_others_hold_stays_and_is_not_moved_twice() -> None:
    manager = tiered(8, 8, window=6)
    one = admit_all(manager, [1, 1, 2, 2, 3])
    other = manager.fork(one)[0]
    manager.append([one], [4])
    run_transfers(manager)
    manager.pending_copies()
    manager.swap_out(one)
    assert len(run_transfers(manager)[0]) == 3
    assert manager.blocks_to_swap_out(other) == 1  # of three, the host has two already
    manager.swap_out(other)
    assert len(run_transfers(manager)[0]) == 1
    manager.swap_in(other)
    assert run_transfers(manager) == ([], [[3, other.table[2]]])  # the others are on the GPU still
    assert other.num_tokens == 5
    manager.check_invariants()
    manager.release(one)
    manager.release(other)
    assert host(manager).held_blocks == 0


def test_a_swapped_sequence_can_end_on_the_host() -> None:
    manager = tiered(8, 8, window=4, reuse=False)
    sequence = manager.admit(UniqueContent(7), 7)
    manager.swap_out(sequence)
    run_transfers(manager)
    assert manager.stats().free_blocks == 8
    manager.check_invariants()
    manager.release(sequence)
    assert host(manager).free_blocks == 8
    assert not manager.index.roots
    manager.check_invariants()


def test_several_ticks_at_once_count_what_transfers_still_hold() -> None:
    """A block that has come back is in transfer; when it leaves its window meanwhile, nobody can take it yet."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        manager = tiered(7, 8, window=int(rng.integers(2, 6)))
        sequence = manager.admit(UniqueContent(int(rng.integers(1, 9))), 1)
        while sequence.num_tokens < sequence.num_prompt_tokens:
            manager.extend(sequence, 1)
        manager.swap_out(sequence)
        run_transfers(manager)
        manager.swap_in(sequence)  # in flight from here on
        other = manager.admit(UniqueContent(4), 4)
        batch = manager.batch()
        batch.add(sequence)
        batch.add(other)
        possible = manager.steps_within(batch, 12)
        if possible:
            manager.advance(batch, possible)
        assert batch.tick == possible
        manager.check_invariants()


def test_what_comes_back_does_not_push_out_the_part_behind_it() -> None:
    """The second block is on the host, and the third, of which two tokens are hit, the first that would be evicted."""
    config = CacheConfig(window=4, enable_partial_reuse=True)
    manager = KVCacheManager(4, 4, config, num_host_blocks=4)
    manager.release(admit_all(manager, list(range(12))))
    other = manager.admit(UniqueContent(12), 12)  # one block is free; the first two go to the host
    run_transfers(manager)
    manager.pending_copies()
    manager.release(other)
    content = TokenContent([*range(10), 50])
    match = manager.lookup(content)
    assert (match.hit_tokens, match.host_blocks, match.copied_blocks) == (10, 1, 0)
    sequence = manager.admit(content, 1, match)
    assert sequence.table[1] == 2
    assert manager.stats().stolen_blocks == 1
    assert run_transfers(manager)[1] == [[1, sequence.table[0]]]
    manager.check_invariants()


def test_a_log_tells_where_single_blocks_are() -> None:
    """The first sequence waits on the host; of what it holds, one block is on the GPU again for another."""
    config = CacheConfig(window=4, num_sinks=2)
    manager = KVCacheManager(8, 2, config, num_host_blocks=8, events=True)
    assert manager.events is not None
    first = manager.admit(TokenContent([1, 1, 2, 2, 3, 3, 4, 4, 5]), 7)
    manager.extend(first, 2)
    manager.swap_out(first)
    run_transfers(manager)
    manager.release(manager.admit(UniqueContent(16), 16))
    run_transfers(manager)
    second = manager.admit(TokenContent([1, 1, 5]), 1)
    run_transfers(manager)
    state = rebuild(manager.events)
    assert state == CacheState.of(manager)
    assert state.swapped[0].left == first.left == 1
    assert state.swapped[0].table == tuple(manager.host_tier.host_table(first))
    (block, *_) = state.swapped[0].prefix
    assert state.host_copies[block] == second.table[0]
    manager.swap_in(first)
    assert rebuild(manager.events) == CacheState.of(manager)
    run_transfers(manager)
    assert rebuild(manager.events).sequences[0].table == tuple(first.table)


def test_without_reuse_a_block_that_a_transfer_reads_makes_no_room_when_it_leaves() -> None:
    """It was counted on: the call failed when some blocks had left already."""
    manager = tiered(4, 3, window=2, reuse=False)
    first = admit_all(manager, [1, 2, 3])  # blocks 0 and 1
    (fork,) = manager.fork(first)
    manager.swap_out(fork)
    transfers = manager.pending_swaps()
    assert transfers.swap_outs.tolist() == [[0, 0], [1, 1]]
    manager.append([first], [4])  # fills block 1, which is still being read
    manager.append([first], [5])
    second = admit_all(manager, [6, 7])
    assert (first.block_table.tolist(), second.block_table.tolist()) == ([1, 2], [3])
    assert manager.stats().free_blocks == 0
    before = manager.stats(), first.block_table.tolist()
    with pytest.raises(OutOfBlocks):
        manager.append([first, second])
    assert (manager.stats(), first.block_table.tolist()) == before
    manager.transfers_done(transfers)
    manager.append([first, second])
    assert (first.block_table.tolist(), second.block_table.tolist()) == ([2], [3, 1])
    manager.check_invariants()
