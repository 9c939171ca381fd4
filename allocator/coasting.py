"""Coasting: decode steps that a simulator knows to be alike, many as one, with the index told afterwards."""

from __future__ import annotations

from array import array
from itertools import chain, islice

from allocator.batch import Batch
from allocator.decoding import Decoding
from allocator.prefix import Extent
from allocator.sequence import KVSequence


class Coasting(Decoding):
    """The part of the manager that takes steps in which nobody generates what anybody could look for.

    A block that fills while coasting goes into the index only when its sequence leaves the batch, is forked, or
    advances in another way: *catches up*. Till then it counts as what it is, a referenced block, and nobody misses
    it, since its content is the sequence's own. Where lifetimes are collected, the sequence keeps the dates at which
    its blocks were filled.
    """

    def batch(self) -> Batch:
        """Return an empty batch: sequences that decode together, see allocator.batch.Batch for `add` and `remove`.

        Appending to it costs per block started, not per sequence.
        """
        batch = super().batch()
        batch.catch_up = self.catch_up
        return batch

    def writes_in_place(self, batch: Batch) -> bool:
        """Return whether the next token of each member goes into a block of its own, so that nothing is copied.

        O(members that joined, were forked or reordered since it was last so).
        """
        if batch.unready:
            shared_tail = self.tables.shared_tail
            for sequence in batch.unready:
                if shared_tail(sequence) is not None:
                    return False
            if self.windowed is None:  # else they may still have front blocks to let go of
                batch.unready.clear()
        return True

    def coast(self, batch: Batch, num_tokens: int) -> int:
        """Do what `advance` does to a batch; return how many blocks the steps after the first of `num_tokens` take.

        For callers that know, and are not checked: the batch `writes_in_place`, and there is room. What it generates
        is nobody else's, no content names it, so that no block that fills repeats a cached one, and nobody looks for
        it before the sequence is released.
        """
        pool = self.pool
        if self.steps_matter or batch.unready or batch.ring.named:
            later = batch.growth(num_tokens) - batch.growth(1)
            self.advance(batch, num_tokens)
            return later
        batch.forget_slots()
        starts, growth, first = batch.starts(num_tokens)
        if growth:
            members = chain.from_iterable(starts)
            stock = pool.take(growth)
            if pool.lifetimes is None:
                for sequence, block in zip(members, stock, strict=True):
                    sequence.table.append(block)
            else:
                before, now = (
                    batch.coasted_at,
                    pool.now,
                )  # of the coast before were the ticks before the first
                for sequence, block in zip(islice(members, first), stock, strict=False):
                    sequence.table.append(block)
                    sequence.dates.append(before)
                for sequence, block in zip(members, stock[first:], strict=True):
                    sequence.table.append(block)
                    sequence.dates.append(now)
            self._logical_blocks += growth
        batch.tick += num_tokens
        batch.coasted = True
        batch.coasted_at = pool.now
        self._logical_tokens += num_tokens * len(batch)
        return growth - first

    def catch_up(self, sequence: KVSequence) -> None:
        """Put the blocks that filled while a member of a batch coasted into the index. O(blocks filled).

        The manager does so whenever it matters.
        """
        batch, anchor = sequence.batch, sequence.anchor
        assert batch is not None
        tokens = sequence.base_tokens + batch.tick
        full, first = tokens // self.tokens_per_block, anchor.end
        dates, sequence.dates = sequence.dates, []
        if full <= first or not self.indexes_full:
            return
        tables = self.tables
        if self.pool.lifetimes is None:
            tables.index_full(sequence, full)
            return
        if tokens % self.tokens_per_block == 0:
            dates.append(batch.coasted_at)  # nobody has started the block after it
        del dates[: first - full]  # starting its first block said when one was filled that is in the index
        if sequence.retention is None:
            tables.index_full(sequence, full)
            _date(sequence.anchor, dates)
        else:  # blocks of one extent are retained alike
            for block in range(first, full):
                tables.index_full(sequence, block + 1)
                _date(sequence.anchor, dates[block - first : block - first + 1])


def _date(extent: Extent, dates: list[int]) -> None:
    """Say when the last blocks of an extent were filled."""
    assert extent.born is not None
    extent.born[-len(dates) :] = array("q", dates)
