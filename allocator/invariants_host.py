"""The host tier's invariants, recounted from its tree, its swapped-out sequences and its transfers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from allocator.prefix import Extent
from allocator.tiers import HostTier

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager


def check_partition(num_blocks: int, name: str, *kinds: Iterable[int]) -> None:
    """Raise AssertionError unless each block from 0 on is in exactly one of these."""
    owned = [block for kind in kinds for block in kind]
    found = set(owned)
    if len(found) < len(owned):
        twice = [block for block, count in Counter(owned).items() if count > 1]
        raise AssertionError(f"{name} {twice} are in two states at once")
    assert found == set(range(num_blocks)), f"{num_blocks - len(found)} {name} are lost"


def check_host(manager: KVCacheManager, tier: HostTier) -> None:
    """Raise AssertionError, saying which rule is broken, unless all of these hold:

    - every host block is exactly one of free, an extent's, private to one swapped-out sequence, or in limbo;
    - an extent is held on the host by exactly the swapped-out sequences and transfers whose path it is on;
    - what both tiers hold, somebody needs on the host;
    - what only the host holds lies below what the GPU or the host holds, and is evictable unless held;
    - the host would evict children before their parents;
    - neither end of a transfer is free on either side, and each is pinned once for each transfer;
    - a swapped-out sequence has no GPU block, and host blocks for exactly its tokens.

    In a windowed cache, single blocks are held and evicted, in no order, and a sequence has what its table had.
    """
    held = _check_tree(manager, tier)
    private = _check_swapped(manager, tier)
    host = tier.host

    check_partition(host.num_blocks, "host blocks", host.free_ids().tolist(), held, private, host.limbo)

    evictable = sum(1 for extent in held.values() if not extent.ids and not extent.host_references)
    assert host.num_evictable == evictable, f"{evictable} host blocks are evictable, not {host.num_evictable}"
    for pool, ends in zip((manager.pool, host), tier.queue.ends(), strict=True):
        reused = set(ends).intersection(pool.free_ids().tolist())
        assert not reused, f"{pool.name} blocks {sorted(reused)} are free, but in transfer"
        for block, count in ends.items():
            assert pool.pins(block) >= count, f"{pool.name} block {block} is in {count} transfers, unpinned"
        assert set(pool.limbo) <= set(ends) | manager.tables.copies.blocks(), (
            "a block nobody waits for is in limbo"
        )
    stats = tier.stats()
    assert stats.held_blocks >= len(private)
    if not tier.swapped and not tier.queue.host_held():
        assert host.num_free + host.num_evictable + len(host.limbo) == host.num_blocks, "host blocks leaked"


def _check_tree(manager: KVCacheManager, tier: HostTier) -> dict[int, Extent]:
    """Check the tree as far as the host is concerned; return the extent of each host block in it."""
    windowed = manager.windowed is not None
    references = Counter(each for s in tier.swapped for each in manager.tables.held_extents(s))
    references.update(each for extent in tier.queue.host_held() for each in manager.index.held_with(extent))
    held: dict[int, Extent] = {}
    evictable = []
    for extent in manager.index.extents():
        assert extent.host_references == references[extent], (
            f"{extent} has {references[extent]} host references"
        )
        if extent.host is None:
            continue
        parent = extent.parent
        assert parent is not None
        assert len(extent.host) == extent.num_blocks, f"{extent} is only partly held by the host"
        is_reached = parent.parent is None or parent.ids or parent.host is not None
        assert is_reached or windowed, f"{extent} is out of reach"
        if extent.ids:
            assert extent.host_references, f"{extent} is held by both tiers, but nobody needs it on the host"
            assert extent.sealed, f"{extent} could outgrow what the host holds"
        elif not extent.host_references:
            assert manager.reuse, f"{extent} is kept without reuse"
            evictable.append(extent)
        for block in extent.host:
            assert block not in held, f"host block {block} is held twice"
            held[block] = extent
    place = {extent: i for i, extent in enumerate(tier.host.order)}
    assert set(place) == set(evictable), "the host's eviction order is not what it can evict"
    for extent in [] if windowed else evictable:
        assert extent.parent is not None
        assert place.get(extent.parent, len(place)) > place[extent], f"{extent} would outlive its parent"
    return held


def _check_swapped(manager: KVCacheManager, tier: HostTier) -> list[int]:
    """Check each swapped-out sequence; return their private host blocks."""
    size = manager.tokens_per_block
    private: list[int] = []
    for sequence in tier.swapped:
        assert sequence not in manager.sequences
        assert not sequence.released
        assert not sequence.table
        assert not sequence.twins or manager.windowed is not None
        assert sequence.batch is None
        assert sequence.host is not None
        private += sequence.host
        table = tier.host_table(sequence)
        blocks = -(-sequence.num_tokens // size) - sequence.left
        assert len(table) == blocks, f"{sequence} has lost blocks on the host"
        assert len(set(table)) == len(table), f"{sequence} holds a host block twice"
        full = min(sequence.num_tokens // size, sequence.anchor.end)
        assert full == sequence.num_tokens // size or not manager.indexes_full, (
            f"{sequence} has lost its place in the index"
        )
        keys = b"".join(bytes(extent.keys) for extent in reversed(list(sequence.anchor.path())))
        assert sequence.history.keys(0, full) == keys[: full * sequence.history.key_width], (
            f"{sequence} is swapped out with other content"
        )
    return private
