"""Admission: from a prompt to a sequence whose prompt is computed."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from allocator.checks import as_int
from allocator.coasting import Coasting
from allocator.content import Content
from allocator.event_log import ADMITTED, HIT, NOBODY, TAKEN
from allocator.matching import PrefixMatch, find_match, no_match
from allocator.pool import OutOfBlocks
from allocator.prefix import Extent
from allocator.quotas import Quotas, Tenant
from allocator.retention import RetentionConfig
from allocator.sequence import KVSequence
from allocator.windowed_matching import find_windowed_match


class Admission(Coasting):
    """The part of the manager that looks prompts up, admits them, and computes them chunk by chunk."""

    def lookup(self, content: Content, salt: Hashable = "") -> PrefixMatch:
        """Return which blocks of a prompt are cached, and why the others are not. Changes nothing.

        Only sequences with an equal `salt` share blocks. A full hit still leaves the last token to compute. With
        partial reuse, the hits can end within a block, but not in what has been written since `pending_copies` was last
        asked for: see allocator.partial. In a windowed cache, a prompt hits as far as what the next query attends to is
        cached. O(blocks of the prompt), compared as bytes. Raises ValueError for what is no Content.
        """
        try:
            unheard = content.is_unheard()
        except AttributeError:
            raise ValueError(f"content ({content!r}) must be a Content, a TokenContent for example") from None
        if not self.reuse or unheard:
            return no_match(self.index, content, salt, self.tokens_per_block, self.reuse)
        if self.windowed is not None:
            return find_windowed_match(
                self.windowed.index,
                content,
                salt,
                self.windowed.window,
                self._prefilling,
                self.pool.partial,
            )
        return find_match(
            self.index, content, salt, self.tokens_per_block, self._prefilling, self.pool.partial
        )

    def in_flight(self, match: PrefixMatch) -> KVSequence | None:
        """Return a sequence that is about to compute the first block that a prompt misses, or None.

        Of several, the one that computes most of what the prompt needs: to wait for it may be cheaper than to
        compute the same beside it. A match that is no longer current is looked up again.
        """
        if not self.is_current(match):
            match = self.lookup(match.content, match.salt)
        return match.computed_by

    def is_current(self, match: PrefixMatch) -> bool:
        """Return whether looking up again would give the same match. O(1)."""
        return match.index is self.index and match.version == self.index.version

    def blocks_needed(self, match: PrefixMatch, num_tokens: int) -> int:
        """Return by how many blocks admitting `num_tokens` beyond the hits lessens what is available.

        O(1), averaged over calls, see PrefixMatch. A match that is no longer current is looked up again. Raises
        ValueError for a negative num_tokens.
        """
        if not self.is_current(match):
            match = self.lookup(match.content, match.salt)
        size = self.tokens_per_block
        if type(num_tokens) is not int or num_tokens < 0:
            num_tokens = as_int("num_tokens", num_tokens, 0)
        needed = -(-(match.hit_tokens + num_tokens) // size) - match.hit_blocks
        return needed + self._blocks_tied(match) if match.hit_tokens else needed

    def _blocks_tied(self, match: PrefixMatch) -> int:
        """Return how many blocks a match's hits make unavailable, or need beside those that are missed."""
        blocks = match.evictable_blocks
        if match.partial is not None:
            blocks += match.copied_blocks
        return blocks if self.pool.tier is None else blocks + match.host_blocks

    def can_admit(self, match: PrefixMatch, num_tokens: int, tenant: Hashable = None) -> bool:
        """Return whether `admit` would find the blocks it needs, and the tenant's quota allow them.

        O(1), averaged over calls, as `blocks_needed`, and with the same error.
        """
        if not self.is_current(match):
            match = self.lookup(match.content, match.salt)
        if tenant is not None and self.quotas is not None:
            quota, used = self.quotas[tenant].quota, self.quotas[tenant].blocks
            if quota is not None and used + self._entries(match, num_tokens) > quota:
                return False
        return self.blocks_needed(match, num_tokens) <= self.pool.available

    def _entries(self, match: PrefixMatch, num_tokens: int) -> int:
        """Return the length of the table with which a sequence starts."""
        entries = -(-(match.hit_tokens + num_tokens) // self.tokens_per_block)
        return entries if self.windowed is None else entries - match.hit_blocks + len(match.path)

    def remaining_blocks(self, sequence: KVSequence, final_tokens: int, beam_width: int = 1) -> int:
        """Return how many blocks a sequence still takes until it holds `final_tokens`. O(1).

        With `beam_width` above 1, the sequence stands for so many that will be forked from it once its prompt is
        computed, and go on each by itself. The copy of a last block that it shares now is counted. In a windowed
        cache, where blocks also leave, it is by how many its table may grow, if it decodes token by token. Raises
        ValueError if the sequence is not running, or is longer than that already, or for a beam_width below 1.
        """
        self._check_live(sequence)
        final_tokens = as_int("final_tokens", final_tokens, max(sequence.num_tokens, 1))
        size = self.tokens_per_block
        end = -(-final_tokens // size)
        fork_at = max(sequence.num_prompt_tokens, sequence.num_tokens)
        shared = end if beam_width == 1 or final_tokens <= fork_at else fork_at // size
        if self.windowed is not None and self.windowed.window.left(final_tokens):
            end = self.windowed.window.blocks_held(final_tokens)
            shared = min(shared, self.windowed.window.sink_blocks)
        blocks = shared + as_int("beam_width", beam_width, 1) * (end - shared) - len(sequence.table)
        if self.windowed is not None:
            blocks = max(blocks, 0)
        if final_tokens > sequence.num_tokens:
            blocks += self.tables.copies_needed([sequence])
        return blocks

    def admit(
        self,
        content: Content,
        num_tokens: int,
        match: PrefixMatch | None = None,
        salt: Hashable = "",
        *,
        readmission: bool = False,
        tenant: Hashable = None,
        retention: RetentionConfig | None = None,
        now: int | None = None,
    ) -> KVSequence:
        """Start a sequence: reference the blocks found, and take those for the first prefill chunk.

        num_tokens   tokens of the chunk, beyond the hits; from 1 to what the prompt has left
        match        what `lookup(content, salt)` returned, to save looking up again
        readmission  the sequence was preempted: it does not count in the hit statistics again
        tenant       whose quota its blocks count against, see `set_quota`; None for nobody's
        retention    how the blocks are to be kept once nobody references them
        now          the caller's time, if it has moved on

        The chunk's full blocks can be hit from now on. O(extents found, and blocks taken).
        Raises OutOfBlocks, QuotaExceeded, or ValueError for a chunk that does not fit the prompt, a match of another
        content or salt, a retention that is no RetentionConfig, or a time that runs back.
        """
        index = self.index
        if match is None:
            match = self.lookup(content, salt)
        elif match.content is not content or match.salt != salt:
            raise ValueError("match must come from a lookup of the same content object and salt")
        elif match.version != index.version or match.index is not index:
            match = self.lookup(content, salt)
        if type(num_tokens) is not int or num_tokens < 1:
            num_tokens = as_int("num_tokens", num_tokens, 1)
        size, pool, events = self.tokens_per_block, self.pool, self.events
        prompt, hit_blocks, hit_tokens = content.num_prompt_tokens, match.hit_blocks, match.hit_tokens
        tokens = hit_tokens + num_tokens
        if tokens > prompt:
            left = prompt - hit_tokens
            raise ValueError(f"num_tokens ({num_tokens}) must be at most the prompt's remaining {left}")
        if retention is not None and not isinstance(retention, RetentionConfig):
            raise ValueError(f"retention ({retention!r}) must be a RetentionConfig")
        if now is not None:
            now = as_int("now", now, pool.now)
        new_blocks = -(-tokens // size) - hit_blocks
        needed = new_blocks + self._blocks_tied(match) if hit_tokens else new_blocks
        if needed > pool.available:
            raise OutOfBlocks(needed, pool.available)
        account = None
        if tenant is not None:
            account = self._account(tenant)
            account.require(self._entries(match, num_tokens))
        if now is not None:
            self._pass_time(now)

        history = content.history(size)
        if self.reuse:
            root: Extent = index.root(content.family(), salt, history.key_width)
        else:
            # Each sequence has a root of its own, and nothing is ever found: only a fork has to know which full
            # blocks are shared, and has them indexed before.
            root = index.root(None, history, history.key_width)
        root.references += 1
        number = NOBODY if events is None else events.new_sequence()
        if hit_tokens:
            anchor, table = self._take_hits(match, root, number, not readmission)
            table.extend(pool.take(new_blocks - (match.partial is not None)))
        else:
            if events is not None:
                events.add(ADMITTED, number, value=prompt)
            anchor, table = root, pool.take(new_blocks)

        sequence = KVSequence(history, salt, prompt, anchor, table, tokens)
        sequence.hit_blocks = hit_blocks
        if match.partial is not None:
            sequence.partial_tokens = match.partial.num_tokens
        if self.windowed is not None:
            self.windowed.begin(sequence, root, (extent for extent, _ in match.path), hit_blocks * size)
            self.logical_tokens -= sequence.left * size
        if events is not None:
            sequence.number = number
            held = len(table) - new_blocks + (match.partial is not None)
            events.add_blocks(TAKEN, number, -1, num_tokens, table[held:])
        if retention is not None:
            sequence.retention = plan = retention.plan(prompt, size)
            if plan is not None:
                self.tables.retain_held(sequence, plan)
        self.sequences[sequence] = None
        self.logical_blocks += len(table)
        if account is not None:
            sequence.tenant = account
            account.blocks += len(table)
        self.logical_tokens += tokens
        full = tokens // size
        if full > hit_blocks and self.indexes_full:
            self.tables.index_full(sequence, full)
        if tokens < prompt:
            self._note_prefilling(sequence, True)
        if not readmission:
            self._lookups.count(match)
        return sequence

    def _take_hits(
        self, match: PrefixMatch, root: Extent, number: int, count: bool
    ) -> tuple[Extent, array[int]]:
        """Reference what a match found; return the deepest extent, and the blocks.

        number  of the sequence in the event log
        count   whether hits on the host count
        """
        pool, anchor, events = self.pool, root, self.events
        table = array("i")
        arriving: list[Extent] = []
        for extent, blocks in match.path:
            if blocks * extent.width < len(extent.keys):
                extent = self.pool.split(extent, blocks)
            if not extent.ids:
                arriving.append(extent)
                continue
            pool.hit(extent)
            table.extend(extent.ids)
            anchor = extent
        if arriving and pool.tier is not None:
            if self.windowed is None:
                table.extend(pool.tier.onboard(arriving, count=count))
                anchor = arriving[-1]
            else:
                source = None if match.partial is None else match.partial.extent
                if source is not None:  # the GPU has it, behind what it has not: lest it be evicted now
                    pool.acquire(source)
                pool.tier.onboard(arriving, count=count)
                if source is not None:
                    pool.drop(source)
                # There, what comes from the host may lie before what the GPU has.
                anchor, table = match.path[-1][0], array("i", [node.ids[0] for node, _ in match.path])
        if events is not None:
            events.add(ADMITTED, number, value=match.content.num_prompt_tokens)
            if table:
                events.add_blocks(HIT, number, -1, match.hit_blocks * self.tokens_per_block, table)
        if match.partial is not None:
            # The cut above has left the block as the first one of its extent.
            table.append(self.tables.reuse_part(match.partial.extent, match.partial.num_tokens, number))
        return anchor, table

    def set_quota(self, tenant: Hashable, num_blocks: int | None) -> None:
        """Let a tenant's sequences have at most `num_blocks` table entries; None lifts the quota.

        A call that would exceed it raises QuotaExceeded; what exceeds it when it is set stays. Shared blocks count for
        each table. Raises ValueError for a negative quota.
        """
        if self.quotas is None:
            self.quotas = Quotas()
            self._note_features()
        self.quotas.set(tenant, num_blocks)

    def tenant_blocks(self, tenant: Hashable) -> int:
        """Return how many table entries a tenant's sequences have. O(1)."""
        return 0 if self.quotas is None else self.quotas[tenant].blocks

    def _account(self, tenant: Hashable) -> Tenant:
        if self.quotas is None:
            self.quotas = Quotas()
            self._note_features()
        return self.quotas[tenant]

    def extend(self, sequence: KVSequence, num_tokens: int) -> NDArray[np.int64]:
        """Take blocks for the next prefill chunk and return its slots, int64 [num_tokens].

        A slot is block · tokens_per_block + offset. The chunk's full blocks can be hit from now on. Raises OutOfBlocks,
        QuotaExceeded, or ValueError for more tokens than the prompt has left, or less than 1.
        """
        first = sequence.num_tokens
        self.prefill(sequence, num_tokens)
        return sequence.slots(first, first + num_tokens)

    def prefill(self, sequence: KVSequence, num_tokens: int) -> None:
        """Do what `extend` does, with the same errors, without computing the slots."""
        # One block a call is what allocators are compared by, so this way is short: nothing is called in vain.
        if sequence not in self.sequences:
            self._check_live(sequence)
        if type(num_tokens) is not int or num_tokens < 1:
            num_tokens = as_int("num_tokens", num_tokens, 1)
        first = sequence.base_tokens if sequence.batch is None else sequence.num_tokens
        left = sequence.num_prompt_tokens - first
        if num_tokens > left:
            if left <= 0:
                raise ValueError(
                    f"{sequence} must not have its prompt of {sequence.num_prompt_tokens} complete"
                )
            raise ValueError(f"num_tokens ({num_tokens}) must be at most the prompt's remaining {left}")
        copies = first % self.tokens_per_block and self.tables.borrowers((sequence,))
        if copies or sequence.tenant is not None or self.windowed is not None:
            self._write([sequence], num_tokens)
        else:  # no block to copy before it is written, and no quota: the pool says whether there is room
            self._grow(sequence, num_tokens)
        if self.indexes_full:
            self._index_prompt(sequence, first + num_tokens)
            self._note_prefilling(sequence, num_tokens < left)
        elif num_tokens == left:
            self._note_prefilling(sequence, False)

    def prefill_slots(self, sequence: KVSequence) -> NDArray[np.int64]:
        """Return the slots of what a sequence has beyond its hits, int64 [n]: after `admit`, of the first chunk."""
        return sequence.slots(sequence.hit_tokens, sequence.num_tokens)

    def _index_prompt(self, sequence: KVSequence, num_tokens: int) -> None:
        full = num_tokens // self.tokens_per_block
        if full > sequence.anchor.end:
            self.tables.index_full(sequence, full)
        elif sequence.retention is not None:
            # The prompt may be complete with this, and what is decoded is to be kept in another way.
            sequence.anchor.sealed = True

    def _note_prefilling(self, sequence: KVSequence, is_prefilling: bool) -> None:
        was_prefilling = sequence in self._prefilling
        if is_prefilling != was_prefilling:
            self.index.version += 1  # what others miss is now in flight, or no longer
        if is_prefilling:
            self._prefilling.put(sequence)
        elif was_prefilling:
            self._prefilling.discard(sequence)
