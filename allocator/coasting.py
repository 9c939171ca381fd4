"""Coasting: decode steps that a simulator knows to be alike, many as one, with the index told afterwards."""

from __future__ import annotations

from array import array
from bisect import bisect_left

from allocator.batch import Batch
from allocator.decoding import Decoding
from allocator.prefix import Extent
from allocator.sequence import KVSequence

_LONGEST_PAST = 4096
"""Coasts that a batch remembers before everybody is caught up."""


class Coasting(Decoding):
    """The part of the manager that takes steps in which nobody generates what anybody could look for.

    A block that fills while coasting goes into the index only when its sequence leaves the batch, is forked, or
    advances in another way: *catches up*. Till then it counts as what it is, a referenced block, and nobody misses
    it, since its content is the sequence's own. The batch remembers when its ticks passed, for the dates at which
    the blocks were filled.
    """

    def batch(self) -> Batch:
        """Return an empty batch, with which `append` costs per block started, not per sequence."""
        batch = super().batch()
        batch.catch_up = self.catch_up
        return batch

    def writes_in_place(self, batch: Batch) -> bool:
        """Return whether the next token of each member goes into a block of its own, so that nothing is copied."""
        if batch.unready:
            shared_tail = self.tables.shared_tail
            for sequence in batch.unready:
                if shared_tail(sequence) is not None:
                    return False
            if self.windowed is None:  # else they may still have front blocks to let go of
                batch.unready.clear()
        return True

    def coast(self, batch: Batch, num_tokens: int) -> int:
        """Do what `advance` does; return how many blocks the steps after the first of `num_tokens` take.

        The batch `writes_in_place`, and there is room. What it generates is nobody else's, no content names it, so
        that no block that fills repeats a cached one, and nobody looks for it before the sequence is released.
        """
        pool = self.pool
        if (
            pool.notes_cached
            or pool.partial is not None
            or batch.unready
            or batch.ring.named
            or self.quotas is not None
            or self.events is not None
            or self.windowed is not None
        ):
            later = batch.growth(num_tokens) - batch.growth(1)
            self.advance(batch, num_tokens)
            return later
        batch.forget_slots()
        starts, growth, first = batch.starts(num_tokens)
        if growth:
            stock = pool.take(growth)
            taken = 0
            for bucket in starts:
                for sequence in bucket:
                    sequence.table.append(stock[taken])
                    taken += 1
            self._logical_blocks += growth
        batch.tick += num_tokens
        batch.past_ticks.append(batch.tick)
        batch.past_times.append(pool.now)
        self._logical_tokens += num_tokens * len(batch)
        if len(batch.past_ticks) > _LONGEST_PAST:
            batch.catch_up_all()
        return growth - first

    def catch_up(self, sequence: KVSequence) -> None:
        """Put the blocks that filled while a member of a batch coasted into the index."""
        batch = sequence.batch
        assert batch is not None
        size, tokens = self.tokens_per_block, sequence.num_tokens
        full, first = tokens // size, sequence.anchor.end
        if full <= first or not self.indexes_full:
            return
        if self.pool.lifetimes is None:
            self.tables.index_full(sequence, full)
            return
        filled = (
            batch.tick - tokens + (first + 1) * size
        )  # the tick after which the first of the blocks was full
        dates = _dates(batch, range(filled, filled + (full - first) * size, size))
        if sequence.retention is None:
            self.tables.index_full(sequence, full)
            _date(sequence.anchor, dates)
        else:  # blocks of one extent are retained alike
            for block in range(first, full):
                self.tables.index_full(sequence, block + 1)
                _date(sequence.anchor, dates[block - first : block - first + 1])


def _dates(batch: Batch, ticks: range) -> array[int]:
    """Return at what times ticks passed in which a batch coasted."""
    dates = array("q")
    at = 0
    for tick in ticks:
        at = bisect_left(batch.past_ticks, tick, at)
        dates.append(batch.past_times[at])
    return dates


def _date(extent: Extent, dates: array[int]) -> None:
    """Say when the last blocks of an extent were filled."""
    assert extent.born is not None
    extent.born[-len(dates) :] = dates
