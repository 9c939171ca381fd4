"""WindowedHostTier: a host tier behind a windowed cache, in which single blocks move, each for itself.

A block that is evicted is offloaded whatever becomes of its neighbours, since a hit needs a window and not a prefix;
and one on the GPU can follow one on the host. A sequence that is swapped out has on the host what it had in its
table: the window, and the sinks. Where it computed what was cached already, its own block goes and comes back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from allocator.event_log import SWAPPED_IN, SWAPPED_OUT
from allocator.prefix import Extent
from allocator.sequence import KVSequence
from allocator.tiers import HostTier


class WindowedHostTier(HostTier):
    """Host memory behind the pool of a windowed cache; see HostTier."""

    def _forget_below(self, extent: Extent) -> None:
        """Do nothing: what is below stays within reach."""

    def _covering(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        return extents

    # -------------------------------------------------------- swapping sequences

    def blocks_to_swap_out(self, sequence: KVSequence) -> int:
        there = sum(node is not None and node.host is not None for node in sequence.held)
        return len(sequence.table) - there

    def save(self, sequence: KVSequence) -> None:
        table, nodes = sequence.table, self._entries(sequence, len(sequence.table))
        host_ids = self.host.take(self.blocks_to_swap_out(sequence))
        self.swapped_out_blocks += len(host_ids)
        fresh = iter(host_ids)
        private, cached = array("i"), array("i")
        moved, moved_cached = array("i"), array("i")
        for node, block in zip(nodes, table, strict=True):
            if node is None:
                private.append(next(fresh))
                moved.append(block)
                self.queue.out(moved[-1:], private[-1:])
            elif node.host is None:
                node.host = array("i", (next(fresh),))
                cached.extend(node.host)
                moved_cached.append(block)
                self.queue.out(node.ids, node.host)
                self.queue.hold(node)
        for node in sequence.held:
            if node is not None:
                self.host.acquire_path(node)
        sequence.host = private
        self.swapped[sequence] = None
        if self.events is not None:
            blocks = moved_cached + moved + cached + private
            self.events.add_blocks(SWAPPED_OUT, sequence.number, -1, len(cached), blocks)

    def blocks_to_swap_in(self, sequence: KVSequence) -> tuple[int, int]:
        assert sequence.host is not None
        taken, held = len(sequence.host), 0
        for node in sequence.held:
            if node is not None:
                taken += not node.ids
                held += bool(node.ids) and not node.references
        return taken, held

    def restore(self, sequence: KVSequence) -> None:
        private = sequence.host
        assert private is not None
        taken = self.blocks_to_swap_in(sequence)[0]
        held = [node for node in sequence.held if node is not None]
        for each in held:
            if each.ids:
                self.pool.acquire(each)
        blocks = iter(self.pool.take(taken))
        own = iter(private)
        filled, filled_cached, cached = array("i"), array("i"), array("i")
        for node in self._entries(sequence, len(held) + len(private)):
            if node is None:
                block = next(blocks)
                filled.append(block)
                self.queue.back(array("i", (next(own),)), filled[-1:])
            else:
                if not node.ids:
                    cached.extend(node.host or ())
                    self._revive(node, array("i", (next(blocks),)))
                    self.queue.hold(node)
                    filled_cached.extend(node.ids)
                block = node.ids[0]
            sequence.table.append(block)
        if self.events is not None:
            moved = cached + private + filled_cached + filled
            self.events.add_blocks(SWAPPED_IN, sequence.number, -1, len(cached), moved)
        self.forget(sequence)
        self.swapped_in_blocks += taken

    def forget(self, sequence: KVSequence) -> None:
        assert sequence.host is not None
        self.host.give(sequence.host[::-1])
        sinks = sequence.sink_blocks
        for node in (*sequence.held[sinks:], *sequence.held[:sinks]):  # as a release does it on the GPU
            if node is not None:
                self.host.drop_path(node)
        sequence.host = None
        del self.swapped[sequence]

    def host_table(self, sequence: KVSequence) -> array[int]:
        assert sequence.host is not None
        own = iter(sequence.host)
        held = sum(node is not None for node in sequence.held)
        table = array("i")
        for node in self._entries(sequence, held + len(sequence.host)):
            if node is None:
                table.append(next(own))
            else:
                assert node.host is not None
                table.append(node.host[0])
        return table

    @staticmethod
    def _entries(sequence: KVSequence, num_blocks: int) -> Iterable[Extent | None]:
        """Return the node behind each block of a sequence's table, None where the block is its own."""
        return [*sequence.held, *[None] * (num_blocks - len(sequence.held))]
