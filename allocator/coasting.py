"""Coasting: decode steps that a simulator knows to be alike, many as one, with the index told afterwards."""

from __future__ import annotations

from array import array
from itertools import chain
from typing import Final

from allocator.batch import Batch, Bucket
from allocator.decoding import Decoding
from allocator.sequence import KVSequence

_MOST_DATES: Final = 4096
"""Blocks that members of a batch start at the same ticks before everybody is caught up."""


class Coasting(Decoding):
    """The part of the manager that takes steps in which nobody generates what anybody could look for.

    A block that fills while coasting goes into the index only when its sequence leaves the batch, is forked, or
    advances in another way: *catches up*. Till then it counts as what it is, a referenced block, and nobody misses
    it, since its content is the sequence's own. Where lifetimes are collected, the batch's buckets keep the dates at
    which blocks were filled.
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
        is_plain = not (batch.unready or batch.ring.named)
        if self.steps_matter or not is_plain:
            later = batch.growth(num_tokens) - batch.growth(1)
            only_logged = self.only_logged and is_plain
            version, evicted = self.index.version, pool.evicted_blocks
            self.advance(batch, num_tokens)
            if only_logged and pool.evicted_blocks == evicted:
                self.index.version = version  # as without a log: what filled is in nobody's match
            return later
        starts, growth, first = batch.starts(num_tokens)
        now = pool.now
        if growth:
            blocks = pool.take(growth)
            # Who starts at once had filled its last block when the batch coasted before.
            date = batch.coasted_at if first else now
            if num_tokens <= self.tokens_per_block:
                each, dated = blocks.tolist(), pool.lifetimes is not None
                each.reverse()
                for bucket in starts:
                    for sequence in bucket:
                        sequence.table.append(each.pop())
                    if dated:
                        bucket.dates.append(date)
                        date = now
            else:  # everybody's turn comes again and again
                turns = len(batch.members)
                for turn, sequence in enumerate(chain.from_iterable(starts)):
                    sequence.table.extend(blocks[turn::turns])
                if pool.lifetimes is not None:
                    self._date_again(batch, starts, growth, date)
            self.logical_blocks += growth
        batch.tick += num_tokens
        batch.slots = None
        batch.coasted = True
        batch.coasted_at = now
        self.logical_tokens += num_tokens * len(batch.members)
        if growth and len(starts[0].dates) > _MOST_DATES:
            batch.catch_up_all()
        return growth - first

    def _date_again(self, batch: Batch, starts: list[Bucket], growth: int, date: int) -> None:
        """Note when blocks were filled, several for each member, in a coast; the first bucket's first at `date`."""
        again, rest = divmod(growth, len(batch.members))
        fewer = array("q", (self.pool.now,)) * again
        more = fewer + fewer[:1]
        before = len(starts[0].dates)
        for bucket in starts:
            if rest > 0:
                bucket.dates.extend(more)
                rest -= len(bucket)
            else:
                bucket.dates.extend(fewer)
        starts[0].dates[before] = date

    def catch_up(self, sequence: KVSequence) -> None:
        """Put the blocks that a member of a batch has filled, and the index has not, into it. O(blocks filled).

        Its token ids must have been settled. The manager does so whenever it matters.
        """
        batch = sequence.batch
        assert batch is not None
        bucket, anchor = batch.bucket_of(sequence), sequence.anchor
        if anchor.grower is not None:
            full = (sequence.base_tokens + batch.tick) // self.tokens_per_block
            keys = sequence.settled_history.keys(anchor.start + len(anchor.ids), full)
            self.tables.prolong(sequence, keys, full)
            bucket.eager[sequence] = bucket[sequence]
        self._index_coasted(sequence, batch, bucket, sequence.base_tokens + batch.tick)

    def _index_coasted(self, sequence: KVSequence, batch: Batch, bucket: Bucket, tokens: int) -> None:
        """Put what filled while a sequence of so many tokens coasted, in that bucket of a batch, into the index."""
        size, anchor = self.tokens_per_block, sequence.anchor
        full, first = tokens // size, anchor.start + len(anchor.ids)
        if full <= first or not self.indexes_full:
            return
        dates = None
        if self.pool.lifetimes is not None:
            dates = bucket.dates
            if tokens % size:
                dates = dates[first - full :]
            else:  # nobody has started the block after the last one
                dates = dates[first - full + 1 :] if full - first > 1 else array("q")
                dates.append(batch.coasted_at)
        version = self.index.version
        if sequence.retention is None:
            self.tables.index_full(sequence, full, dates)
        else:
            for block in range(first, full):  # as it would have been: extents are sealed on the way
                at = block - first
                self.tables.index_full(sequence, block + 1, dates and dates[at : at + 1])
        self.index.version = version  # it is nobody else's, so that no match has changed
