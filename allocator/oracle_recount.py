"""What must be so, by recounting: which blocks are cached, free or hit, what sequences read, what counters say.

It recounts from the shadow of the pool, the tables and what is cached, and never asks how the manager came by it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from allocator.manager import PrefixMatch
from allocator.oracle_partial import expected_part
from allocator.oracle_tiers import HostOracle
from allocator.oracle_windows import WindowOracle
from allocator.sequence import KVSequence
from allocator.shadow import Prompt, ShadowKV, State


class Recount(WindowOracle):
    """The part of the oracle that looks at a manager and changes nothing.

    num_blocks, reuse, partial, window
                               what the manager was made with
    shadow, stories            what each slot holds, and what each running sequence has said
    writes                     of the step being scheduled: sequence, slots, and the histories to stand there
    copies, copied_tokens      in all copy lists so far
    queried_…, hit_…           tokens and blocks of all lookups that were admitted
    """

    manager: Any
    num_blocks: int
    reuse: bool
    partial: str
    shadow: ShadowKV
    host: HostOracle
    writes: list[tuple[KVSequence, list[int], list[State]]]
    copies: int
    copied_tokens: int
    queried_tokens: int
    queried_blocks: int
    hit_tokens: int
    hit_blocks: int

    @abstractmethod
    def cached_blocks(self) -> set[int]:
        """Return the blocks that a lookup could find, or that full blocks of running sequences are known by."""

    @property
    def settled(self) -> bool:
        """Return whether no step is being scheduled, so that the shadow knows what is cached."""
        return not self.writes and not self.host.pending

    def table(self, sequence: KVSequence) -> list[int]:
        """Return a sequence's block table."""
        return list(map(int, sequence.block_table))

    def cached_states(self) -> dict[State, int]:
        """Return which history each cached block ends. Only between steps."""
        found: dict[State, int] = {}
        for block in self.cached_blocks():
            state = self.shadow.block(block)
            assert state, f"block {block} is cached, but does not hold one prefix"
            assert state not in found or not self.reuse, f"blocks {block} and {found[state]} cache the same"
            found[state] = block
        return found

    def available(self) -> tuple[int, int]:
        """Recount (free, evictable) from tables and content. Only between steps, and with nothing in flight."""
        tables = {block for sequence in self.stories for block in self.table(sequence)}
        held = self.held_states()
        cached = self.cached_blocks()
        idle = [block for block in cached - tables if self.shadow.block(block) not in held]
        return self.num_blocks - len(tables | cached | self.host.gpu_ends()), len(idle)

    def longest_hit(self, prompt: Prompt, salt: Hashable) -> tuple[int, list[int | None]]:
        """Return how many blocks a lookup has to hit, and those of them it needs, None for one on the host.

        Only between steps.
        """
        if not self.reuse:
            return 0, []
        cached, on_host = self.cached_states(), self.host.states()
        states = self.shadow.states(salt, prompt.tokens[: prompt.num_tokens - 1])[self.size - 1 :: self.size]
        for depth in range(len(states), 0, -1):
            needed = self.attended.blocks(depth * self.size, depth * self.size)
            if all(states[block] in cached or states[block] in on_host for block in needed):
                return depth, [cached.get(states[block]) for block in needed]
        return 0, []

    def check_match(self, prompt: Prompt, salt: Hashable, match: PrefixMatch) -> None:
        """Compare a fresh match with what is really there."""
        assert match.query_blocks == -(-prompt.num_tokens // self.size)
        assert match.hit_tokens == match.hit_blocks * self.size + match.partial_tokens < prompt.num_tokens
        assert 0 <= match.partial_tokens < self.size
        assert match.hit_blocks + sum(match.miss_blocks.values()) == match.query_blocks
        assert all(count > 0 for count in match.miss_blocks.values())
        if self.settled:
            depth, hits = self.longest_hit(prompt, salt)
            assert match.hit_blocks == depth, "not the longest hit"
            assert self.host.num_blocks == 0 or match.host_blocks == hits.count(None)
            part = expected_part(self, prompt, salt, match.hit_blocks)
            assert match.partial_tokens == part.num_tokens, f"{match.partial_tokens} tokens, not {part}"

    def compare_matches(self, match: PrefixMatch, found: PrefixMatch, chunk: int) -> None:
        """See that a match from before, current or not, answers as a fresh one of the same prompt."""
        manager = self.manager
        assert manager.blocks_needed(match, chunk) == manager.blocks_needed(found, chunk)
        assert manager.can_admit(match, chunk) == manager.can_admit(found, chunk)
        if manager.is_current(match):
            assert match.evictable_blocks == found.evictable_blocks
            assert match.host_blocks == found.host_blocks

    def copies_due(self, writers: Sequence[KVSequence]) -> tuple[int, int]:
        """Return the fewest and the most copies that a write by these sequences can need.

        A partly written last block has to be left while another table names it; of all the holders of one
        that is not cached, the last may keep it. A cached one has to be left while other content hangs on it.
        """
        holders = Counter(block for s in self.stories for block in self.table(s))
        cached = self.cached_blocks()
        leaving: Counter[int] = Counter()
        least = most = 0
        for sequence in writers:
            if sequence.num_tokens % self.size == 0:
                continue
            tail = self.table(sequence)[-1]
            if tail not in cached:
                leaving[tail] += 1
            elif holders[tail] > 1 or self.has_heirs(tail, cached):
                least, most = least + 1, most + 1
            elif self.host.num_blocks:
                most += 1  # the host may hold what hangs below, or this very block
        private = sum(count - (count == holders[block]) for block, count in leaving.items())
        return least + private, most + private

    def has_heirs(self, block: int, cached: set[int]) -> bool:
        """Return whether cached blocks or running sequences build on what a cached block says."""
        if not self.reuse:  # equal content is not shared, and forks are seen in the tables
            return False
        state = self.shadow.block(block)
        if any(state in story.full_states() for story in self.stories.values()):
            return True
        return any(self.shadow.block_before(self.shadow.block(other)) == state for other in cached)

    def check_reads(self) -> None:
        """Let every sequence read all it said, and recount the blocks. Only between steps."""
        for sequence, story in self.stories.items():
            table = self.table(sequence)
            assert sequence.num_tokens == story.length
            positions = self.held_positions(sequence)
            assert len(table) == -(-len(positions) // self.size), (
                f"{sequence} holds other blocks than it needs"
            )
            found = self.shadow.read(table, len(positions))
            assert found == [story.states[p] for p in positions], f"{sequence} reads the KV of other tokens"
            if self.window is not None:
                self.check_window(sequence, found)
        self.cached_states()
        stats = self.manager.stats()
        free, evictable = self.available()
        assert stats.free_blocks == free
        if self.host.in_flight:
            assert evictable - self.host.most_held() <= stats.evictable_blocks <= evictable
        else:
            assert stats.evictable_blocks == evictable
            assert stats.in_transfer_blocks == 0
        self.host.check()
        assert stats.cow_copies + stats.partial_copies == self.copies
        assert stats.cow_tokens + stats.partial_copied_tokens == self.copied_tokens

    def check_counters(self) -> None:
        """Compare the counters with a recount."""
        stats = self.manager.stats()
        blocks = [
            stats.free_blocks,
            stats.evictable_blocks,
            stats.referenced_blocks,
            stats.in_transfer_blocks,
        ]
        assert sum(blocks) == stats.num_blocks == self.num_blocks
        assert self.manager.available_blocks == stats.free_blocks + stats.evictable_blocks
        tables = {sequence: self.table(sequence) for sequence in self.stories}
        assert stats.logical_blocks == sum(map(len, tables.values()))
        tokens = {sequence: len(self.held_positions(sequence)) for sequence in self.stories}
        assert stats.logical_tokens == sum(tokens.values())
        distinct = {block for table in tables.values() for block in table}
        assert stats.saved_blocks == stats.logical_blocks - len(distinct)
        written = {
            block * self.size + i: None
            for sequence, table in tables.items()
            for p, block in enumerate(table)
            for i in range(min(self.size, tokens[sequence] - p * self.size))
        }
        held = self.num_blocks - sum(blocks[:2]) - blocks[3]
        assert len(written) <= stats.kv_tokens <= held * self.size
        if held == len({slot // self.size for slot in written}) and not self.cached_blocks() & {
            table[-1] for s, table in tables.items() if self.stories[s].length % self.size
        }:
            assert stats.kv_tokens == len(written)
        assert (stats.query_tokens, stats.query_blocks) == (self.queried_tokens, self.queried_blocks)
        assert (stats.hit_tokens, stats.hit_blocks) == (self.hit_tokens, self.hit_blocks)
        assert sum(stats.miss_blocks.values()) == self.queried_blocks - self.hit_blocks
