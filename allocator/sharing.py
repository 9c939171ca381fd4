"""Sharing: sequences that go on from one another, and how they end."""

from __future__ import annotations

from collections.abc import Sequence

from allocator.admission import Admission
from allocator.checks import as_int
from allocator.event_log import EXCHANGED, FORKED, FREED, TRUNCATED
from allocator.sequence import KVSequence

_STATE = [
    "history",
    "anchor",
    "table",
    "twins",
    "num_prompt_tokens",
    "hit_blocks",
    "partial_tokens",
    "retention",
    "left",
    "held",
    "root",
]
"""What distinguishes the beams of one group."""


class Sharing(Admission):
    """The part of the manager that forks, cuts, reorders and releases sequences."""

    def fork(self, sequence: KVSequence, n: int = 1) -> list[KVSequence]:
        """Return `n` sequences that share all blocks of `sequence` and go on by themselves. Takes no block.

        They are in no batch. Whoever writes into a shared last block first moves to a copy (see `append`), so parallel
        sampling is a fork once the prompt is computed, and branching at any token a fork, then `truncate`. O(blocks
        of its table) each. Raises QuotaExceeded if their tables have more entries than their tenant's quota leaves,
        and ValueError for n below 1 or a sequence that is not running.
        """
        n = as_int("n", n, 1)
        self._check_live(sequence)
        if sequence.tenant is not None:
            sequence.tenant.require(n * len(sequence.table))
        return self._fork(sequence, n)

    def _fork(self, sequence: KVSequence, n: int) -> list[KVSequence]:
        sequence.catch_up()
        tokens = sequence.num_tokens
        if not self.indexes_full and tokens // self.tokens_per_block > sequence.anchor.end:
            self.tables.index_full(sequence, tokens // self.tokens_per_block)
            if sequence in self._prefilling:
                self._prefilling.put(sequence)  # its anchor has moved
        self.tables.share(sequence, n)
        children = []
        for _ in range(n):
            child = KVSequence(
                sequence.history.diverge(max(tokens, sequence.num_prompt_tokens)),
                sequence.salt,
                sequence.num_prompt_tokens,
                sequence.anchor,
                sequence.table[:],
                tokens,
            )
            child.twins = set(sequence.twins)
            self.tables.note_twins(child)
            child.left = sequence.left
            if self.windowed is not None:
                child.sink_blocks, child.root = sequence.sink_blocks, sequence.root
                child.held = sequence.held[:]
            child.hit_blocks = sequence.hit_blocks
            child.partial_tokens = sequence.partial_tokens
            child.tenant = sequence.tenant
            if self.events is not None:
                child.number = self.events.new_sequence()
                self.events.add(FORKED, child.number, sequence.number)
            child.retention = sequence.retention
            self.sequences[child] = None
            if sequence in self._prefilling:
                self._prefilling.put(child)
            children.append(child)
        self.logical_blocks += n * len(sequence.table)
        if sequence.tenant is not None:
            sequence.tenant.blocks += n * len(sequence.table)
        self.logical_tokens += n * sequence.context_len
        if sequence.batch is not None:
            sequence.batch.unready[sequence] = None
        return children

    def truncate(self, sequence: KVSequence, num_tokens: int) -> None:
        """Forget all tokens of a sequence beyond the first `num_tokens`; what follows will be other content.

        Its blocks beyond are given back, a partly kept one stays: for speculation that was rejected, and branches.
        Raises ValueError unless 1 ≤ num_tokens ≤ the sequence's length, or while the sequence is in a batch or its
        prefill is incomplete, or if blocks have left that a window ending there needs.
        """
        self._check_live(sequence)
        num_tokens = as_int("num_tokens", num_tokens, 1)
        if num_tokens > sequence.num_tokens:
            raise ValueError(
                f"num_tokens ({num_tokens}) must be at most the sequence's {sequence.num_tokens}"
            )
        if sequence.batch is not None or sequence in self._prefilling:
            raise ValueError(f"{sequence} must be out of its batch and past its prefill to be truncated")
        if num_tokens == sequence.num_tokens:
            return
        if self.windowed is not None:
            least = self.windowed.window.least_tokens(sequence.left)
            if num_tokens < least:
                raise ValueError(
                    f"num_tokens ({num_tokens}) must be at least {least}: "
                    "blocks that the window of the next token needs have left"
                )
        self._truncated = True
        if self.events is not None:
            self.events.add(TRUNCATED, sequence.number, value=num_tokens)
        size = self.tokens_per_block
        keep = -(-num_tokens // size)
        self.tables.free_private(sequence, keep)
        twin_kept = keep - 1 in sequence.twins and num_tokens % size != 0
        if twin_kept:  # it is about to be written: private again, and not the twin of anything
            sequence.twins.discard(keep - 1)
            self.tables.note_twins(sequence)
        self.tables.move_anchor(sequence, min(sequence.anchor.end, keep - twin_kept))
        if sequence.retention is not None:
            for extent in sequence.anchor.path():  # it decodes in the midst of its wishes now
                extent.sealed = True
        kept = keep - sequence.left
        self.logical_blocks -= len(sequence.table) - kept
        if sequence.tenant is not None:
            sequence.tenant.blocks -= len(sequence.table) - kept
        self.logical_tokens -= sequence.num_tokens - num_tokens
        del sequence.table[kept:]
        sequence.num_tokens = num_tokens
        sequence.history = sequence.history.diverge(num_tokens)
        sequence.num_prompt_tokens = min(sequence.num_prompt_tokens, num_tokens)

    def reclaimable_blocks(self, sequence: KVSequence) -> int:
        """Return by how many blocks `release` would add to what is available, pending copies apart.

        These are the blocks that it alone holds. O(extents, and private blocks, of its table). Raises ValueError for
        a sequence that is not running.
        """
        self._check_live(sequence)
        shared = self.pool.shared
        positions = self.tables.private_positions(sequence)
        private = sum(sequence.table[sequence.index_of(p)] not in shared for p in positions)
        return private + sum(len(e.ids) for e in self.tables.held_extents(sequence) if e.references == 1)

    def release(self, sequence: KVSequence) -> None:
        """Give a sequence's blocks back, the last first: cached ones become evictable, others free.

        It may be in a batch, which it leaves, or swapped out; then its blocks are the host's. O(extents it holds, and
        blocks of its own). Raises ValueError if it has been released before, or is another manager's.
        """
        if sequence not in self.sequences:
            self._release_swapped(sequence)
            return
        batch = sequence.batch
        if batch is not None:
            coasted, anchor = batch.coasted, sequence.anchor
            if anchor.grower is not None:
                full = (sequence.base_tokens + batch.tick) // self.tokens_per_block
                keys = batch.pending_keys(sequence, anchor.start + len(anchor.ids), full)
                self.tables.prolong(sequence, keys, full)
            bucket = batch.discard(sequence)
            if coasted:
                self._index_coasted(sequence, batch, bucket, sequence.base_tokens)
        if self.events is not None:
            self.events.add(FREED, sequence.number)
        self.tables.release(sequence)
        self.logical_blocks -= len(sequence.table)
        if sequence.tenant is not None:
            sequence.tenant.blocks -= len(sequence.table)
        self.logical_tokens -= sequence.base_tokens - sequence.left * self.tokens_per_block
        if sequence.base_tokens < sequence.num_prompt_tokens:
            self._note_prefilling(sequence, False)
        del self.sequences[sequence]
        sequence.released = True

    def _release_swapped(self, sequence: KVSequence) -> None:
        """Release a sequence that is not among the running ones. Raises ValueError unless it is swapped out."""
        self._check_live(sequence)

    def reorder_beams(self, sequences: Sequence[KVSequence], parents: Sequence[int]) -> None:
        """Let beam i go on from beam parents[i]; beams that nobody goes on from end. Takes no block.

        Quotas are not asked: where windows have passed, a beam may take over a longer table than it had.

        sequences  the beams of one group, of equal length, all in the same batch or in none
        parents    [len(sequences)], each an index into `sequences`

        The sequences stay the objects they were: beam i then has the tokens of beam parents[i]. O(blocks of a table)
        for each beam whose parent is another. Raises ValueError for parents that are not such, and for beams that
        are not distinct, not past their prefill, or differ in length, salt, tenant or batch.
        """
        if len(parents) != len(sequences):
            raise ValueError(
                f"parents ({len(parents)} of them) must be as many as sequences ({len(sequences)})"
            )
        parents = [as_int("parents", parent, 0) for parent in parents]
        if not all(parent < len(sequences) for parent in parents):
            raise ValueError(f"parents ({list(parents)}) must index the {len(sequences)} sequences")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences ({len(sequences)}) must be distinct")
        for sequence in sequences:
            self._check_complete(sequence)
        if len({(s.num_tokens, s.batch, s.salt, s.tenant) for s in sequences}) > 1:
            raise ValueError("sequences must have equal lengths, salts and tenants, and be in the same batch")
        heirs = {i: self._fork(sequences[p], 1)[0] for i, p in enumerate(parents) if p != i}
        for i, heir in heirs.items():
            self._swap_state(sequences[i], heir)
            if self.events is not None:
                self.events.add(EXCHANGED, sequences[i].number, heir.number)
            self.release(heir)  # it now holds what the beam held before
        for sequence in sequences:
            if sequence.batch is not None:
                sequence.batch.unready[sequence] = None
                sequence.batch.place(sequence)

    def _swap_state(self, one: KVSequence, other: KVSequence) -> None:
        for name in _STATE:
            mine, theirs = getattr(one, name), getattr(other, name)
            setattr(one, name, theirs)
            setattr(other, name, mine)
        self.tables.note_twins(one)
        self.tables.note_twins(other)
