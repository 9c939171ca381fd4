"""KVCacheManager: the allocator's one public face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from allocator.accounting import blocks_in_no_table
from allocator.checks import as_int
from allocator.config import CacheConfig
from allocator.invariants import check_invariants
from allocator.matching import PrefixMatch
from allocator.pool import OutOfBlocks
from allocator.quotas import QuotaExceeded
from allocator.sequence import KVSequence
from allocator.stats import CacheStats
from allocator.swapping import Swapping

__all__ = ["CacheStats", "KVCacheManager", "KVSequence", "OutOfBlocks", "PrefixMatch", "QuotaExceeded"]


class KVCacheManager(Swapping):
    """A paged KV cache: a pool of blocks, the tables of running sequences, and the cache of finished ones.

    num_blocks        blocks in the pool
    tokens_per_block  a power of two
    config            block reuse on or off, eviction policy; default CacheConfig()
    policy            an EvictionPolicy of your own, in place of the one that `config` names
    ghost_blocks      how many evicted blocks to remember, to explain misses; default 16 for each block
    quotas            tenant -> most blocks that the tables of its sequences may have; see `set_quota`
    lifetimes         collect how long blocks live, in units of `now`
    events            keep a log, `events`, from which the state at any point can be had: see allocator.events
    num_host_blocks   blocks in host memory, for evicted content and swapped-out sequences; default none. Needed
                      where config.host_cache_bytes asks for them, as the manager knows no bytes
                      (MemoryBudget.num_host_blocks says how many)

    Raises ValueError where an argument, or a combination of them, breaks a rule.

    A life: `lookup` → `admit` (first prefill chunk) → `extend` (further chunks) → `append` (decode steps) →
    `release`. In a step, `pending_swaps` (with host blocks), then `pending_copies`, then the writes are executed.

    to admit      lookup, in_flight, is_current, blocks_needed, can_admit, admit, prefill_slots
    to compute    extend, append; of sequences that decode together, batch; the same without slots: prefill, advance
    to share      fork, reorder_beams, truncate
    to end        release; how many blocks that frees: reclaimable_blocks
    to execute    block_tables, context_lens, pending_copies; pending_swaps, transfers_done, is_arriving
    to plan       available_blocks, remaining_blocks, blocks_to_advance, room; of a window, steps_within and
                  ticks_until_leave
    to swap       swap_out, swap_in, blocks_to_swap_out, blocks_to_swap_in, host_tier
    tenants       set_quota, tenant_blocks
    time          now, next_expiry
    to look at    stats, num_blocks, logical_blocks, logical_tokens, kv_tokens, saved_blocks, events, check_invariants
    simulators    coast, catch_up, writes_in_place, end_step

    Lengths are tokens, sizes are blocks, and times are the caller's, in any integer unit. A slot is
    block · tokens_per_block + offset.

    Whatever changes a sequence raises ValueError if it has been released, is another manager's, or is swapped out
    (but for swap_in and release). Calls that need blocks raise OutOfBlocks when the pool has too few, or
    QuotaExceeded, a kind of OutOfBlocks, when a tenant has, and have then changed nothing.

    The manager has no clock: recency is the order of calls. `now` dates what is collected and logged, and ends
    retentions; set it, or pass it to `admit`, as time goes on.
    """

    @classmethod
    def contiguous(cls, num_sequences: int, max_seq_len: int, *, events: bool = False) -> KVCacheManager:
        """Return the cache of an engine without paging: every sequence reserves max_seq_len tokens in one piece.

        That is a pool whose blocks are whole sequences, and in which nothing is reused. Raises ValueError if either
        number is less than 1.
        """
        max_seq_len = as_int("max_seq_len", max_seq_len, 1)
        manager = cls(num_sequences, 1, CacheConfig(enable_block_reuse=False))
        manager.tokens_per_block = manager.tables.tokens_per_block = max_seq_len
        if events:
            manager._start_log()
        return manager

    @property
    def num_blocks(self) -> int:
        """Return the pool's size, in blocks."""
        return self.pool.num_blocks

    @property
    def available_blocks(self) -> int:
        """Return how many blocks could be taken: free and evictable ones."""
        return self.pool.available

    @property
    def saved_blocks(self) -> int:
        """Return how many blocks sharing saves: those of all tables, less the blocks that are in any of them."""
        return self.logical_blocks - self.pool.num_referenced + blocks_in_no_table(self.tables)

    @property
    def now(self) -> int:
        """The caller's time, in the caller's unit, from 0. Setting it raises ValueError if it runs back."""
        return self.pool.now

    @now.setter
    def now(self, value: int) -> None:
        self._pass_time(as_int("now", value, self.pool.now))

    def next_expiry(self) -> int | None:
        """Return the time at which the next retention of evictable blocks is over; None if none will be.

        Up to then, passing time changes nothing. O(log extents), averaged over calls.
        """
        return self.pool.expiries.next()

    def block_tables(self, sequences: Sequence[KVSequence]) -> NDArray[np.int32]:
        """Return the block tables of sequences, int32 [len(sequences), longest table], −1 past a sequence's blocks.

        Block i of a row holds tokens i · tokens_per_block and following. O(entries).
        In a windowed cache a row lacks the blocks that have left, and is to be read with `context_lens`. Raises
        ValueError for sequences that are not running.
        """
        for sequence in sequences:
            if sequence not in self.sequences:
                self._check_live(sequence)
        longest = max((len(s.table) for s in sequences), default=0)
        tables = np.full((len(sequences), longest), -1, dtype=np.int32)
        for row, sequence in zip(tables, sequences, strict=True):
            row[: len(sequence.table)] = sequence.table
        return tables

    def context_lens(self, sequences: Sequence[KVSequence]) -> NDArray[np.int32]:
        """Return int32 [len(sequences)]: how many keys lie in each row of `block_tables`, this step's included.

        These are all tokens of a sequence or, in a windowed cache, those whose blocks have not left; windows and
        sinks are masked as if they were all (see KVSequence).
        """
        return np.array([sequence.context_len for sequence in sequences], dtype=np.int32)

    def stats(self) -> CacheStats:
        """Return a snapshot of counters and block states. O(blocks shared by a fork)."""
        pool, counts = self.pool, self._lookups
        in_transfer = pool.num_in_transfer
        referenced = pool.num_blocks - pool.available - in_transfer
        kv_tokens, aside = self._kv_tokens(referenced), blocks_in_no_table(self.tables)
        return CacheStats(
            num_blocks=pool.num_blocks,
            tokens_per_block=self.tokens_per_block,
            free_blocks=pool.num_free,
            evictable_blocks=pool.num_evictable,
            referenced_blocks=referenced,
            in_transfer_blocks=in_transfer,
            logical_blocks=self.logical_blocks,
            logical_tokens=self.logical_tokens,
            saved_blocks=self.logical_blocks - referenced + aside,
            saved_tokens=self.logical_tokens - kv_tokens + aside * self.tokens_per_block,
            kv_tokens=kv_tokens,
            query_tokens=counts.query_tokens,
            query_blocks=counts.query_blocks,
            hit_tokens=counts.hit_tokens,
            hit_blocks=counts.hit_blocks,
            miss_blocks=dict(counts.miss_blocks),
            evicted_blocks=pool.evicted_blocks,
            cow_copies=self.tables.cow_copies,
            cow_tokens=self.tables.cow_tokens,
            partial_hits=counts.partial_hits,
            partial_copies=self.tables.partial_copies,
            partial_copied_tokens=self.tables.partial_copied_tokens,
            stolen_blocks=self.tables.stolen_blocks,
            host=None if pool.tier is None else pool.tier.stats(),
        )

    @property
    def kv_tokens(self) -> int:
        """Return the written slots of referenced blocks, each counted once.

        Only last blocks are partly written. Where tables share them, a block is written as far as its
        furthest holder goes.
        """
        return self._kv_tokens(self.pool.num_referenced)

    def _kv_tokens(self, referenced: int) -> int:
        size, pool = self.tokens_per_block, self.pool
        unwritten = self.logical_blocks * size - self.logical_tokens
        if pool.shared or self._truncated:
            least: dict[int, int] = {}
            for sequence in self.sequences:
                block, rest = sequence.table[-1], -sequence.num_tokens % size
                if rest and not self.tables.tail_is_cached(sequence):
                    least[block] = min(least.get(block, size), rest)
            for sequence in self.sequences:  # one that was truncated can end in what is another's full twin
                for position in sequence.twins:
                    least.pop(sequence.table[sequence.index_of(position)], None)
            unwritten = sum(least.values())
        return referenced * size - unwritten

    def check_invariants(self) -> None:
        """Recount everything from tables and tree. Raises AssertionError where a counter disagrees.

        O(blocks and tokens): for tests.
        """
        check_invariants(self)
