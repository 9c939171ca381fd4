"""BlockPool: what is taken in which order, what is shared, and what a pin keeps."""

from __future__ import annotations

import pickle
from array import array

import pytest

from allocator.eviction import LRU
from allocator.pool import BlockPool, OutOfBlocks
from allocator.prefix import Extent, PrefixIndex


def make(num_blocks: int, ghosts: int = 8, keep_cached: bool = True) -> tuple[BlockPool, PrefixIndex, Extent]:
    index = PrefixIndex(ghosts)
    root = index.root("tokens", "", 1)
    root.references = 1
    return BlockPool(num_blocks, LRU(), index, keep_cached=keep_cached), index, root


def cache(pool: BlockPool, index: PrefixIndex, parent: Extent, keys: bytes) -> Extent:
    """Take blocks and cache them below `parent`, referenced once."""
    extent = index.attach(parent, keys, pool.take(len(keys)))
    extent.references = 1
    pool.cached(extent, len(keys))
    return extent


def test_fresh_blocks_come_in_order_and_freed_ones_last_in_first_out() -> None:
    pool, *_ = make(6)
    assert pool.take(3).tolist() == [0, 1, 2]
    pool.give(array("i", [1]))
    pool.give([2, 0])
    assert pool.free_ids().tolist() == [5, 4, 3, 1, 2, 0]
    assert pool.take(5).tolist() == [0, 2, 1, 3, 4]
    assert (pool.num_free, pool.available, pool.num_referenced) == (1, 1, 5)


def test_too_many_are_refused_and_nothing_taken() -> None:
    pool, *_ = make(3)
    pool.take(1)
    with pytest.raises(OutOfBlocks, match="3 blocks needed, 2 free or evictable") as refused:
        pool.take(3)
    assert (refused.value.needed, refused.value.available) == (3, 2)
    assert pool.num_free == 2
    copy = pickle.loads(pickle.dumps(refused.value))
    assert (copy.needed, copy.available) == (3, 2)
    with pytest.raises(ValueError, match=r"num_blocks \(0\) must be at least 1"):
        make(0)


def test_free_blocks_go_before_cached_ones_and_tails_before_heads() -> None:
    pool, index, root = make(6)
    old = cache(pool, index, root, b"ab")
    new = cache(pool, index, root, b"cd")
    pool.drop(new)
    pool.drop(old)
    assert (pool.num_free, pool.num_evictable, pool.available) == (2, 4, 6)
    assert pool.take(3).tolist() == [4, 5, 3]
    assert pool.evicted_blocks == 1
    pool.settle()
    assert new.ids.tolist() == [2]
    assert pool.take(3).tolist() == [2, 1, 0]
    assert index.ghost_blocks == 4
    assert pool.available == 0


def test_a_hit_takes_an_extent_out_of_reach() -> None:
    pool, index, root = make(4)
    extent = cache(pool, index, root, b"ab")
    pool.drop(extent)
    pool.hit(extent)
    assert (pool.num_evictable, extent.sealed) == (0, True)
    with pytest.raises(OutOfBlocks):
        pool.take(3)
    pool.hit(extent)
    pool.drop(extent)
    assert pool.num_evictable == 0, "one of two holders is left"
    pool.drop(extent)
    assert pool.num_evictable == 2


def test_a_path_is_dropped_deepest_first() -> None:
    pool, index, root = make(4)
    head = cache(pool, index, root, b"ab")
    tail = cache(pool, index, head, b"c")
    pool.acquire(head)
    pool.drop(head)
    pool.drop_path(tail)
    assert pool.take(2).tolist() == [3, 2], "the deepest goes first"
    pool.acquire_path(head)
    assert pool.num_evictable == 0


def test_without_keeping_dropped_extents_are_free() -> None:
    pool, index, root = make(4, keep_cached=False)
    extent = cache(pool, index, root, b"abc")
    pool.drop(extent)
    assert (pool.num_free, pool.num_evictable) == (4, 0)
    assert list(index.extents()) == []
    assert pool.take(4).tolist() == [0, 1, 2, 3]


def test_shared_blocks_count_their_holders() -> None:
    pool, *_ = make(4)
    (block,) = pool.take(1)
    assert pool.unshare(block) is False
    pool.share(block, 2)
    assert pool.unshare(block) is True
    assert pool.unshare(block) is True
    assert pool.unshare(block) is False
    assert pool.shared == {}


def test_a_pinned_block_waits_in_limbo() -> None:
    pool, *_ = make(4)
    one, two = pool.take(2)
    pool.pin(one)
    pool.pin(one)
    pool.give([one, two])
    assert (list(pool.limbo), pool.num_free, pool.num_referenced) == ([one], 3, 0)
    pool.unpin(one)
    assert list(pool.limbo) == [one]
    pool.unpin(one)
    assert (list(pool.limbo), pool.num_free) == ([], 4)
    assert pool.free_ids()[-1] == one


def test_a_split_leaves_counts_and_order_alone() -> None:
    pool, index, root = make(8)
    first = cache(pool, index, root, b"abcd")
    second = cache(pool, index, root, b"xy")
    pool.drop(first)
    pool.drop(second)
    pool.take(2)
    head = pool.split(first, 2)
    pool.hit(head)
    assert (head.ids.tolist(), first.ids.tolist(), pool.num_evictable) == ([0, 1], [2, 3], 4)
    assert pool.take(1).tolist() == [3], "the tail keeps its place before the second extent"
    pool.drop(head)
    assert pool.take(5).tolist() == [2, 5, 4, 1, 0]


def test_out_of_blocks_can_be_made_anew_from_its_arguments() -> None:
    error = OutOfBlocks(3, 2)
    for again in (pickle.loads(pickle.dumps(error)), type(error)(*error.args)):
        assert (again.needed, again.available) == (3, 2)
        assert str(again) == "3 blocks needed, 2 free or evictable"
