"""The manager's invariants, recounted from nothing but its tables and its tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from allocator.invariants_host import check_host, check_partition
from allocator.prefix import Extent
from allocator.stats import CacheStats
from allocator.windowed_invariants import check_windowed_sequences, check_windowed_tree

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager


def check_invariants(manager: KVCacheManager) -> None:
    """Raise AssertionError, saying which rule is broken, unless all of these hold:

    - every block is exactly one of free, cached, private to tables, or in transfer;
    - an extent is referenced by exactly the sequences (and pending copies) whose path leads through it;
    - neither end of a pending copy is free;
    - a private block has as many holders as tables that name it;
    - the counters (evictable, referenced, logical) say what a recount says;
    - a table names the cached block at every anchored position that is not a twin's;
    - the content of an anchored position is the key under which the index has it;
    - the block that a sequence writes next is its alone and not cached, or known to need a copy;
    - extents fit together: starts, keys, widths, live children; ghosts lie below what is live and in bounds;
    - with lifetimes, every cached block has a time at which it was filled, none after those that follow it;
    - with a host tier, all that `invariants_host` adds.

    In a windowed cache, what concerns tree and tables is in `windowed_invariants`.
    """
    for sequence in manager.sequences:
        if sequence.batch is not None and sequence.batch.coasted:
            sequence.batch.catch_up_all()
    transfers = [] if manager.pool.tier is None else manager.pool.tier.queue.gpu_held()
    stats = manager.stats()
    if manager.windowed is None:
        cached = _check_tree(manager, transfers)
        private = _check_sequences(manager, stats)
    else:
        cached = check_windowed_tree(manager, manager.windowed.index)
        private = check_windowed_sequences(manager, stats)
    pool = manager.pool

    free = pool.free_ids().tolist()
    check_partition(pool.num_blocks, "blocks", free, cached, private, pool.limbo)
    assert len(free) == pool.num_free
    reused = manager.tables.copies.blocks().intersection(free)
    assert not reused, f"blocks {sorted(reused)} are free, but still to be copied"

    for block, holders in private.items():
        assert pool.shared.get(block, 1) == holders, f"block {block} has {holders} holders"
    assert set(pool.shared) <= set(private), "a block without holders is listed as shared"

    if pool.lifetimes is not None:
        _check_births(cached.values(), pool.now)
    if pool.partial is not None:
        pool.partial.check()
    manager._prefilling.check()

    _check_saved(manager, stats, cached)

    evictable = sum(1 for extent in cached.values() if not extent.references)
    assert pool.num_evictable == evictable, f"{evictable} blocks are evictable, not {pool.num_evictable}"
    needed = Counter(each for held in transfers for each in manager.index.held_with(held))
    transferred = sum(len(extent.ids) for extent in needed if extent.references == needed[extent])
    in_transfer = len(pool.limbo) + transferred
    assert pool.num_in_transfer == in_transfer, f"{in_transfer} blocks are in transfer"
    referenced = len(cached) - evictable + len(private) - transferred
    assert pool.num_referenced == referenced, f"{referenced} blocks are referenced, not {pool.num_referenced}"
    if not manager.sequences and not len(manager.tables.copies):
        assert pool.num_free + pool.num_evictable + in_transfer == pool.num_blocks, "blocks leaked"
    if pool.tier is not None:
        check_host(manager, pool.tier)


def _check_tree(manager: KVCacheManager, transfers: Iterable[Extent]) -> dict[int, Extent]:
    """Check the shape of the tree and its references; return the extent of each cached block."""
    anchors = [sequence.anchor for sequence in manager.sequences]
    anchors += [*manager.tables.copies.held_extents(), *transfers]
    references = Counter(extent for anchor in anchors for extent in anchor.path())

    cached: dict[int, Extent] = {}
    ghosts = 0
    for extent in manager.index.extents():
        parent = extent.parent
        assert parent is not None
        assert extent.start == parent.end, f"{extent} does not continue {parent}"
        assert extent.keys, f"{extent} is empty"
        assert len(extent.keys) % extent.width == 0
        assert extent.width == parent.width
        assert parent.children is not None
        assert parent.children.get(extent.first_key) is extent, f"{extent} is not where it is looked up"
        live = [child for child in (extent.children or {}).values() if child.ids]
        assert extent.live_children == len(live), f"{extent} has {len(live)} live children"
        assert extent.references == references[extent], f"{extent} has {references[extent]} references"
        if extent.ids:
            assert len(extent.ids) == extent.num_blocks
            assert extent.references >= sum(child.references for child in live), f"{extent} lost references"
            assert manager.reuse or extent.references, f"{extent} is kept without reuse"
            for block in extent.ids:
                assert block not in cached, f"block {block} is cached twice"
                cached[block] = extent
        else:
            ghosts += extent.num_blocks if extent.host is None else 0
            assert not extent.references
            assert not live, f"{extent} is a ghost above live blocks"
    index = manager.index
    assert index.ghost_blocks == ghosts, f"{ghosts} ghosts, not {index.ghost_blocks}"
    assert ghosts <= index.ghost_capacity
    return cached


def _check_births(extents: Iterable[Extent], now: int) -> None:
    for extent in extents:
        assert extent.born is not None, f"{extent} was never filled"
        blocks, dates = extent.born[::2], extent.born[1::2]
        assert min(blocks) > 0
        assert sum(blocks) == len(extent.ids), f"{extent} has {sum(blocks)} dates of birth"
        assert sorted(dates) == dates.tolist(), f"{extent} was filled back to front: {dates.tolist()}"
        assert dates[-1] <= now, f"{extent} will be filled at {dates[-1]}, and it is {now}"


def _check_sequences(manager: KVCacheManager, stats: CacheStats) -> Counter[int]:
    """Check each table against tree and content; return how many tables hold each private block."""
    size = manager.tokens_per_block
    private: Counter[int] = Counter()
    blocks = tokens = 0
    for sequence in manager.sequences:
        table, anchored = sequence.table, sequence.anchored
        blocks += len(table)
        tokens += sequence.num_tokens
        assert not sequence.released
        assert len(table) == -(-sequence.num_tokens // size), f"{sequence} has the wrong number of blocks"
        assert anchored <= len(table)
        full = sequence.num_tokens // size
        assert anchored >= full or not manager.indexes_full, (
            f"{sequence} has full blocks that are not indexed"
        )
        assert len(set(table)) == len(table), f"{sequence} holds a block twice"
        ids: list[int] = []
        keys = b""
        for extent in reversed(list(sequence.anchor.path())):
            ids.extend(extent.ids)
            keys += extent.keys
        assert len(ids) == anchored, f"{sequence} is anchored at a ghost"
        full = min(full, anchored)
        assert sequence.history.keys(0, full) == keys[: full * sequence.history.key_width], (
            f"{sequence} is anchored at other content"
        )
        for position, block in enumerate(table):
            if position >= anchored or position in sequence.twins:
                private[block] += 1
            else:
                assert block == ids[position], f"{sequence} holds {block} where {ids[position]} is cached"
        assert all(position < anchored for position in sequence.twins)
        batch = sequence.batch
        if batch is not None and sequence not in batch.unready:
            assert manager.tables.shared_tail(sequence) is None, f"{sequence} would write to a shared block"
    if manager.quotas is not None:
        for tenant in manager.quotas:
            used = sum(len(s.table) for s in manager.sequences if s.tenant is tenant)
            assert tenant.blocks == used, f"tenant {tenant.name!r} uses {used} blocks, not {tenant.blocks}"
    assert (stats.logical_blocks, stats.logical_tokens) == (blocks, tokens), "logical counts are off"
    assert set(manager.tables.twinned) == {s for s in manager.sequences if s.twins}
    return private


def _check_saved(manager: KVCacheManager, stats: CacheStats, cached: Container[int]) -> None:
    """Compare what sharing saves with a recount of the blocks in tables, and of the slots written in them."""
    size = manager.tokens_per_block
    written: dict[int, int] = {}
    for sequence in manager.sequences:
        *whole, last = sequence.table
        for block in whole:
            written[block] = size
        slots = size if last in cached else size - -sequence.num_tokens % size
        written[last] = max(slots, written.get(last, 0))
    saved = stats.logical_blocks - len(written), stats.logical_tokens - sum(written.values())
    assert (stats.saved_blocks, stats.saved_tokens) == saved, f"{saved} blocks and tokens are saved"
    assert manager.saved_blocks == stats.saved_blocks
