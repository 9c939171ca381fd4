"""The invariants of a windowed cache, where tree and tables fit together in another way; see `invariants`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from allocator.prefix import Extent
from allocator.stats import CacheStats
from allocator.windowed_index import WindowedIndex

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager


def check_windowed_tree(manager: KVCacheManager, index: WindowedIndex) -> dict[int, Extent]:
    """Check the tree of single blocks and its references; return the node of each cached block.

    - a node is referenced by exactly the sequences (and pending copies, and transfers) that hold its block;
    - one without a block is a ghost, or is needed by nodes below it or by sequences anchored at it;
    - ghosts are counted and in bounds.
    """
    references: Counter[Extent] = Counter()
    anchors: Counter[Extent] = Counter()
    roots: Counter[Extent] = Counter()
    tier = manager.pool.tier
    for sequence in manager.sequences:
        references.update(node for node in sequence.held if node is not None)
    for sequence in (*manager.sequences, *(() if tier is None else tier.swapped)):
        anchors[sequence.anchor] += 1
        assert sequence.root is not None
        roots[sequence.root] += 1
    references.update(manager.tables.copies.held_extents())
    references.update(() if tier is None else tier.queue.gpu_held())
    assert index.anchors == dict(anchors), "nodes are kept for other sequences than are anchored there"

    cached: dict[int, Extent] = {}
    ghosts = 0
    for node in index.extents():
        parent = node.parent
        assert parent is not None
        assert parent.children is not None
        assert parent.children.get(node.first_key) is node, f"{node} is not where it is looked up"
        assert node.num_blocks == 1
        assert (node.start, node.width) == (parent.end, parent.width), f"{node} does not continue {parent}"
        live = sum(1 for child in (node.children or {}).values() if child.ids)
        assert node.live_children == live, f"{node} has {live} live children"
        assert node.references == references.pop(node, 0), f"{node} has not {node.references} references"
        if node.ids:
            assert manager.reuse or node.references, f"{node} is kept without reuse"
            assert node.ids[0] not in cached, f"block {node.ids[0]} is cached twice"
            cached[node.ids[0]] = node
        else:
            assert not node.references
            ghosts += node.host is None and index.is_known(node)
            assert index.is_known(node) or node.children or node in anchors, f"nothing needs {node}"
    assert not references, f"{list(references)} are held, but not in the tree"
    for salts in index.roots.values():
        for root in salts.values():
            assert root.references == roots[root], f"a root has {roots[root]} sequences"
            assert root.references or root.children, "nothing needs a root"
    assert index.ghost_blocks == ghosts, f"{ghosts} ghosts, not {index.ghost_blocks}"
    assert ghosts <= index.ghost_capacity
    return cached


def check_windowed_sequences(manager: KVCacheManager, stats: CacheStats) -> Counter[int]:
    """Check each table against tree and content; return how many tables hold each private block.

    - a table has the sinks' blocks, and those after what has left, which no later query needs;
    - it names the block of each node held, and private ones elsewhere;
    - the keys on the way to the anchor say what the sequence says.
    """
    assert manager.windowed is not None
    size, window = manager.tokens_per_block, manager.windowed.window
    private: Counter[int] = Counter()
    blocks = tokens = 0
    for sequence in manager.sequences:
        table, held, left, anchored = sequence.table, sequence.held, sequence.left, sequence.anchored
        blocks += len(table)
        tokens += sequence.num_tokens - left * size
        assert not sequence.released
        assert sequence.sink_blocks == window.sink_blocks
        assert left + len(table) == -(-sequence.num_tokens // size), f"{sequence} has the wrong blocks"
        assert 0 <= left <= window.left(sequence.num_tokens), f"{sequence} lacks blocks that it needs"
        full = sequence.num_tokens // size
        assert full <= anchored <= left + len(table), f"{sequence} has full blocks that are not indexed"
        assert len(set(table)) == len(table), f"{sequence} holds a block twice"
        assert len(held) == anchored - left
        path = [*sequence.anchor.path()][::-1]
        keys = b"".join(bytes(node.keys) for node in path)
        assert sequence.history.keys(0, full) == keys[: full * sequence.history.key_width], (
            f"{sequence} is anchored at other content"
        )
        sinks = window.sink_blocks
        positions = [*range(sinks), *range(sinks + left, left + len(table))] if left else [*range(len(table))]
        for at, (position, block) in enumerate(zip(positions, table, strict=True)):
            assert sequence.index_of(position) == at
            if position >= anchored or position in sequence.twins:
                private[block] += 1
                assert position >= anchored or held[at] is None
            else:
                assert held[at] is path[position], f"{sequence} holds another block than its content's"
                assert path[position].ids.tolist() == [block]
        assert all(position in positions and position < anchored for position in sequence.twins)
        batch = sequence.batch
        if batch is not None and sequence not in batch.unready:
            assert manager.tables.shared_tail(sequence) is None, f"{sequence} would write to a shared block"
    assert (stats.logical_blocks, stats.logical_tokens) == (blocks, tokens), "logical counts are off"
    return private
