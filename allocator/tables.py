"""Tables: what happens to a sequence's block table and to its hold on the prefix index.

The manager decides what is done, checks that there is room, and counts; here blocks change hands.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import ClassVar

from allocator.batch import Batch, Bucket
from allocator.copies import PendingCopies
from allocator.event_log import (
    BRANCHED,
    COPIED,
    DETACHED,
    NOBODY,
    RECOMPUTED,
    REPEATED,
    ROOT,
    STOLEN,
    STORED,
    UNSTORED,
    EventLog,
)
from allocator.partial import is_free_leaf
from allocator.pool import BlockPool
from allocator.prefix import Extent, PrefixIndex
from allocator.retaining import index_retained, retain_hits
from allocator.retention import RetentionPlan
from allocator.sequence import KVSequence


class Tables:
    """Operations on the tables of sequences, and counts of copies and steals.

    `holds_prefixes` says that a sequence references the whole prefix that it is anchored at, its twins' cached
    blocks included, and a pending copy that of its source. `cow_copies` and `cow_tokens` count copy-on-write, the
    others what partial reuse does.
    """

    holds_prefixes: ClassVar[bool] = True

    def __init__(self, pool: BlockPool, index: PrefixIndex, tokens_per_block: int) -> None:
        self.pool = pool
        self.index = index
        self.copies = PendingCopies(pool)
        self.tokens_per_block = tokens_per_block
        self.cow_copies = 0
        self.cow_tokens = 0
        self.twinned: dict[KVSequence, None] = {}  # those with twins
        self.partial_copies = 0
        self.partial_copied_tokens = 0
        self.stolen_blocks = 0
        self.events: EventLog | None = None

    # -------------------------------------------------------- caching what is full

    def index_filled(self, batch: Batch, filled: Bucket) -> None:
        """Put the block that each of these members of a batch has just filled into the index.

        Decoding mostly prolongs an extent that is the sequence's own: what is not noted in other places as well then
        waits until somebody looks.
        """
        self.index.version += 1
        eager = filled.eager
        if not eager:
            return
        # In the order of the batch, whoever caught up when: of those who fill the same, the first one's block is kept.
        turn = (
            eager.copy() if len(eager) == 1 else {each: row for each, row in filled.items() if each in eager}
        )
        events, waits = self.events, self.events is None and not self.pool.notes_growth
        # Where blocks may wait, keys are asked for one by one: only of who has wishes of how its blocks are kept.
        keys = {} if waits else dict(zip(turn, batch.keys_of_filled(turn), strict=True))
        for sequence, row in turn.items():
            anchor, table = sequence.anchor, sequence.table
            if anchor.references > 1 or anchor.sealed or anchor.children:
                batch.settle_ids(sequence)
                self.index_full(sequence, len(table))
                anchor = sequence.anchor
                if anchor.references > 1 or anchor.sealed or anchor.children:
                    continue
            elif not waits or sequence.retention is not None:
                if events is not None:
                    events.add_block(STORED, sequence.number, anchor.ids[-1], len(table) - 1, table[-1])
                anchor.keys += keys[sequence] if keys else batch.keys_of_filled({sequence: row})[0]
                anchor.ids.append(table[-1])
                self.pool.cached(anchor, 1)
            if waits and sequence.retention is None:
                anchor.grower = sequence
                del eager[sequence]

    def prolong(self, sequence: KVSequence, keys: bytes, full: int) -> None:
        """Let an extent that this sequence grows have all blocks up to `full`; `keys` are those of what it lacks."""
        extent = sequence.anchor
        extent.grower = None
        extent.ids.extend(sequence.table[extent.start + len(extent.ids) : full])
        extent.keys += keys
        self.index.version += 1

    def index_full(
        self, sequence: KVSequence, full: int, dates: array[int] | None = None, *, alike: bool = False
    ) -> None:
        """Put a sequence's blocks up to `full` into the index; where content repeats, its own become twins.

        dates  when they were filled, int64 [blocks], if that was before now; then they repeat nothing
        alike  whether they are known to be retained alike
        """
        if sequence.retention is not None and not alike:
            index_retained(self, sequence, sequence.retention, full, dates)
            return
        anchor = sequence.anchor
        first = anchor.start + len(anchor.ids)
        keys, ids = sequence.settled_history.keys(first, full), sequence.table[first:full]
        events, children = self.events, anchor.children
        if anchor.references == 1 and not anchor.sealed and not children:
            if events is not None:
                events.add_blocks(STORED, sequence.number, anchor.ids[-1], first, ids)
            anchor.keys += keys
            anchor.ids.extend(ids)
            self.index.version += 1
            self.pool.cached(anchor, full - first, dates)
            return
        if not children or keys[: anchor.width] not in children:  # often, all of it is new
            extent = sequence.anchor = self.index.attach(anchor, keys, ids)
            extent.references = 1
            self.pool.cached(extent, full - first, dates)
            if events is not None:
                self._log_indexed(events, sequence, extent, True)
            return
        for extent, is_new in self.index.insert(anchor, keys, ids, self.pool.split):
            if events is not None:
                self._log_indexed(events, sequence, extent, is_new)
            if is_new:
                extent.references = 1
                self.pool.cached(extent, len(extent.ids))
                if extent.host is not None and self.pool.tier is not None:
                    self.pool.tier.recomputed(extent)
            else:
                self.pool.acquire(extent)
                if extent.retention is not None:
                    extent.sealed = True
                sequence.add_twins(range(extent.start, extent.end))
                self.twinned[sequence] = None
            sequence.anchor = extent

    @staticmethod
    def _log_indexed(events: EventLog, sequence: KVSequence, extent: Extent, is_new: bool) -> None:
        if not is_new:
            events.add_blocks(REPEATED, sequence.number, -1, extent.start, extent.ids)
            return
        above = extent.parent.ids if extent.parent is not None else None
        parent = above[-1] if above else ROOT
        if extent.host is None:
            events.add_blocks(STORED, sequence.number, parent, extent.start, extent.ids)
        else:
            events.add_blocks(RECOMPUTED, sequence.number, parent, extent.start, extent.ids + extent.host)

    def move_anchor(self, sequence: KVSequence, end: int) -> None:
        """Let a sequence hold only the first `end` blocks of its path."""
        extent = sequence.anchor
        if self.events is not None and extent.end > end:
            self.events.add(DETACHED, sequence.number, value=end)
        while extent.end > end:
            parent = extent.parent
            assert parent is not None
            if extent.start < end:
                parent = self.pool.split(extent, end - extent.start)
            self.pool.drop(extent)
            extent = parent
        sequence.anchor = extent

    # -------------------------------------------------------- copy-on-write

    def shared_tail(self, sequence: KVSequence) -> int | None:
        """Return the block that the next token goes into, if partly written and not this sequence's own."""
        if sequence.num_tokens % self.tokens_per_block == 0:
            return None
        block = sequence.table[-1]
        if block in self.pool.shared or self.tail_is_cached(sequence):
            return block
        return None

    def tail_is_cached(self, sequence: KVSequence) -> bool:
        """Return whether the last block of its table is one that the index knows."""
        last = len(sequence.table) - 1
        return sequence.anchor.end > last and last not in sequence.twins

    def borrowers(self, writers: Iterable[KVSequence]) -> list[KVSequence]:
        """Return which of the writers have to leave their last block, or to take it out of the index, to write."""
        shared = self.pool.shared
        return [
            sequence
            for sequence in writers
            # As a rule, the last block is beyond the anchor, and so private; that saves the closer look.
            if (sequence.anchor.end == sequence.left + len(sequence.table) or shared)
            and self.shared_tail(sequence) is not None
        ]

    def copies_needed(self, writers: Iterable[KVSequence]) -> int:
        """Return how many of the writers have to leave their last block before they write to it.

        Of the holders of an uncached block, the last to write keeps it.
        """
        copies = 0
        holders: dict[int, int] = {}
        for sequence in writers:
            tail = self.shared_tail(sequence)
            if tail is None:
                continue
            if self.tail_is_cached(sequence):
                copies += not self._can_take_back(sequence)
            else:
                left = holders[tail] = holders.get(tail, self.pool.shared[tail]) - 1
                copies += left > 0
        return copies

    def _can_take_back(self, sequence: KVSequence) -> bool:
        """Return whether a cached last block is this sequence's alone, so that it can leave the index."""
        anchor = sequence.anchor
        if anchor.references != 1 or anchor.live_children or anchor.host_references:
            return False
        # What is left below are ghosts, or what only the host holds.
        return self.pool.tier is None or all(child.host is None for child in (anchor.children or {}).values())

    def own_tail(self, sequence: KVSequence) -> None:
        """Make the block that the next token goes into private: leave it, or take it out of the index."""
        tail = self.shared_tail(sequence)
        if tail is None:
            return
        extent = sequence.anchor
        if not self.tail_is_cached(sequence):
            self._copy_tail(sequence, tail, None)
            self.pool.unshare(tail)
        elif self._can_take_back(sequence):
            if self.events is not None:
                self.events.add_block(UNSTORED, sequence.number, -1, -1, tail)
            self._take_back(sequence)
        else:
            self._copy_tail(sequence, tail, extent)
            self.move_anchor(sequence, sequence.left + len(sequence.table) - 1)

    def _take_back(self, sequence: KVSequence) -> None:
        """Take a cached last block, which is this sequence's alone, out of the index."""
        extent = sequence.anchor
        parent = extent.parent
        assert parent is not None
        self.pool.uncache(extent)
        if not extent.ids:
            sequence.anchor = parent

    def _copy_tail(self, sequence: KVSequence, source: int, extent: Extent | None) -> None:
        """Give a sequence a fresh last block that starts as a copy of `source`."""
        valid = sequence.num_tokens % self.tokens_per_block
        destination = self._copy(source, valid, extent)
        if self.events is not None:
            self.events.add_blocks(COPIED, sequence.number, -1, valid, array("i", (source, destination)))
        sequence.table[-1] = destination
        sequence.cow_copies += 1
        self.cow_copies += 1
        self.cow_tokens += valid

    def _copy(self, source: int, valid: int, extent: Extent | None) -> int:
        """Note a copy of `valid` tokens from a block, cached by `extent` or not, and return where it goes."""
        if extent is not None:
            self.pool.acquire_path(extent)  # before a block is taken, lest that be the source
        (destination,) = self.pool.take(1)
        self.copies.add(source, destination, valid, extent)
        return destination

    def reuse_part(self, extent: Extent, num_tokens: int, number: int = NOBODY) -> int:
        """Return a private block with the first `num_tokens` tokens of an extent's first block.

        That is the block itself, taken out of the index, if it is an unreferenced leaf; else a copy. `number` is
        that of the sequence in the event log.
        """
        if len(extent.ids) == 1 and is_free_leaf(extent, has_host=self.pool.tier is not None):
            self.stolen_blocks += 1
            block = self.pool.steal(extent)
            if self.events is not None:
                self.events.add_block(STOLEN, number, -1, num_tokens, block)
            return block
        if len(extent.ids) > 1:  # hold no more than the source
            extent = self.pool.split(extent, 1)
        source = extent.ids[0]
        self.partial_copies += 1
        self.partial_copied_tokens += num_tokens
        destination = self._copy(source, num_tokens, extent)
        if self.events is not None:
            self.events.add_blocks(BRANCHED, number, -1, num_tokens, array("i", (source, destination)))
        return destination

    # -------------------------------------------------------- sharing and giving back

    def share(self, sequence: KVSequence, holders: int) -> None:
        """Let `holders` more sequences hold all that `sequence` holds."""
        self.pool.acquire_path(sequence.anchor, holders)
        self.root_of(sequence).references += holders
        for position in self.private_positions(sequence):
            self.pool.share(sequence.table[position], holders)

    def held_extents(self, sequence: KVSequence) -> Iterable[Extent]:
        """Return the extents on which a sequence has a reference."""
        return sequence.anchor.path()

    def private_positions(self, sequence: KVSequence, first: int = 0) -> list[int]:
        """Return at which positions from `first` on its blocks are uncached, in order."""
        twins = sorted(position for position in sequence.twins if position >= first)
        return twins + list(range(max(sequence.anchor.end, first), sequence.left + len(sequence.table)))

    def free_private(self, sequence: KVSequence, first: int) -> None:
        """Give back the uncached blocks from position `first` on, the last first."""
        table, pool = sequence.table, self.pool
        if not (sequence.twins or pool.shared):  # the common case
            private = table[max(sequence.anchor.end, first) - sequence.left :]
            if private:
                private.reverse()
                pool.give(private)
            return
        positions = self.private_positions(sequence, first)
        positions.reverse()
        blocks = [table[sequence.index_of(position)] for position in positions]
        pool.give(array("i", [block for block in blocks if not pool.unshare(block)]))
        sequence.twins.difference_update(positions)
        self.note_twins(sequence)

    def note_twins(self, sequence: KVSequence) -> None:
        """Keep `twinned` up to date with a sequence's twins."""
        if sequence.twins and self.holds_prefixes:
            self.twinned[sequence] = None
        else:
            self.twinned.pop(sequence, None)

    def release(self, sequence: KVSequence) -> None:
        """Give back all that a sequence holds, the last block first."""
        pool, anchor = self.pool, sequence.anchor
        if sequence.twins or pool.shared:
            self.free_private(sequence, 0)
        else:
            private = sequence.table[anchor.start + len(anchor.ids) :]
            if private:
                private.reverse()
                pool.give(private)
        root = pool.drop_path(anchor)
        root.references -= 1
        if not root.children:
            self.index.discard_if_unused(root)

    def root_of(self, sequence: KVSequence) -> Extent:
        """Return the root above a sequence's anchor."""
        extent = sequence.anchor
        while extent.parent is not None:
            extent = extent.parent
        return extent

    def uproot(self, sequence: KVSequence, root: Extent) -> None:
        """Let a sequence that holds nothing any more, of which this is the root, have no place in the tree."""
        root.references -= 1
        self.index.discard_if_unused(root)

    def retain_held(self, sequence: KVSequence, plan: RetentionPlan) -> None:
        """Let the cached blocks that a sequence holds, and fills, have its wishes, where it has any."""
        retain_hits(self.pool, sequence.anchor, plan, sequence.num_tokens // self.tokens_per_block)

    def swapped_alone(self, sequence: KVSequence) -> Sequence[int]:
        """Return the blocks that swapping a sequence out moves for itself alone, as the index does not have them."""
        return sequence.table[sequence.anchor.end :]

    def vacate(self, sequence: KVSequence) -> None:
        """Give back all that a sequence has on the GPU, as the host has it; it keeps its place in the tree."""
        self.free_private(sequence, 0)
        self.pool.drop_path(sequence.anchor)
