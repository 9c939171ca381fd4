"""What must be so, by recounting: which blocks are cached, free or hit, what sequences read, what counters say.

It recounts from the shadow of the pool, the tables and what is cached, and never asks how the manager came by it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

from allocator.manager import PrefixMatch
from allocator.oracle_partial import expected_part
from allocator.oracle_tiers import HostOracle
from allocator.oracle_windows import WindowOracle
from allocator.sequence import KVSequence
from allocator.shadow import Prompt, ShadowKV, State
from allocator.stats import CacheStats


class Look:
    """What a manager shows at one moment, each thing looked up once: while it is looked at, nothing changes."""

    def __init__(self, oracle: Recount) -> None:
        self._oracle = oracle
        self.tables = {sequence: oracle.table(sequence) for sequence in oracle.stories}
        self.distinct = {block for table in self.tables.values() for block in table}
        self.cached = oracle.cached_blocks()

    @cached_property
    def stats(self) -> CacheStats:
        """Return what the manager counted."""
        stats: CacheStats = self._oracle.manager.stats()
        return stats

    @cached_property
    def positions(self) -> dict[KVSequence, list[int]]:
        """Return the positions that each sequence holds."""
        return {sequence: self._oracle.held_positions(sequence) for sequence in self.tables}

    @cached_property
    def states(self) -> dict[State, int]:
        """Return which history each cached block ends. Only between steps."""
        oracle, found = self._oracle, dict[State, int]()
        for block in self.cached:
            state = oracle.shadow.block(block)
            assert state, f"block {block} is cached, but does not hold one prefix"
            assert state not in found or not oracle.reuse, f"blocks {block} and {found[state]} cache the same"
            found[state] = block
        return found

    def available(self) -> tuple[int, int]:
        """Recount (free, evictable) from tables and content. Only between steps, and with nothing in flight."""
        oracle = self._oracle
        held = oracle.held_states()
        idle = [block for block in self.cached - self.distinct if oracle.shadow.block(block) not in held]
        return oracle.num_blocks - len(self.distinct | self.cached | oracle.host.gpu_ends()), len(idle)


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

    @property
    def knows_parts(self) -> bool:
        """Return whether it can be told which blocks a part could be taken of: not while transfers may hold some."""
        return self.partial != "steal" or not self.host.in_flight

    def table(self, sequence: KVSequence) -> list[int]:
        """Return a sequence's block table."""
        found: list[int] = sequence.block_table.tolist()
        return found

    def look(self) -> Look:
        """Return a look at the manager as it is now."""
        return Look(self)

    def cached_states(self) -> dict[State, int]:
        """Return which history each cached block ends. Only between steps."""
        return self.look().states

    def available(self) -> tuple[int, int]:
        """Recount (free, evictable) from tables and content. Only between steps, and with nothing in flight."""
        return self.look().available()

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
            if self.knows_parts:
                assert match.partial_tokens == part.num_tokens, f"{match.partial_tokens} tokens, not {part}"
            else:
                assert match.partial_tokens <= part.num_tokens, (
                    f"{match.partial_tokens} tokens, more than {part}"
                )

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
        that is not cached, the last may keep it. A cached one has to be left while other content hangs on it. In a
        windowed cache, a sequence that has let go of it and goes on further down does not keep it in its place.
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
            elif holders[tail] > 1 or (self.reuse and self.has_heirs(tail, cached, least=True)):
                least, most = least + 1, most + 1
            elif self.host.num_blocks or self.has_heirs(tail, cached):
                # The host may hold what hangs below, or this very block. Without reuse, forks of one sequence that
                # say the same hang on one block, others do not.
                most += 1
        private = sum(count - (count == holders[block]) for block, count in leaving.items())
        return least + private, most + private

    def has_heirs(self, block: int, cached: set[int], *, least: bool = False) -> bool:
        """Return whether cached blocks or running sequences build on what a cached block says.

        With `least`, in a windowed cache, only those sequences count whose next block follows this one.
        """
        state = self.shadow.block(block)
        last = -1 if least and self.window is not None else 0
        if any(state in story.full_states()[last:] for story in self.stories.values()):
            return True
        return any(self.shadow.block_before(self.shadow.block(other)) == state for other in cached)

    def check_reads(self, look: Look | None = None) -> None:
        """Let every sequence read all it said, and recount the blocks. Only between steps."""
        look = look or self.look()
        for sequence, story in self.stories.items():
            table, positions = look.tables[sequence], look.positions[sequence]
            assert sequence.num_tokens == story.length
            assert len(table) == -(-len(positions) // self.size), (
                f"{sequence} holds other blocks than it needs"
            )
            found = self.shadow.read(table, len(positions))
            wanted = story.states if len(positions) == story.length else [story.states[p] for p in positions]
            assert found == wanted, f"{sequence} reads the KV of other tokens"
            if self.window is not None:
                self.check_window(sequence, found)
        stats = look.stats
        free, evictable = look.available()
        assert stats.free_blocks == free
        if self.host.in_flight:
            assert evictable - self.host.most_held() <= stats.evictable_blocks <= evictable
        else:
            assert stats.evictable_blocks == evictable
            assert stats.in_transfer_blocks == 0
        self.host.check(look.states)
        assert stats.cow_copies + stats.partial_copies == self.copies
        assert stats.cow_tokens + stats.partial_copied_tokens == self.copied_tokens

    def check_counters(self, look: Look) -> None:
        """Compare the counters with a recount."""
        stats, tables = look.stats, look.tables
        blocks = [
            stats.free_blocks,
            stats.evictable_blocks,
            stats.referenced_blocks,
            stats.in_transfer_blocks,
        ]
        assert sum(blocks) == stats.num_blocks == self.num_blocks
        assert self.manager.available_blocks == stats.free_blocks + stats.evictable_blocks
        assert stats.logical_blocks == sum(map(len, tables.values()))
        tokens = {sequence: len(positions) for sequence, positions in look.positions.items()}
        assert stats.logical_tokens == sum(tokens.values())
        assert stats.saved_blocks == stats.logical_blocks - len(look.distinct)
        written: dict[int, int] = {}  # tokens of each block in a table
        for sequence, table in tables.items():
            *whole, last = table
            written.update(dict.fromkeys(whole, self.size))
            written[last] = max(tokens[sequence] - len(whole) * self.size, written.get(last, 0))
        held = self.num_blocks - sum(blocks[:2]) - blocks[3]
        slots = sum(written.values())
        assert slots <= stats.kv_tokens <= held * self.size
        if held == len(written) and not any(
            tables[s][-1] in look.cached for s, story in self.stories.items() if story.length % self.size
        ):
            assert stats.kv_tokens == slots
        assert (stats.query_tokens, stats.query_blocks) == (self.queried_tokens, self.queried_blocks)
        assert (stats.hit_tokens, stats.hit_blocks) == (self.hit_tokens, self.hit_blocks)
        assert sum(stats.miss_blocks.values()) == self.queried_blocks - self.hit_blocks
