"""The host tier: golden scenarios of offloading, onboarding and swapping, block by block."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from allocator.budget import MemoryBudget
from allocator.config import BuildConfig, CacheConfig
from allocator.content import TokenContent, UniqueContent
from allocator.host import HostPool
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.model import ModelSpec
from allocator.prefix import PrefixIndex
from allocator.retention import RetentionConfig, TokenRange
from allocator.rules.cost import count_lines
from allocator.transfers import Transfers


def make(num_blocks: int = 4, num_host_blocks: int = 8, **options: Any) -> KVCacheManager:
    return KVCacheManager(num_blocks, 2, num_host_blocks=num_host_blocks, **options)


def admit_all(manager: KVCacheManager, ids: list[int], **options: Any) -> KVSequence:
    """Admit a prompt of these tokens and compute all that is not cached."""
    content = TokenContent(ids)
    match = manager.lookup(content)
    sequence = manager.admit(content, len(ids) - match.hit_tokens, match, **options)
    manager.check_invariants()
    return sequence


def run(manager: KVCacheManager, done: bool = True) -> tuple[list[list[int]], list[list[int]], Transfers]:
    """Take the pending transfers, and say that they are done; return (swap-outs, swap-ins, the list)."""
    transfers = manager.pending_swaps()
    if done:
        manager.transfers_done(transfers)
    manager.check_invariants()
    return transfers.swap_outs.tolist(), transfers.swap_ins.tolist(), transfers


def host(manager: KVCacheManager) -> Any:
    return manager.stats().host


def test_what_is_evicted_moves_to_the_host_and_is_hit_there() -> None:
    manager = make()
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 6))
    assert run(manager)[:2] == ([[1, 0], [2, 1], [3, 2]], []), "the last three of four blocks made room"
    assert host(manager).offloaded_blocks == host(manager).evictable_blocks == 3

    match = manager.lookup(TokenContent([1] * 7))
    assert (match.hit_blocks, match.host_blocks, match.hit_tokens) == (3, 2, 6)
    assert match.miss_blocks == {"short_of_block": 1}
    assert manager.blocks_needed(match, 1) == 4, (
        "two to onboard, one for the last token, one no longer evictable"
    )
    sequence = admit_all(manager, [1] * 7)
    outs, ins, _ = run(manager)
    assert sequence.block_table.tolist()[0] == 0
    assert [block for _, block in ins] == sequence.block_table.tolist()[1:3]
    assert [block for block, _ in ins] == [0, 1], "from where they were offloaded to, in order"
    assert {block for block, _ in outs} == {1, 2, 3}, "the other prompt makes room in its turn"
    assert (host(manager).hit_blocks, host(manager).onboarded_blocks) == (2, 2)
    assert manager.stats().hit_blocks == 3
    assert manager.stats().swapped_blocks == 3 + 3 + 2


def test_a_block_is_on_one_tier_only() -> None:
    manager = make()
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 8))
    run(manager)
    assert host(manager).evictable_blocks == 4
    admit_all(manager, [1] * 7)
    assert host(manager).in_transfer_blocks == 3 + 4, "three on their way back, four on their way out"
    run(manager)
    assert host(manager).evictable_blocks == 1 + 4, "what was onboarded has left"
    assert host(manager).in_transfer_blocks == 0


def test_content_that_is_computed_again_leaves_the_host() -> None:
    manager = make(6)
    manager.release(admit_all(manager, [1] * 6))
    manager.release(admit_all(manager, [2] * 12))
    run(manager)
    assert host(manager).evictable_blocks == 3
    # The last token of a prompt is computed even if it is cached: the third block comes from the sequence itself.
    again = admit_all(manager, [1] * 6)
    outs, ins, _ = run(manager)
    assert len(ins) == 2
    assert host(manager).evictable_blocks == len(outs)
    assert not again.twins
    assert manager.lookup(TokenContent([1] * 7)).host_blocks == 0


def test_both_ends_stay_until_a_transfer_is_done() -> None:
    manager = make(4, 4)
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 8))
    first = run(manager, done=False)[2]
    assert host(manager).in_transfer_blocks == 4
    # The host is full of what is still arriving there: what is evicted now is lost.
    manager.release(admit_all(manager, [3] * 8))
    assert run(manager)[:2] == ([], [])
    assert manager.lookup(TokenContent([2] * 8)).miss_blocks == {"evicted": 4}
    # What arrives can be hit, though, and the hit is transferred after it.
    match = manager.lookup(TokenContent([1] * 8))
    assert (match.hit_blocks, match.host_blocks) == (3, 3)
    sequence = admit_all(manager, [1] * 8)
    second = run(manager, done=False)[2]
    assert second.swap_ins[:, 0].tolist() == first.swap_outs[:3, 1].tolist()
    assert manager.is_arriving(sequence)
    manager.transfers_done(first)
    manager.check_invariants()
    manager.release(sequence)
    stats = manager.stats()
    assert (stats.in_transfer_blocks, stats.evictable_blocks, stats.referenced_blocks) == (3, 1, 0)
    assert manager.available_blocks == 1
    manager.check_invariants()
    manager.transfers_done(second)
    assert manager.stats().in_transfer_blocks == 0
    assert manager.available_blocks == 4
    manager.check_invariants()


def test_two_hits_share_one_transfer() -> None:
    manager = make(8)
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 16))
    run(manager)
    one, other = admit_all(manager, [1] * 7), admit_all(manager, [1] * 6 + [2])
    assert one.block_table.tolist()[:3] == other.block_table.tolist()[:3]
    assert len(run(manager)[1]) == 3
    assert not manager.is_arriving(one)


def test_offloaded_and_hit_in_one_step_goes_out_and_comes_back() -> None:
    manager = make(4)
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 8))
    sequence = admit_all(manager, [1] * 7)
    transfers = manager.pending_swaps()
    assert transfers.swap_outs.dtype == transfers.swap_ins.dtype == np.int32
    assert len(transfers) == 8 + 3
    destinations = transfers.swap_outs[:, 1].tolist()
    assert len(set(destinations)) == 8, "what comes back is not overwritten by what goes out with it"
    assert set(transfers.swap_ins[:, 0].tolist()) <= set(destinations)
    assert transfers.swap_ins[:, 1].tolist() == sequence.block_table.tolist()[:3]


def test_the_least_recently_offloaded_goes_first_and_tails_before_heads() -> None:
    manager = make(2, 3)
    for symbol in (1, 2, 3):
        manager.release(admit_all(manager, [symbol] * 4))
        run(manager)
    assert host(manager).evicted_blocks == 1
    assert manager.lookup(TokenContent([1] * 5)).host_blocks == 1, "of the first prompt, the head is left"
    assert manager.lookup(TokenContent([1] * 5)).miss_blocks == {"evicted": 1, "short_of_block": 1}
    assert manager.lookup(TokenContent([2] * 5)).host_blocks == 2
    manager.release(admit_all(manager, [4] * 4))
    assert manager.lookup(TokenContent([1] * 5)).hit_blocks == 0
    assert manager.lookup(TokenContent([2] * 5)).host_blocks == 1


def test_what_is_offloaded_in_a_row_is_one_extent() -> None:
    manager = make(64, 64)
    manager.release(admit_all(manager, [1] * 128))
    for start in range(0, 64, 4):
        manager.release(admit_all(manager, list(range(1000 + 10 * start, 1008 + 10 * start))))
        run(manager)
    assert len(list(manager.index.extents())) < 20
    assert manager.lookup(TokenContent([1] * 129)).hit_blocks == 64


def test_only_blocks_of_enough_priority_are_offloaded() -> None:
    low, high = RetentionConfig.whole(29), RetentionConfig.whole(30)
    for retention, offloaded in ((low, 0), (high, 4), (None, 4)):
        manager = make()
        manager.release(admit_all(manager, [1] * 8, retention=retention))
        manager.release(admit_all(manager, [2] * 8))
        assert len(run(manager)[0]) == offloaded
    manager = make(config=CacheConfig(offload_min_priority=36))
    manager.release(admit_all(manager, [1] * 8))
    manager.release(admit_all(manager, [2] * 8))
    assert len(run(manager)[0]) == 0
    assert manager.lookup(TokenContent([1] * 8)).miss_blocks == {"evicted": 4}


def test_what_is_below_a_block_that_is_lost_is_out_of_reach() -> None:
    manager = make()
    low = RetentionConfig((TokenRange(2, 4, priority=10),))
    manager.release(admit_all(manager, [1] * 8, retention=low))
    for symbol in (2, 3, 4, 5):
        manager.release(admit_all(manager, [symbol] * 2))
        run(manager)
    # Tail first: blocks 3 and 2 were offloaded, 1 was not worth it and takes them along, 0 was offloaded again.
    assert host(manager).offloaded_blocks == 3
    assert host(manager).evicted_blocks == 2
    match = manager.lookup(TokenContent([1] * 8))
    assert (match.host_blocks, match.miss_blocks) == (1, {"evicted": 3})


def test_a_sequence_is_swapped_out_and_in_again() -> None:
    manager = make(4, 4)
    sequence = admit_all(manager, [1] * 5)
    manager.append([sequence], [7])
    assert manager.blocks_to_swap_out(sequence) == 3
    manager.swap_out(sequence)
    stats = manager.stats()
    assert (stats.in_transfer_blocks, stats.referenced_blocks, stats.logical_blocks) == (3, 0, 0)
    assert stats.host.held_blocks == 3
    assert sequence.block_table.tolist() == []
    outs, _, _ = run(manager)
    assert sorted(block for block, _ in outs) == [0, 1, 2]
    stats = manager.stats()
    assert (stats.free_blocks, stats.evictable_blocks) == (1, 3), (
        "full blocks stay cached as long as there is room"
    )

    assert manager.blocks_to_swap_in(sequence) == 3
    manager.swap_in(sequence)
    assert run(manager)[1] == [], "all of it was still on the GPU"
    assert sequence.block_table.tolist() == [0, 1, 2]
    manager.swap_out(sequence)
    run(manager)
    manager.release(admit_all(manager, [2] * 8))
    assert run(manager)[:2] == ([], []), "the host has it already, and no room for more"
    manager.swap_in(sequence)
    ins = run(manager)[1]
    assert [block for _, block in ins] == sequence.block_table.tolist()
    assert manager.append([sequence]).tolist() == [sequence.block_table[3] * 2]
    assert sequence.num_tokens == 7
    assert host(manager).swapped_in_blocks == 3


def test_a_partly_filled_block_comes_back() -> None:
    manager = make(4, 4)
    sequence = admit_all(manager, [1] * 3)
    manager.swap_out(sequence)
    assert len(run(manager)[0]) == 2
    assert manager.stats().free_blocks == 3
    manager.swap_in(sequence)
    (pair,) = run(manager)[1]
    assert sequence.block_table[1] == pair[1]
    assert manager.append([sequence]).tolist() == [pair[1] * 2 + 1]


def test_swapping_is_all_or_nothing_and_names_the_pool() -> None:
    manager = make(4, 2)
    sequence = admit_all(manager, [1] * 5)
    with pytest.raises(OutOfBlocks, match=r"^3 host blocks needed, 2 free or evictable$") as refused:
        manager.swap_out(sequence)
    assert (refused.value.needed, refused.value.available, refused.value.pool) == (3, 2, "host")
    copy = pickle.loads(pickle.dumps(refused.value))
    assert (str(copy), copy.pool) == (str(refused.value), "host")
    assert run(manager)[:2] == ([], [])
    manager.truncate(sequence, 4)
    manager.swap_out(sequence)
    run(manager)
    other = admit_all(manager, [2] * 6)
    with pytest.raises(OutOfBlocks, match=r"^2 blocks needed, 1 free or evictable$") as refused:
        manager.swap_in(sequence)
    assert refused.value.pool == "GPU"
    manager.check_invariants()
    manager.release(other)
    manager.swap_in(sequence)
    manager.check_invariants()


def test_forks_share_on_the_host_what_they_shared_cached() -> None:
    manager = make(8, 8)
    one = admit_all(manager, [1] * 7)
    (other,) = manager.fork(one)
    manager.swap_out(one)
    assert manager.blocks_to_swap_out(other) == 1, "the full blocks are there already"
    assert manager.stats().referenced_blocks == 4, "the other one goes on"
    manager.append([other])
    manager.swap_out(other)
    run(manager)
    assert host(manager).held_blocks == 5
    manager.release(one)
    assert host(manager).held_blocks == 4
    manager.swap_in(other)
    run(manager)
    assert other.num_tokens == 8
    assert host(manager).held_blocks == 0
    manager.release(other)
    assert manager.available_blocks == 8
    manager.check_invariants()


def test_a_swapped_out_sequence_can_be_released() -> None:
    manager = make(4, 4)
    sequence = admit_all(manager, [1] * 5)
    manager.swap_out(sequence)
    manager.release(sequence)
    assert sequence.released
    manager.check_invariants()
    assert host(manager).in_transfer_blocks == 3
    run(manager)
    assert host(manager).free_blocks == 4, "the GPU still has its full blocks cached"
    with pytest.raises(ValueError, match="must not have been released"):
        manager.release(sequence)

    manager = make(4, 4)
    sequence = admit_all(manager, [1] * 5)
    manager.swap_out(sequence)
    run(manager)
    manager.release(admit_all(manager, [2] * 8))
    manager.release(sequence)
    run(manager)
    assert manager.lookup(TokenContent([1] * 5)).host_blocks == 2, "what it had cached stays, now for anybody"


def test_swapping_without_reuse() -> None:
    manager = make(4, 4, config=CacheConfig(enable_block_reuse=False))
    sequence = admit_all(manager, [1] * 5)
    manager.swap_out(sequence)
    run(manager)
    assert manager.stats().free_blocks == 4
    assert host(manager).held_blocks == 3
    manager.swap_in(sequence)
    assert len(run(manager)[1]) == 3
    assert host(manager).free_blocks == 4
    manager.release(sequence)
    assert not manager.index.roots


def test_an_incomplete_prompt_is_not_in_flight_while_it_is_swapped_out() -> None:
    manager = make(8, 8)
    sequence = manager.admit(TokenContent([1] * 8), 3)
    assert manager.lookup(TokenContent([1] * 8)).miss_blocks == {"in_flight": 3}
    manager.swap_out(sequence)
    run(manager)
    assert manager.lookup(TokenContent([1] * 8)).miss_blocks == {"cold": 3}
    manager.swap_in(sequence)
    run(manager)
    assert manager.lookup(TokenContent([1] * 8)).miss_blocks == {"in_flight": 3}
    manager.extend(sequence, 5)
    manager.check_invariants()


def test_a_tenant_has_no_blocks_while_it_is_swapped_out() -> None:
    manager = make(8, 8, quotas={"a": 3})
    sequence = manager.admit(UniqueContent(6), 6, tenant="a")
    manager.swap_out(sequence)
    run(manager)
    assert manager.tenant_blocks("a") == 0
    other = manager.admit(UniqueContent(1), 1, tenant="a")
    with pytest.raises(OutOfBlocks, match="quota leaves 2"):
        manager.swap_in(sequence)
    manager.release(other)
    manager.swap_in(sequence)
    assert manager.tenant_blocks("a") == 3
    manager.check_invariants()


def test_misuse_is_refused_in_one_line() -> None:
    manager = make(6, 6)
    sequence = admit_all(manager, [1] * 3)
    with pytest.raises(ValueError, match="must be swapped out"):
        manager.swap_in(sequence)
    batch = manager.batch()
    batch.add(sequence)
    with pytest.raises(ValueError, match="must leave its batch before it is swapped out"):
        manager.swap_out(sequence)
    batch.remove(sequence)
    manager.swap_out(sequence)
    with pytest.raises(ValueError, match=r"pending_swaps\(\) must be taken before pending_copies\(\)"):
        manager.pending_copies()
    manager.swap_in(sequence)
    with pytest.raises(ValueError, match=r"is still to be filled: take pending_swaps\(\)"):
        manager.swap_out(sequence)
    transfers = run(manager)[2]
    with pytest.raises(ValueError, match=r"transfers \(0\) must be in flight"):
        manager.transfers_done(transfers)
    manager.swap_out(sequence)
    run(manager)
    for call in (
        lambda: manager.append([sequence]),
        lambda: batch.add(sequence),
        lambda: manager.fork(sequence),
    ):
        with pytest.raises(ValueError, match="must not be swapped out"):
            call()
    manager.transfers_done(manager.pending_swaps())  # nothing to do is always done
    plain = KVCacheManager(4, 2)
    with pytest.raises(ValueError, match=r"num_host_blocks \(0\) must be at least 1 to swap"):
        plain.pending_swaps()
    assert plain.stats().host is None
    assert plain.stats().swapped_blocks == 0
    with pytest.raises(ValueError, match=r"host_cache_bytes \(4096\) needs num_host_blocks"):
        KVCacheManager(4, 2, CacheConfig(host_cache_bytes=4096))
    with pytest.raises(ValueError, match=r"offload_min_priority \(101\) must be at most 100"):
        CacheConfig(offload_min_priority=101)


def test_the_budget_counts_host_blocks() -> None:
    model = ModelSpec.preset("llama-2-7b")
    cache = CacheConfig(num_blocks=64, host_cache_bytes=10 * 524288 * 64 + 1)
    budget = MemoryBudget.compute(model, BuildConfig(), cache)
    assert budget.num_host_blocks == 10
    assert ("blocks in host memory", "10") in budget.rows()
    manager = KVCacheManager(budget.num_blocks, 64, cache, num_host_blocks=budget.num_host_blocks)
    assert host(manager).num_blocks == 10


def test_the_host_pool_alone() -> None:
    pool = HostPool(3, PrefixIndex(4), keep_cached=True)
    assert pool.take(2).tolist() == [0, 1]
    with pytest.raises(OutOfBlocks, match="2 host blocks needed, 1 free or evictable"):
        pool.take(2)
    pool.pin(0)
    pool.give([0, 1])
    assert (pool.num_free, list(pool.limbo)) == (2, [0])
    pool.unpin(0)
    assert pool.free_ids().tolist() == [2, 1, 0]


def _offloads(num_host_blocks: int) -> Iterator[int]:
    manager = make(64, num_host_blocks)
    for symbol in range(num_host_blocks // 16):
        manager.release(admit_some(manager, symbol))
        manager.transfers_done(manager.pending_swaps())
    for symbol in range(10):
        content = TokenContent([10**6 + symbol] * 32)
        yield count_lines(lambda content=content: manager.release(manager.admit(content, 32)))
        manager.transfers_done(manager.pending_swaps())


def admit_some(manager: KVCacheManager, symbol: int) -> KVSequence:
    return manager.admit(TokenContent([symbol] * 32), 32)


def test_the_cost_of_offloading_does_not_grow_with_the_host() -> None:
    small, large = list(_offloads(64)), list(_offloads(4096))
    assert max(large[2:]) <= 1.2 * max(small[2:])


def test_lifetimes_count_what_the_host_has_room_for_and_what_it_has_not() -> None:
    manager = KVCacheManager(4, 2, num_host_blocks=2, lifetimes=True)
    first = manager.admit(TokenContent([1] * 8), 8)
    manager.now = 3
    manager.release(first)
    manager.now = 5
    manager.admit(TokenContent([2] * 8), 8)  # evicts all four at once, for two of which the host has room
    manager.transfers_done(manager.pending_swaps())
    stats = manager.stats()
    assert stats.host is not None
    assert (stats.evicted_blocks, stats.host.offloaded_blocks) == (4, 2)
    assert manager.pool.lifetimes is not None
    durations = manager.pool.lifetimes.take()
    assert {name: (v.tolist(), w.tolist()) for name, (v, w) in durations.items()} == {
        "lifetime": ([5], [4]),
        "idle_before_evict": ([2], [4]),
        "reuse_gap": ([], []),
    }
