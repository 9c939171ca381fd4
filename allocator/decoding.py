"""Decoding: how running sequences grow, one by one or in a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from allocator.batch import Batch
from allocator.checks import as_int, require_int
from allocator.event_log import ADVANCED, NOBODY, TAKEN
from allocator.pool import OutOfBlocks
from allocator.sequence import KVSequence
from allocator.state import ManagerState
from allocator.windowed_tables import NEVER, Gain, WindowedTables


class Decoding(ManagerState):
    """The part of the manager that gives running sequences their next slots."""

    def batch(self) -> Batch:
        """Return an empty batch, with which `append` costs per block started, not per sequence."""
        return Batch(
            self.tokens_per_block,
            self.sequences,
            self.pool.shared,
            self.events,
            windowed=self.windowed is not None,
        )

    def append(
        self,
        sequences: Sequence[KVSequence],
        tokens: Sequence[Sequence[int]] | Sequence[int] | None = None,
        num_tokens: int = 1,
    ) -> NDArray[np.int64]:
        """Give each sequence slots for `num_tokens` more tokens; return them, int64 [len(sequences) · num_tokens].

        sequences  distinct; a `Batch` (all its members) or any others
        tokens     the ids to be written, [len(sequences)] or [len(sequences)][num_tokens]; None if unknown

        Slots come sequence by sequence. Blocks that fill up can be hit from now on. A write into a shared or
        cached block moves the writer to a block of its own and adds a copy to `pending_copies`. All sequences
        advance or, with OutOfBlocks or QuotaExceeded, none. O(sequences); of a batch, O(blocks that start or fill),
        and work by array for all members.

        In a windowed cache this is one step of `num_tokens` queries a sequence: what the first of them does not
        need leaves before blocks are taken, and nothing else.

        Raises ValueError for sequences that are not distinct, not past their prefill, or in a batch without the rest
        of it; for a batch of another manager; for tokens that are not as many, or not in 0 … 2³¹ − 1, or of a content
        that cannot name tokens; and while the block to be copied from is itself still to be copied into.
        """
        if isinstance(sequences, Batch) and num_tokens == 1:
            slots = None if tokens is None else self._tick_plainly(sequences, tokens)
            if slots is None:
                if sequences.slots is None:
                    sequences.keep_slots()
                self._advance_batch(sequences, 1, tokens)
                slots = sequences.last_slots()
            return slots
        if isinstance(sequences, KVSequence):
            raise ValueError(f"sequences ({sequences}) must be a list of them, or a Batch")
        firsts = [sequence.num_tokens for sequence in sequences]
        self._step(sequences, num_tokens, tokens)
        if not firsts:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate(
            [s.slots(first, first + num_tokens) for s, first in zip(sequences, firsts, strict=True)]
        )

    def advance(
        self,
        sequences: Sequence[KVSequence],
        num_tokens: int = 1,
        tokens: Sequence[Sequence[int]] | Sequence[int] | None = None,
    ) -> None:
        """Do what `num_tokens` calls of `append` with one token each do, without computing the slots.

        tokens  as for `append`

        Raises what `append` does, and then none of the calls has been done; ValueError for several tokens in a
        windowed cache unless the sequences are a batch.
        """
        if self.windowed is None or num_tokens == 1:
            self._step(sequences, num_tokens, tokens)
        else:
            self._slide(self.windowed, sequences, num_tokens, tokens)

    def _slide(
        self,
        tables: WindowedTables,
        sequences: Sequence[KVSequence],
        num_tokens: int,
        tokens: Sequence[Sequence[int]] | Sequence[int] | None,
    ) -> None:
        """Take several steps, blocks leaving at each; none if one of them lacks blocks."""
        num_tokens = as_int("num_tokens", num_tokens, 1)
        if not isinstance(sequences, Batch):
            raise ValueError(
                f"num_tokens ({num_tokens}) must be 1 in a windowed cache, or the sequences a batch"
            )
        rows = _rows(tokens, len(sequences), num_tokens)
        if self.steps_within(sequences, num_tokens) < num_tokens:
            raise OutOfBlocks(self.pool.available + 1, self.pool.available)
        if tables.ticks_until_leave(sequences) >= num_tokens:
            self._step(sequences, num_tokens, tokens)
            return
        for step in range(num_tokens):
            self._step(sequences, 1, None if rows is None else [row[step] for row in rows])

    def steps_within(self, batch: Batch, steps: int) -> int:
        """Return how many of a batch's next `steps` steps, of a token each, find their blocks in a windowed cache.

        Raises ValueError for a cache without a window.
        """
        if self.windowed is None:
            raise ValueError("steps_within (of a batch) needs a cache with a window")
        return Gain(self.windowed).steps_within(batch, steps, self.pool.available)

    def ticks_until_leave(self, batch: Batch) -> int:
        """Return at which of a batch's next ticks, from 0 on, a block leaves its window; 2⁶² if none ever does."""
        return NEVER if self.windowed is None else self.windowed.ticks_until_leave(batch)

    def room(self, sequence: KVSequence) -> int:
        """Return for how many more tokens there are blocks, if no other sequence takes any. O(1).

        The copy of a last block that it shares is not counted. Raises ValueError for a sequence that is not running.
        """
        self._check_live(sequence)
        blocks = sequence.left + len(sequence.table) + self.pool.available
        if self.windowed is not None:
            blocks += self.windowed.gain([sequence])
        return blocks * self.tokens_per_block - sequence.num_tokens

    def _step(
        self,
        sequences: Sequence[KVSequence],
        num_tokens: int,
        tokens: Sequence[Sequence[int]] | Sequence[int] | None,
    ) -> None:
        num_tokens = as_int("num_tokens", num_tokens, 1)
        if isinstance(sequences, Batch):
            self._advance_batch(sequences, num_tokens, tokens)
            return
        rows = _rows(tokens, len(sequences), num_tokens)
        if rows is not None:
            for sequence in sequences:
                sequence.settled_history.check_nameable()
        self._check_writers(sequences)
        self._write(sequences, num_tokens, rows)

    def _check_writers(self, sequences: Sequence[KVSequence]) -> None:
        self._check_distinct(sequences)
        for sequence in sequences:
            self._check_complete(sequence)
            if sequence.batch is not None:
                raise ValueError("sequences of a batch advance together: append to the batch")

    def _check_distinct(self, sequences: Sequence[KVSequence]) -> None:
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences ({len(sequences)}) must be distinct")

    def blocks_to_advance(self, sequences: Sequence[KVSequence], num_tokens: int = 1) -> int:
        """Return how many blocks `append` would take: growth and copies, less those that leave a window.

        O(sequences); of a batch, O(blocks that start, and members to be copied for). Raises ValueError for sequences
        that are not running or not distinct, or a num_tokens below 1.
        """
        num_tokens = as_int("num_tokens", num_tokens, 1)
        if not isinstance(sequences, Batch):
            for sequence in sequences:
                self._check_live(sequence)
            self._check_distinct(sequences)
        return self._blocks_to_advance(sequences, num_tokens)

    def _blocks_to_advance(self, sequences: Sequence[KVSequence], num_tokens: int) -> int:
        if isinstance(sequences, Batch):
            blocks = sequences.growth(num_tokens) + self.tables.copies_needed(sequences.unready)
        else:
            blocks = self._growth(sequences, num_tokens) + self.tables.copies_needed(sequences)
        if self.windowed is not None:
            blocks -= self.windowed.gain(self.windowed.leavers(sequences))
        return blocks

    def _leave(self, tables: WindowedTables, sequences: Iterable[KVSequence]) -> None:
        for sequence in sequences:
            count = tables.leave(sequence)
            self.logical_blocks -= count
            self.logical_tokens -= count * self.tokens_per_block
            if sequence.tenant is not None:
                sequence.tenant.blocks -= count

    def _given_up(self, sequences: Sequence[KVSequence]) -> list[tuple[KVSequence, int]]:
        """Return, as negative demands, which blocks of which sequences leave when these go on."""
        if self.windowed is None:
            return []
        return [(s, -self.windowed.leaving(s)) for s in self.windowed.leavers(sequences)]

    def _growth(self, sequences: Sequence[KVSequence], num_tokens: int) -> int:
        size = self.tokens_per_block
        return sum(-(-(s.num_tokens + num_tokens) // size) - s.left - len(s.table) for s in sequences)

    def _check_room(self, needed: int, writers: Collection[KVSequence]) -> None:
        """Raise, before anything changes, if blocks are lacking or a copy would read what is yet to come."""
        if needed and needed > self.pool.available:
            raise OutOfBlocks(needed, self.pool.available)
        if writers and len(self.tables.copies):
            for sequence in writers:
                tail = self.tables.shared_tail(sequence)
                if tail is not None and self.tables.copies.is_destination(tail):
                    raise ValueError(f"block {tail} is still to be copied into: take pending_copies() first")

    def _write(
        self, sequences: Sequence[KVSequence], num_tokens: int, rows: list[Sequence[int]] | None = None
    ) -> None:
        self._check_room(self._blocks_to_advance(sequences, num_tokens), sequences)
        if self.quotas is not None:
            demands = [(s, self._growth([s], num_tokens)) for s in sequences]
            self.quotas.require(demands + self._given_up(sequences))
        self._record(sequences, rows)
        size = self.tokens_per_block
        if self.windowed is not None:
            self._leave(self.windowed, sequences)  # first, so that what leaves can be taken
        # Nothing is indexed before all have their blocks: what one puts into the index can hang on another's
        # last block, or repeat an evictable block that the others counted on.
        for sequence in sequences:
            self.tables.own_tail(sequence)
        for sequence in sequences:
            self._grow(sequence, num_tokens)
        if self.indexes_full:
            for sequence in sequences:
                full = sequence.num_tokens // size
                if full > sequence.anchor.end:
                    self.tables.index_full(sequence, full)

    def _grow(self, sequence: KVSequence, num_tokens: int) -> None:
        """Let a sequence that is in no batch have `num_tokens` more tokens, and the blocks for them."""
        tokens, table, events = sequence.base_tokens + num_tokens, sequence.table, self.events
        growth = -(-tokens // self.tokens_per_block) - sequence.left - len(table)
        if growth == 1 and events is None and sequence.tenant is None:
            table.append(self.pool.take_one())
            self.logical_blocks += 1
        elif growth:
            blocks = self.pool.take(growth)
            table.extend(blocks)
            self.logical_blocks += growth
            if sequence.tenant is not None:
                sequence.tenant.blocks += growth
            if events is not None:
                events.add_blocks(TAKEN, sequence.number, -1, num_tokens, blocks)
        elif events is not None:
            events.add(TAKEN, sequence.number, value=num_tokens)
        sequence.base_tokens = tokens
        self.logical_tokens += num_tokens

    def _record(self, sequences: Sequence[KVSequence], rows: list[Sequence[int]] | None) -> None:
        if rows is not None:
            for sequence, row in zip(sequences, rows, strict=True):
                sequence.history.record(sequence.num_tokens, row)

    def _advance_batch(
        self, batch: Batch, num_tokens: int, tokens: Sequence[Sequence[int]] | Sequence[int] | None
    ) -> None:
        if batch.live is not self.sequences or batch.log is not self.events:
            raise ValueError(f"a batch of {len(batch)} sequences must be this manager's own")
        if batch.coasted:
            batch.catch_up_all()
        ids = rows = None
        if tokens is not None:
            if num_tokens == 1:
                ids = batch.packed(tokens)
            if ids is None:
                rows = _rows(tokens, len(batch), num_tokens)
            if batch.nameless:
                for sequence in batch:
                    sequence.settled_history.check_nameable()
        writers = self.tables.borrowers(batch.unready) if batch.unready else ()
        needed = batch.growth(num_tokens)
        if writers:
            needed += self.tables.copies_needed(writers)
        leavers: Sequence[KVSequence] = ()
        if self.windowed is not None:
            leavers = self.windowed.leavers(batch)
            needed -= self.windowed.gain(leavers)
        self._check_room(needed, writers)
        if self.quotas is not None:
            growing = list(batch.growing(num_tokens))
            demands = [(s, blocks) for bucket, blocks in growing for s in bucket]
            self.quotas.require(demands + self._given_up(batch))
            for bucket, blocks in growing:
                for sequence in bucket:
                    if sequence.tenant is not None:
                        sequence.tenant.blocks += blocks
        if self.windowed is not None:
            self._leave(self.windowed, leavers)
        batch.unready.clear()
        for sequence in writers:
            self.tables.own_tail(sequence)
            batch.place(sequence)
        if num_tokens == 1:
            if rows is not None:
                ids = np.array(rows, dtype=np.int32).ravel()
            self._tick(batch, ids)
        else:
            batch.settle_all()
            batch.slots = None  # nobody asks for those of several ticks
            self._record(batch, rows)
            self._ticks(batch, num_tokens)
            if (
                self.windowed is not None
            ):  # whose turn to let go of blocks was passed over; whose has come is known
                leaving, turn = self.windowed.leaving, self.windowed.turn(batch)
                batch.unready.update(
                    (member, None) for member in batch if member not in turn and leaving(member) > 0
                )
        self.logical_tokens += num_tokens * len(batch)
        if self.events is not None:
            self.events.add(ADVANCED, NOBODY, batch.number, num_tokens)

    def _tick_plainly(
        self, batch: Batch, tokens: Sequence[Sequence[int]] | Sequence[int]
    ) -> NDArray[np.int64] | None:
        """Do what `_advance_batch` does for one tick with token ids, if who starts or fills a block is all there is
        to look at, and return the slots; else return None. Most ticks are of this kind, and most of what a tick costs
        is to find out.
        """
        slots = batch.slots
        if (
            slots is None
            or batch.unready
            or batch.nameless
            or batch.coasted
            or self.steps_count
            or batch.live is not self.sequences
            or (ids := batch.packed(tokens)) is None
        ):
            return None
        tick, size, ring, rows = batch.tick, self.tokens_per_block, batch.ring, batch.order
        assert rows is not None
        starting = batch.buckets.get(tick % size)
        if starting is not None:
            pool, growth = self.pool, len(starting)
            if growth > pool.available:
                return None
            batch.start_blocks(starting, pool.take(growth))
            self.logical_blocks += growth
        if not ring.left:
            batch.rewind()
        ring.write(rows, ids)
        batch.tick = tick = tick + 1
        filled = batch.buckets.get(tick % size)
        if filled is not None and self.indexes_full:
            if filled.eager:
                self.tables.index_filled(batch, filled)
            else:
                self.index.version += 1
        self.logical_tokens += len(batch.members)
        return slots.advanced(rows)

    def _tick(self, batch: Batch, ids: NDArray[np.int32] | None) -> None:
        """Let a batch go on by one tick, in which it writes `ids`."""
        if batch.slots is not None or ids is not None:
            batch.arrange()
        starting = batch.starting()
        if starting:
            blocks = self.pool.take(len(starting))
            batch.start_blocks(starting, blocks)
            self.logical_blocks += len(starting)
            if self.events is not None:
                for sequence, block in zip(starting, blocks, strict=True):
                    self.events.add_block(TAKEN, sequence.number, -1, 0, block)
        batch.step(ids)
        filled = batch.starting()
        if filled and self.indexes_full:
            self.tables.index_filled(batch, filled)

    def _ticks(self, batch: Batch, num_tokens: int) -> None:
        """Let a batch go on by several ticks at once, in the order in which single ones would do it."""
        pool, events, tick = self.pool, self.events, batch.tick
        # A block that fills can repeat an evictable one, which is then held. Where that could leave too few for
        # the ticks to come, all blocks are taken before anything fills.
        stock = None
        growth = batch.growth(num_tokens)
        if growth + min(batch.fills(num_tokens), pool.num_evictable) > pool.available:
            stock = iter(pool.take(growth))
        for ticks, bucket, starts in batch.events(num_tokens):
            batch.tick = tick + ticks  # who looks meanwhile, a policy for example, finds what is full by now
            if starts:
                blocks = pool.take(len(bucket)) if stock is None else islice(stock, len(bucket))
                for sequence, block in zip(bucket, blocks, strict=True):
                    sequence.table.append(block)
                    if events is not None:
                        events.add_block(TAKEN, sequence.number, -1, 0, block)
                self.logical_blocks += len(bucket)
            elif self.indexes_full:
                self.tables.index_filled(batch, bucket)
        batch.tick = tick + num_tokens

    def end_step(self) -> None:
        """Note that what has been scheduled is computed before anything that will be; `pending_copies` does it too.

        Only partial reuse has to know: for whoever takes several steps without copies as one.
        """
        if self.pool.partial is not None:
            self.pool.partial.end_step()

    def pending_copies(self) -> NDArray[np.int32]:
        """Return and forget the copies to execute before this step's writes, int32 [n, 3].

        Columns: source block, destination block, valid tokens (the slots to copy). They may run in parallel.
        With partial reuse, ask once a step, when all of it is scheduled and even if nothing was written: what
        the step fills can then be copied in the next.
        """
        self.end_step()
        return self.tables.copies.take()


def _rows(
    tokens: Sequence[Sequence[int]] | Sequence[int] | None, num_sequences: int, num_tokens: int
) -> list[Sequence[int]] | None:
    """Return the token ids as one row a sequence, or None."""
    if tokens is None:
        return None
    if len(tokens) != num_sequences:
        raise ValueError(f"tokens ({len(tokens)} of them) must be as many as sequences ({num_sequences})")
    rows = [row if isinstance(row, Sequence) else [row] for row in tokens]
    for row in rows:
        if len(row) != num_tokens:
            raise ValueError(f"tokens ({len(row)} for a sequence) must be num_tokens ({num_tokens})")
        for token in row:
            if type(token) is not int:
                require_int("tokens", token, 0)
        if min(row) < 0:
            raise ValueError(f"tokens ({min(row)}) must not be negative")
        if max(row) >= 2**31:
            raise ValueError(f"tokens ({max(row)}) must be less than 2**31")
    return rows
