"""WindowedTables: tables whose front blocks leave as an attention window moves on.

What is different from `Tables` follows from one thing: a sequence references the blocks in its table, not the whole
prefix that they lie behind. Where it computes what is cached already, it so keeps its own block only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from allocator.batch import Batch, Bucket
from allocator.event_log import DETACHED, PASSED, PLACED, REPEATED
from allocator.pool import BlockPool
from allocator.prefix import Extent
from allocator.retention import RetentionPlan, kept
from allocator.sequence import KVSequence
from allocator.tables import Tables
from allocator.windowed_index import WindowedIndex
from allocator.windows import AttentionWindow

NEVER = 2**62
"""A number of ticks that no batch takes."""


class WindowedTables(Tables):
    """Operations on the tables of sequences in a windowed cache."""

    holds_prefixes = False
    index: WindowedIndex

    def __init__(
        self, pool: BlockPool, index: WindowedIndex, tokens_per_block: int, window: AttentionWindow
    ) -> None:
        super().__init__(pool, index, tokens_per_block)
        self.window = window

    def begin(self, sequence: KVSequence, root: Extent, nodes: Iterable[Extent], hit_tokens: int) -> None:
        """Let a new sequence hold the blocks it has hit, and the place in the tree that it goes on from."""
        sequence.root = root
        sequence.sink_blocks = self.window.sink_blocks
        sequence.left = self.window.left(hit_tokens)
        sequence.held = list(nodes)
        self.index.anchor(sequence.anchor)

    # -------------------------------------------------------- front blocks leave

    def leaving(self, sequence: KVSequence) -> int:
        """Return how many blocks of a sequence the next query does not need."""
        return self.window.left(sequence.num_tokens) - sequence.left

    def turn(self, batch: Batch) -> Bucket:
        """Return the members that come to need a block less with the next tick."""
        return batch.starting_in(-self.window.reach)

    def leavers(self, sequences: Sequence[KVSequence]) -> Sequence[KVSequence]:
        """Return which of the sequences, all of them or a batch, may have blocks that the next query does not need."""
        if not isinstance(sequences, Batch):
            return sequences
        turn = self.turn(sequences)
        return [*turn, *(sequence for sequence in sequences.unready if sequence not in turn)]

    def ticks_until_leave(self, batch: Batch) -> int:
        """Return at which of a batch's next ticks, from 0 on, a block leaves; NEVER without members."""
        size, window = self.tokens_per_block, self.window
        first = (window.sink_blocks + 1) * size + window.reach
        return max(
            min((first + member.left * size - member.num_tokens for member in batch), default=NEVER), 0
        )

    def leave(self, sequence: KVSequence) -> int:
        """Let go of the blocks that the next query does not need, front first; return how many."""
        first, left = self.window.sink_blocks, sequence.left
        count = self.leaving(sequence)
        if count <= 0:
            return 0
        table, held, pool = sequence.table, sequence.held, self.pool
        if self.events is not None:
            self.events.add(PASSED, sequence.number, first, count)
        for at in range(first, first + count):
            node = held[at]
            if node is not None:
                pool.drop(node)
            else:
                sequence.twins.discard(at + left)
                if not pool.unshare(table[at]):
                    pool.give((table[at],))
        del table[first : first + count], held[first : first + count]
        sequence.left = left + count
        return count

    def gain(self, sequences: Iterable[KVSequence]) -> int:
        """Return how many blocks become available when `leave` is called for each of the sequences."""
        gained = Gain(self)
        return sum(gained.leave(sequence, sequence.num_tokens) for sequence in sequences)

    # -------------------------------------------------------- caching what is full

    def index_filled(self, batch: Batch, filled: Bucket) -> None:
        for sequence, key in zip(filled, batch.keys_of_filled(filled), strict=True):
            self._index(sequence, key)

    def index_full(
        self, sequence: KVSequence, full: int, dates: array[int] | None = None, *, alike: bool = False
    ) -> None:
        self._index(sequence, sequence.settled_history.keys(sequence.anchor.end, full))

    def _index(self, sequence: KVSequence, keys: bytes) -> None:
        """Put the first blocks of a sequence that the index does not have, whose keys these are, into it."""
        index, pool = self.index, self.pool
        before = node = sequence.anchor
        width, first = before.width, before.end
        plan = sequence.retention
        full = first + len(keys) // width
        for position in range(first, full):
            key = keys[(position - first) * width : (position - first + 1) * width]
            child = node.children.get(key) if node.children else None
            if child is not None and child.ids:
                sequence.add_twins((position,))
                sequence.held.append(None)
                if self.events is not None:
                    self.events.add_block(REPEATED, sequence.number, -1, position, child.ids[0])
                wish = None if plan is None else plan.at(position)[0]
                if wish is not None:
                    # Nothing holds the cached block for this sequence, so it is held for a moment.
                    pool.acquire(child)
                    child.retention = kept(wish)
                    pool.drop(child)
            else:
                block = array("i", (sequence.table[sequence.index_of(position)],))
                if child is None:
                    child = index.attach(node, key, block)
                else:
                    index.revive(child, block)
                child.references = 1
                if plan is not None:
                    child.retention = kept(plan.at(position)[0])
                pool.cached(child, 1)
                sequence.held.append(child)
                if pool.partial is not None and node.parent is not None:
                    pool.partial.changed(node)  # it may be held by nobody, and now something builds on it
                if child.host is not None and pool.tier is not None:
                    pool.tier.recomputed(child)
                if self.events is not None:
                    place = index.number(node), index.number(child)
                    self.events.add_block(PLACED, sequence.number, *place, block[0])
            node = child
        sequence.anchor = node
        index.anchor(node)
        index.release(before)

    def move_anchor(self, sequence: KVSequence, end: int) -> None:
        before = node = sequence.anchor
        if self.events is not None and node.end > end:
            self.events.add(DETACHED, sequence.number, value=end)
        while node.end > end:
            held = sequence.held.pop()
            if held is not None:
                self.pool.drop(held)
            assert node.parent is not None
            node = node.parent
        sequence.anchor = node
        self.index.anchor(node)
        self.index.release(before)

    # -------------------------------------------------------- copy-on-write

    def tail_is_cached(self, sequence: KVSequence) -> bool:
        last = sequence.left + len(sequence.table) - 1
        return sequence.anchor.end > last and last not in sequence.twins

    def _can_take_back(self, sequence: KVSequence) -> bool:
        node = sequence.anchor
        if node.host_references or node.live_children:
            return False
        return node.references == 1 and self.index.anchors[node] == 1

    def _take_back(self, sequence: KVSequence) -> None:
        node = sequence.anchor
        assert node.parent is not None
        sequence.held.pop()
        sequence.anchor = node.parent
        self.index.anchor(node.parent)
        self.index.release(node)
        self.pool.uncache(node)

    # -------------------------------------------------------- sharing and giving back

    def held_extents(self, sequence: KVSequence) -> Iterable[Extent]:
        return [node for node in sequence.held if node is not None]

    def share(self, sequence: KVSequence, holders: int) -> None:
        for node in self.held_extents(sequence):
            self.pool.acquire(node, holders)
        assert sequence.root is not None
        sequence.root.references += holders
        self.index.anchor(sequence.anchor, holders)
        for position in self.private_positions(sequence):
            self.pool.share(sequence.table[sequence.index_of(position)], holders)

    def release(self, sequence: KVSequence) -> None:
        """Give back all that a sequence holds, the front of its window first and the sinks last."""
        self.free_private(sequence, 0)
        self._drop_held(sequence)
        self.uproot(sequence, self.root_of(sequence))

    def _drop_held(self, sequence: KVSequence) -> None:
        sinks = self.window.sink_blocks
        for node in (*sequence.held[sinks:], *sequence.held[:sinks]):
            if node is not None:
                self.pool.drop(node)

    def root_of(self, sequence: KVSequence) -> Extent:
        assert sequence.root is not None
        return sequence.root

    def uproot(self, sequence: KVSequence, root: Extent) -> None:
        self.index.release(sequence.anchor)
        super().uproot(sequence, root)

    def retain_held(self, sequence: KVSequence, plan: RetentionPlan) -> None:
        full = sequence.num_tokens // self.tokens_per_block
        for node in self.held_extents(sequence):
            wish = plan.at(node.start)[0]
            if wish is not None and node.start < full:
                node.retention = kept(wish)

    def swapped_alone(self, sequence: KVSequence) -> Sequence[int]:
        return [sequence.table[sequence.index_of(each)] for each in self.private_positions(sequence)]

    def vacate(self, sequence: KVSequence) -> None:
        """Give back all that a sequence has on the GPU; it still knows which positions are those of twins."""
        twins = set(sequence.twins)
        self.free_private(sequence, 0)
        sequence.twins = twins
        self._drop_held(sequence)


class Gain:
    """Count what becomes available when sequences let go of their front blocks, without letting go of them."""

    def __init__(self, tables: WindowedTables) -> None:
        self._tables = tables
        self._left: dict[KVSequence, int] = {}
        self._nodes: dict[Extent, int] = {}
        self._blocks: dict[int, int] = {}

    def leave(self, sequence: KVSequence, position: int) -> int:
        """Return how many more become available once `sequence` has let go of what `position` does not need."""
        window, pool = self._tables.window, self._tables.pool
        before = self._left.get(sequence, sequence.left)
        after = window.left(position)
        if after <= before:
            return 0
        self._left[sequence] = after
        gained = 0
        for logical in range(window.sink_blocks + before, window.sink_blocks + after):
            at = logical - sequence.left
            if at >= len(sequence.held):  # still to be filled, by then this sequence's alone
                gained += at >= len(sequence.table) or not pool.pins(sequence.table[at])
                continue
            node = sequence.held[at]
            if node is not None:
                dropped = self._nodes[node] = self._nodes.get(node, 0) + 1
                # Cached, it can be evicted; else it is freed, which is of no use while a transfer reads it.
                gained += dropped == node.references and (pool.keep_cached or not pool.pins(node.ids[0]))
            else:
                block = sequence.table[at]
                dropped = self._blocks[block] = self._blocks.get(block, 0) + 1
                gained += dropped == pool.shared.get(block, 1) and not pool.pins(block)
        return gained

    def steps_within(self, batch: Batch, steps: int, blocks: int) -> int:
        """Return how many of the next `steps` ticks of a batch find their blocks, `blocks` being available now."""
        tables, reach = self._tables, self._tables.window.reach
        for ahead in range(steps):
            leaving = batch.starting_in(ahead - reach) if ahead else tables.leavers(batch)
            for sequence in leaving:
                blocks += self.leave(sequence, sequence.num_tokens + ahead)
            blocks -= len(batch.starting_in(ahead))
            if not ahead:
                blocks -= tables.copies_needed(batch.unready)
            if blocks < 0:
                return ahead
        return steps
