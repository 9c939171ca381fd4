"""Coasting: many decode steps of a batch as one, where nobody generates what the cache could hold."""

from __future__ import annotations

from allocator.batch import Batch
from allocator.decoding import Decoding


class Coasting(Decoding):
    """The part of the manager that takes steps together which a simulator knows to be alike."""

    def writes_in_place(self, batch: Batch) -> bool:
        """Return whether the next token of each member goes into a block of its own, so that nothing is copied."""
        if batch.unready:
            shared_tail = self.tables.shared_tail
            for sequence in batch.unready:
                if shared_tail(sequence) is not None:
                    return False
            batch.unready.clear()
        return True

    def coast(self, batch: Batch, num_tokens: int) -> int:
        """Do what `advance` does; return how many blocks the first of the `num_tokens` steps takes.

        The batch `writes_in_place`, and what it generates is nobody else's: no content names it, so that no block
        that fills repeats a cached one. There is room. Then the blocks of all steps can be taken at once.
        """
        pool = self.pool
        if self.quotas is not None or batch.unready or batch.ring.named or pool.notes_cached:
            first = batch.growth(1)
            self.advance(batch, num_tokens)
            return first
        batch.forget_slots()
        events, growth = batch.upcoming(num_tokens)
        stock = pool.take(growth)
        taken = first = 0
        index_filled = self.tables.index_filled
        for offset, bucket, starts in events:
            if starts:
                if not offset:
                    first = len(bucket)
                for sequence in bucket:
                    sequence.table.append(stock[taken])
                    taken += 1
            else:
                index_filled(bucket, batch.settle_blocks(bucket))
        batch.tick += num_tokens
        self._logical_blocks += growth
        self._logical_tokens += num_tokens * len(batch)
        return first
