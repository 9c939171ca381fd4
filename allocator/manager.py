"""KVCacheManager: the allocator's one public face."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from allocator.batch import Batch
from allocator.checks import as_int, require_power_of_two
from allocator.config import CacheConfig
from allocator.content import Content
from allocator.eviction import EvictionPolicy, make_policy
from allocator.invariants import check_invariants
from allocator.lifetimes import Lifetimes
from allocator.matching import PrefixMatch, find_match
from allocator.pool import BlockPool, OutOfBlocks
from allocator.prefix import Extent, PrefixIndex
from allocator.sequence import KVSequence
from allocator.stats import CacheStats, Lookups
from allocator.tables import Tables

__all__ = ["CacheStats", "KVCacheManager", "KVSequence", "OutOfBlocks", "PrefixMatch"]


class KVCacheManager:
    """A paged KV cache: a pool of blocks, the tables of running sequences, and the cache of finished ones.

    num_blocks        blocks in the pool
    tokens_per_block  a power of two
    config            block reuse on or off, eviction policy; default CacheConfig()
    policy            an EvictionPolicy of your own, in place of the one that `config` names
    ghost_blocks      how many evicted blocks to remember, to explain misses; default 16 for each block
    lifetimes         collect how long blocks live, in units of `now`

    A life: `lookup` → `admit` (first prefill chunk) → `extend` (further chunks) → `append` (decode steps) →
    `release`. Calls that need blocks raise OutOfBlocks when the pool has too few, and have then changed nothing.
    Copies that a write made necessary are handed out by `pending_copies`; execute them before the step's writes.
    The manager has no clock: recency is the order of calls. `now` only dates what `lifetimes` collects.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        config: CacheConfig | None = None,
        *,
        policy: EvictionPolicy | None = None,
        ghost_blocks: int | None = None,
        lifetimes: bool = False,
    ) -> None:
        config = config or CacheConfig()
        num_blocks = as_int("num_blocks", num_blocks, 1)
        tokens_per_block = as_int("tokens_per_block", tokens_per_block, 1)
        require_power_of_two("tokens_per_block", tokens_per_block)
        if not isinstance(policy, EvictionPolicy | None):
            raise ValueError(f"policy ({policy!r}) must be an EvictionPolicy, made and not yet in use")
        _refuse_unserved(config)
        if ghost_blocks is None:
            ghost_blocks = 16 * num_blocks
        ghost_blocks = as_int("ghost_blocks", ghost_blocks, 0)
        self.tokens_per_block = tokens_per_block
        self.config = config
        self.reuse = config.enable_block_reuse
        self.index = PrefixIndex(ghost_blocks if self.reuse else 0)
        self.pool = BlockPool(
            num_blocks, policy or make_policy(config.policy), self.index, keep_cached=self.reuse
        )
        if lifetimes:
            self.pool.lifetimes = Lifetimes()
        self.sequences: dict[KVSequence, None] = {}
        self.tables = Tables(self.pool, self.index, tokens_per_block)
        self._lookups = Lookups()
        self._prefilling: dict[KVSequence, None] = {}
        self._logical_blocks = 0
        self._logical_tokens = 0
        self._truncated = False  # a table may end in a cached block of which it uses only a part

    @classmethod
    def contiguous(cls, num_sequences: int, max_seq_len: int) -> KVCacheManager:
        """Return the cache of an engine without paging: every sequence reserves max_seq_len tokens in one piece.

        That is a pool whose blocks are whole sequences, and in which nothing is reused.
        """
        max_seq_len = as_int("max_seq_len", max_seq_len, 1)
        manager = cls(num_sequences, 1, CacheConfig(enable_block_reuse=False))
        manager.tokens_per_block = manager.tables.tokens_per_block = max_seq_len
        return manager

    @property
    def num_blocks(self) -> int:
        """Return the pool's size."""
        return self.pool.num_blocks

    @property
    def available_blocks(self) -> int:
        """Return how many blocks could be taken: free and evictable ones."""
        return self.pool.available

    @property
    def logical_blocks(self) -> int:
        """Return the blocks of all tables, a shared one counted for each table."""
        return self._logical_blocks

    @property
    def logical_tokens(self) -> int:
        """Return the tokens of all sequences."""
        return self._logical_tokens

    @property
    def now(self) -> int:
        """Return the caller's time, in the caller's unit."""
        return self.pool.now

    @now.setter
    def now(self, value: int) -> None:
        self.pool.now = value

    # ---------------------------------------------------------------- admission and prefill

    def lookup(self, content: Content, salt: Hashable = "") -> PrefixMatch:
        """Return which blocks of a prompt are cached, and why the others are not. Changes nothing.

        Only sequences with an equal `salt` share blocks. A full hit still leaves the last token to compute.
        """
        if not self.reuse:
            size = self.tokens_per_block
            full, rest = divmod(content.num_prompt_tokens, size)
            misses = {"cold": full} if full else {}
            if rest:
                misses["short_of_block"] = 1
            return PrefixMatch(
                self.index, content, salt, size, (), None, 0, full + (rest > 0), misses, self.index.version
            )
        return find_match(self.index, content, salt, self.tokens_per_block, self._prefilling)

    def is_current(self, match: PrefixMatch) -> bool:
        """Return whether looking up again would give the same match."""
        return match.index is self.index and match.version == self.index.version

    def blocks_needed(self, match: PrefixMatch, num_tokens: int) -> int:
        """Return by how many blocks admitting `num_tokens` beyond the hits lessens what is available."""
        size = self.tokens_per_block
        num_tokens = as_int("num_tokens", num_tokens, 0)
        return -(-(match.hit_tokens + num_tokens) // size) - match.hit_blocks + match.evictable_blocks

    def can_admit(self, match: PrefixMatch, num_tokens: int) -> bool:
        """Return whether `admit` would find the blocks it needs. O(extents hit)."""
        return self.blocks_needed(match, num_tokens) <= self.pool.available

    def admit(
        self,
        content: Content,
        num_tokens: int,
        match: PrefixMatch | None = None,
        salt: Hashable = "",
        *,
        readmission: bool = False,
    ) -> KVSequence:
        """Start a sequence: reference the blocks found, and take those for the first prefill chunk.

        num_tokens   tokens of the chunk, beyond the hits; from 1 to what the prompt has left
        match        what `lookup(content, salt)` returned, to save looking up again
        readmission  the sequence was preempted: it does not count in the hit statistics again

        The chunk's full blocks can be hit from now on. Raises OutOfBlocks, or ValueError for a chunk that does
        not fit the prompt or a match of another content.
        """
        if match is None or not self.is_current(match):
            match = self.lookup(content, salt)
        elif match.content is not content or match.salt != salt:
            raise ValueError("match must come from a lookup of the same content and salt")
        num_tokens = as_int("num_tokens", num_tokens, 1)
        left = content.num_prompt_tokens - match.hit_tokens
        if num_tokens > left:
            raise ValueError(f"num_tokens ({num_tokens}) must be at most the prompt's remaining {left}")
        needed = self.blocks_needed(match, num_tokens)
        if needed > self.pool.available:
            raise OutOfBlocks(needed, self.pool.available)

        history = content.history(self.tokens_per_block)
        # Without reuse, each sequence has a root of its own: nothing is ever found, and the rest is the same.
        family, label = (content.family(), salt) if self.reuse else (None, history)
        root = self.index.root(family, label, history.key_width)
        root.references += 1
        anchor: Extent = root
        table = array("i")
        for extent, blocks in match.path:
            if blocks * extent.width < len(extent.keys):
                extent = self.pool.split(extent, blocks)
            self.pool.hit(extent)
            table.extend(extent.ids)
            anchor = extent
        tokens = match.hit_tokens + num_tokens
        table.extend(self.pool.take(-(-tokens // self.tokens_per_block) - match.hit_blocks))

        sequence = KVSequence(history, salt, content.num_prompt_tokens, anchor, table)
        sequence.hit_blocks = match.hit_blocks
        sequence.num_tokens = tokens
        self.sequences[sequence] = None
        self._logical_blocks += len(table)
        self._logical_tokens += tokens
        self._after_prefill(sequence)
        if not readmission:
            self._count(match)
        return sequence

    def extend(self, sequence: KVSequence, num_tokens: int) -> NDArray[np.int64]:
        """Take blocks for the next prefill chunk and return its slots, int64 [num_tokens].

        Raises OutOfBlocks, or ValueError for more tokens than the prompt has left.
        """
        first = sequence.num_tokens
        self.prefill(sequence, num_tokens)
        return sequence.slots(first, first + num_tokens)

    def prefill(self, sequence: KVSequence, num_tokens: int) -> None:
        """Do what `extend` does without computing the slots."""
        self._check_live(sequence)
        left = sequence.num_prompt_tokens - sequence.num_tokens
        num_tokens = as_int("num_tokens", num_tokens, 1)
        if num_tokens > left:
            raise ValueError(f"num_tokens ({num_tokens}) must be at most the prompt's remaining {left}")
        self._write([sequence], num_tokens)
        self._after_prefill(sequence)

    def prefill_slots(self, sequence: KVSequence) -> NDArray[np.int64]:
        """Return the slots of the first chunk, int64 [n]: what admission did not find in the cache."""
        return sequence.slots(sequence.hit_tokens, sequence.num_tokens)

    # ---------------------------------------------------------------- decode

    def batch(self) -> Batch:
        """Return an empty batch, with which `append` costs per block started, not per sequence."""
        return Batch(self.tokens_per_block, self.sequences)

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
        advance or, with OutOfBlocks, none.
        """
        firsts = [sequence.num_tokens for sequence in sequences]
        self.advance(sequences, num_tokens, tokens)
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
        """Do what `append` does without computing the slots."""
        num_tokens = as_int("num_tokens", num_tokens, 1)
        rows = _rows(tokens, len(sequences), num_tokens)
        if rows is not None:
            for sequence in sequences:
                sequence.history.check_nameable()
        if isinstance(sequences, Batch):
            if sequences.live is not self.sequences:
                raise ValueError(f"a batch of {len(sequences)} sequences must be this manager's own")
            self._check_room(self.blocks_to_advance(sequences, num_tokens), sequences.unready)
            self._record(sequences, rows)
            self._advance_batch(sequences, num_tokens)
        else:
            self._check_writers(sequences)
            self._write(sequences, num_tokens, rows)

    def _check_writers(self, sequences: Sequence[KVSequence]) -> None:
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences ({len(sequences)}) must be distinct")
        for sequence in sequences:
            self._check_complete(sequence)
            if sequence.batch is not None:
                raise ValueError("sequences of a batch advance together: append to the batch")

    def _check_live(self, sequence: KVSequence) -> None:
        if sequence not in self.sequences:
            state = "released" if sequence.released else "another manager's"
            raise ValueError(f"{sequence} must not be {state}")

    def _check_complete(self, sequence: KVSequence) -> None:
        self._check_live(sequence)
        if sequence in self._prefilling:
            raise ValueError(f"{sequence} must have its prompt of {sequence.num_prompt_tokens} complete")

    def blocks_to_advance(self, sequences: Sequence[KVSequence], num_tokens: int = 1) -> int:
        """Return how many blocks `append` would take: growth and copies."""
        if isinstance(sequences, Batch):
            return sequences.growth(num_tokens) + self.tables.copies_needed(sequences.unready)
        return self._growth(sequences, num_tokens) + self.tables.copies_needed(sequences)

    def _growth(self, sequences: Sequence[KVSequence], num_tokens: int) -> int:
        size = self.tokens_per_block
        return sum(-(-(s.num_tokens + num_tokens) // size) - len(s.table) for s in sequences)

    def _check_room(self, needed: int, writers: Iterable[KVSequence]) -> None:
        """Raise, before anything changes, if blocks are lacking or a copy would read what is yet to come."""
        if needed > self.pool.available:
            raise OutOfBlocks(needed, self.pool.available)
        if len(self.tables.copies):
            for sequence in writers:
                tail = self.tables.shared_tail(sequence)
                if tail is not None and self.tables.copies.is_destination(tail):
                    raise ValueError(f"block {tail} is still to be copied into: take pending_copies() first")

    def _write(
        self, sequences: Sequence[KVSequence], num_tokens: int, rows: list[Sequence[int]] | None = None
    ) -> None:
        self._check_room(self.blocks_to_advance(sequences, num_tokens), sequences)
        self._record(sequences, rows)
        size = self.tokens_per_block
        # Nothing is indexed before all have their blocks: what one puts into the index can hang on another's
        # last block, or repeat an evictable block that the others counted on.
        for sequence in sequences:
            self.tables.own_tail(sequence)
        for sequence in sequences:
            tokens = sequence.num_tokens + num_tokens
            growth = -(-tokens // size) - len(sequence.table)
            if growth:
                sequence.table.extend(self.pool.take(growth))
                self._logical_blocks += growth
            sequence.num_tokens = tokens
            self._logical_tokens += num_tokens
        for sequence in sequences:
            full = sequence.num_tokens // size
            if full > sequence.anchor.end:
                self.tables.index_full(sequence, full)

    def _record(self, sequences: Sequence[KVSequence], rows: list[Sequence[int]] | None) -> None:
        if rows is not None:
            for sequence, row in zip(sequences, rows, strict=True):
                sequence.history.record(sequence.num_tokens, row)

    def _advance_batch(self, batch: Batch, num_tokens: int) -> None:
        for sequence in batch.unready:
            self.tables.own_tail(sequence)
        batch.unready.clear()
        pool = self.pool
        # A block that fills can repeat an evictable one, which is then held. Where that could leave too few for
        # the ticks to come, all blocks are taken before anything fills.
        stock = None
        if num_tokens > 1:
            growth = batch.growth(num_tokens)
            if growth + min(batch.fills(num_tokens), pool.num_evictable) > pool.available:
                stock = iter(pool.take(growth))
        for bucket, starts in batch.events(num_tokens):
            if starts:
                blocks = pool.take(len(bucket)) if stock is None else islice(stock, len(bucket))
                for sequence, block in zip(bucket, blocks, strict=True):
                    sequence.table.append(block)
                self._logical_blocks += len(bucket)
            else:
                for sequence in bucket:
                    self.tables.index_last(sequence)
        batch.tick += num_tokens
        self._logical_tokens += num_tokens * len(batch)

    def pending_copies(self) -> NDArray[np.int32]:
        """Return and forget the copies to execute before this step's writes, int32 [n, 3].

        Columns: source block, destination block, valid tokens (the slots to copy). They may run in parallel.
        """
        return self.tables.copies.take()

    # ---------------------------------------------------------------- fork, truncate, release

    def fork(self, sequence: KVSequence, n: int = 1) -> list[KVSequence]:
        """Return `n` sequences that share all blocks of `sequence` and go on by themselves. Takes no block."""
        n = as_int("n", n, 1)
        self._check_live(sequence)
        tokens = sequence.num_tokens
        self.tables.share(sequence, n)
        children = []
        for _ in range(n):
            child = KVSequence(
                sequence.history.diverge(max(tokens, sequence.num_prompt_tokens)),
                sequence.salt,
                sequence.num_prompt_tokens,
                sequence.anchor,
                sequence.table[:],
            )
            child.twins = set(sequence.twins)
            child.hit_blocks = sequence.hit_blocks
            child.num_tokens = tokens
            self.sequences[child] = None
            if sequence in self._prefilling:
                self._prefilling[child] = None
            children.append(child)
        self._logical_blocks += n * len(sequence.table)
        self._logical_tokens += n * tokens
        if sequence.batch is not None:
            sequence.batch.unready[sequence] = None
        return children

    def truncate(self, sequence: KVSequence, num_tokens: int) -> None:
        """Forget all tokens of a sequence beyond the first `num_tokens`; what follows will be other content.

        Its blocks beyond are given back, a partly kept one stays. Raises ValueError unless 1 ≤ num_tokens ≤
        the sequence's length, or while the sequence is in a batch or its prefill is incomplete.
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
        self._truncated = True
        size = self.tokens_per_block
        keep = -(-num_tokens // size)
        self.tables.free_private(sequence, keep)
        twin_kept = keep - 1 in sequence.twins and num_tokens % size != 0
        if twin_kept:  # it is about to be written: private again, and not the twin of anything
            sequence.twins.discard(keep - 1)
        self.tables.move_anchor(sequence, min(sequence.anchor.end, keep - twin_kept))
        self._logical_blocks -= len(sequence.table) - keep
        self._logical_tokens -= sequence.num_tokens - num_tokens
        del sequence.table[keep:]
        sequence.num_tokens = num_tokens
        sequence.history = sequence.history.diverge(num_tokens)
        sequence.num_prompt_tokens = min(sequence.num_prompt_tokens, num_tokens)

    def release(self, sequence: KVSequence) -> None:
        """Give a sequence's blocks back, the last first: cached ones become evictable, others free."""
        self._check_live(sequence)
        if sequence.batch is not None:
            sequence.batch.remove(sequence)
        self.tables.release(sequence)
        self._logical_blocks -= len(sequence.table)
        self._logical_tokens -= sequence.num_tokens
        self._note_prefilling(sequence, False)
        del self.sequences[sequence]
        sequence.released = True

    def reorder_beams(self, sequences: Sequence[KVSequence], parents: Sequence[int]) -> None:
        """Let beam i go on from beam parents[i]; beams that nobody goes on from end. Takes no block.

        sequences  the beams of one group, of equal length, all in the same batch or in none
        parents    [len(sequences)], each an index into `sequences`
        """
        if len(parents) != len(sequences):
            raise ValueError(
                f"parents ({len(parents)} of them) must be as many as sequences ({len(sequences)})"
            )
        if not all(0 <= parent < len(sequences) for parent in parents):
            raise ValueError(f"parents ({list(parents)}) must index the {len(sequences)} sequences")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences ({len(sequences)}) must be distinct")
        for sequence in sequences:
            self._check_complete(sequence)
        if len({(s.num_tokens, s.batch, s.salt) for s in sequences}) > 1:
            raise ValueError("sequences must have equal lengths and salts, and be in the same batch")
        heirs = {i: self.fork(sequences[p])[0] for i, p in enumerate(parents) if p != i}
        for i, heir in heirs.items():
            self._swap_state(sequences[i], heir)
            self.release(heir)  # it now holds what the beam held before
        for sequence in sequences:
            if sequence.batch is not None:
                sequence.batch.unready[sequence] = None

    @staticmethod
    def _swap_state(one: KVSequence, other: KVSequence) -> None:
        for name in ("history", "anchor", "table", "twins", "num_prompt_tokens", "hit_blocks"):
            mine, theirs = getattr(one, name), getattr(other, name)
            setattr(one, name, theirs)
            setattr(other, name, mine)

    def _after_prefill(self, sequence: KVSequence) -> None:
        full = sequence.num_tokens // self.tokens_per_block
        if full > sequence.anchor.end:
            self.tables.index_full(sequence, full)
        self._note_prefilling(sequence, sequence.num_tokens < sequence.num_prompt_tokens)

    def _note_prefilling(self, sequence: KVSequence, is_prefilling: bool) -> None:
        if is_prefilling == (sequence in self._prefilling):
            return
        self.index.version += 1  # what others miss is now in flight, or no longer
        if is_prefilling:
            self._prefilling[sequence] = None
        else:
            del self._prefilling[sequence]

    def _count(self, match: PrefixMatch) -> None:
        counts = self._lookups
        counts.query_tokens += match.content.num_prompt_tokens
        counts.query_blocks += match.query_blocks
        counts.hit_tokens += match.hit_tokens
        counts.hit_blocks += match.hit_blocks
        for cause, blocks in match.miss_blocks.items():
            counts.miss_blocks[cause] += blocks

    # ---------------------------------------------------------------- views

    def block_tables(self, sequences: Sequence[KVSequence]) -> NDArray[np.int32]:
        """Return int32 [len(sequences), longest table]; entries past a sequence's blocks are −1."""
        longest = max((len(s.table) for s in sequences), default=0)
        tables = np.full((len(sequences), longest), -1, dtype=np.int32)
        for row, sequence in zip(tables, sequences, strict=True):
            row[: len(sequence.table)] = sequence.table
        return tables

    def stats(self) -> CacheStats:
        """Return a snapshot of counters and block states. O(blocks shared by a fork)."""
        pool, counts = self.pool, self._lookups
        return CacheStats(
            num_blocks=pool.num_blocks,
            tokens_per_block=self.tokens_per_block,
            free_blocks=pool.num_free,
            evictable_blocks=pool.num_evictable,
            referenced_blocks=pool.num_referenced,
            in_transfer_blocks=len(pool.limbo),
            logical_blocks=self._logical_blocks,
            logical_tokens=self._logical_tokens,
            kv_tokens=self.kv_tokens,
            query_tokens=counts.query_tokens,
            query_blocks=counts.query_blocks,
            hit_tokens=counts.hit_tokens,
            hit_blocks=counts.hit_blocks,
            miss_blocks=dict(counts.miss_blocks),
            evicted_blocks=pool.evicted_blocks,
            cow_copies=self.tables.cow_copies,
            cow_tokens=self.tables.cow_tokens,
        )

    @property
    def kv_tokens(self) -> int:
        """Return the written slots of referenced blocks, each counted once.

        Only last blocks are partly written. Where tables share them, a block is written as far as its
        furthest holder goes.
        """
        size, pool = self.tokens_per_block, self.pool
        unwritten = self._logical_blocks * size - self._logical_tokens
        if pool.shared or self._truncated:
            least: dict[int, int] = {}
            for sequence in self.sequences:
                block, rest = sequence.table[-1], len(sequence.table) * size - sequence.num_tokens
                if rest and not self.tables.tail_is_cached(sequence):
                    least[block] = min(least.get(block, size), rest)
            for sequence in self.sequences:  # one that was truncated can end in what is another's full twin
                for position in sequence.twins:
                    least.pop(sequence.table[position], None)
            unwritten = sum(least.values())
        return pool.num_referenced * size - unwritten

    def check_invariants(self) -> None:
        """Recount everything from tables and tree. Raises AssertionError where a counter disagrees. Slow."""
        check_invariants(self)


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
        if min(row) < 0:
            raise ValueError(f"tokens ({min(row)}) must not be negative")
    return rows


def _refuse_unserved(config: CacheConfig) -> None:
    """Raise ValueError for what the configuration can say and this manager cannot do."""
    unserved: dict[str, object] = {
        "enable_partial_reuse": False,
        "host_cache_bytes": 0,
        "window": None,
        "num_sinks": 0,
    }
    for name, served in unserved.items():
        if getattr(config, name) != served:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be {served}: the manager does not serve it"
            )
