"""The manager, step by step beside one that is written block by block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import naive_manager
import pytest
from different_cases import different_programs
from hypothesis.stateful import invariant
from naive_manager import NaiveManager, NaiveSequence

from allocator.batch import Batch
from allocator.content import Content
from allocator.fuzz import AllocatorMachine, PartialMachine, ReuseMachine, SharingMachine, run_machine
from allocator.manager import KVCacheManager, OutOfBlocks, QuotaExceeded
from allocator.oracle_partial import unit_tokens
from allocator.sequence import KVSequence
from allocator.shadow import Prompt


class PairBatch(Batch):
    """A batch that tells the naive manager who is in it."""

    pair: Pair

    def add(self, sequence: KVSequence) -> None:
        super().add(sequence)
        self.pair.naive.join(self.pair.twins[sequence])

    def remove(self, sequence: KVSequence) -> None:
        super().remove(sequence)
        self.pair.naive.leave(self.pair.twins[sequence])


class Pair:
    """Both managers behind one face: what the real one does, the naive one repeats."""

    def __init__(self, machine: Any, real: KVCacheManager, naive: NaiveManager) -> None:
        self.machine, self.real, self.naive = machine, real, naive
        self.twins: dict[KVSequence, NaiveSequence] = {}
        self.part: Any = None  # the block of which the prompt looked up last hits a part
        self.evicted: list[int] = []  # histories, as the shadow numbers them
        take = real.pool.take

        def noted(count: int) -> Any:
            free = set(real.pool.free_ids().tolist())
            taken = take(count)  # the free ones first, then the evicted ones in their order
            self.evicted += [machine.shadow.block(block) for block in taken if block not in free]
            return taken

        real.pool.take = noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def now(self) -> int:
        return self.real.now

    @now.setter
    def now(self, value: int) -> None:
        self.real.now = value
        self.naive.pass_time(value)

    def prompt(self, content: Content) -> Prompt:
        return self.machine.known[id(content)]

    def lookup(self, content: Content, salt: Hashable) -> Any:
        match = self.real.lookup(content, salt)
        prompt = self.prompt(content)
        hits, causes = self.naive.lookup(prompt.tokens[: prompt.num_tokens], salt)
        assert match.hit_blocks == hits
        assert match.miss_blocks == causes
        computing = self.naive.computing(prompt.tokens[: prompt.num_tokens], salt)
        assert (match.computed_by is None) == (not computing)
        assert match.computed_by is None or self.twins[match.computed_by] in computing
        assert self.real.in_flight(match) is match.computed_by
        unit = unit_tokens(prompt, self.real.tokens_per_block)
        tokens, parts = self.naive.find_part(prompt.tokens[: prompt.num_tokens], salt, hits, unit)
        assert match.partial_tokens == tokens
        self.part = None
        if tokens:  # of equally good ones, the naive manager takes the same
            state = self.machine.shadow.block(match.partial.extent.ids[match.partial.at])
            (self.part,) = [one for one in parts if self.machine.state_of(one) == state]
        return match

    def both(self, real: Any, naive: Any) -> Any:
        """Call both; they refuse together, but for quotas, of which the naive one knows nothing."""
        try:
            result = real()
        except QuotaExceeded:
            raise
        except OutOfBlocks:
            with pytest.raises(naive_manager.Refused):
                naive()
            raise
        return result, naive()

    def admit(self, content: Content, num_tokens: int, match: Any, salt: Hashable, **options: Any) -> Any:
        prompt = self.prompt(content)
        part_tokens = self.lookup(content, salt).partial_tokens
        part = self.part
        sequence, twin = self.both(
            lambda: self.real.admit(content, num_tokens, match, salt, **options),
            lambda: self.naive.admit(
                prompt.tokens[: prompt.num_tokens],
                salt,
                num_tokens,
                options.get("retention"),
                part,
                part_tokens,
            ),
        )
        self.twins[sequence] = twin
        return sequence

    def rows(self, sequences: Sequence[KVSequence], count: int, tokens: Any) -> list[Any]:
        named = [None] * len(sequences) if tokens is None else tokens
        named = [[row] if isinstance(row, int) else row for row in named]
        return [
            self.machine.stories[s].next_tokens(count, row) for s, row in zip(sequences, named, strict=True)
        ]

    def written(self, sequences: Sequence[KVSequence], count: int, tokens: Any, real: Any) -> Any:
        stories = [self.machine.stories[s] for s in sequences]
        known = [len(story.tokens) for story in stories]
        rows = self.rows(sequences, count, tokens)
        twins = [self.twins[s] for s in sequences]
        if isinstance(sequences, Batch):
            by_twin = {id(twin): row for twin, row in zip(twins, rows, strict=True)}
            naive = lambda: self.naive.write_batch(by_twin, count)  # noqa: E731
        else:
            naive = lambda: self.naive.write(twins, rows)  # noqa: E731
        try:
            return self.both(real, naive)[0]
        except (OutOfBlocks, ValueError):
            for story, length in zip(stories, known, strict=True):
                del story.tokens[length:]
            raise

    def extend(self, sequence: KVSequence, count: int) -> Any:
        return self.written([sequence], count, None, lambda: self.real.extend(sequence, count))

    def append(self, sequences: Sequence[KVSequence], tokens: Any = None, count: int = 1) -> Any:
        return self.written(sequences, count, tokens, lambda: self.real.append(sequences, tokens, count))

    def batch(self) -> PairBatch:
        real = self.real
        batch = PairBatch(
            real.tokens_per_block,
            real.sequences,
            real.pool.shared,
            real.events,
            windowed=real.windowed is not None,
        )
        batch.catch_up = real.catch_up
        batch.pair = self
        return batch

    def fork(self, sequence: KVSequence, n: int) -> list[KVSequence]:
        children = self.real.fork(sequence, n)
        for child in children:
            self.twins[child] = self.naive.fork(self.twins[sequence])
        return children

    def reorder_beams(self, sequences: Sequence[KVSequence], parents: Sequence[int]) -> None:
        self.real.reorder_beams(sequences, parents)
        self.naive.reorder([self.twins[s] for s in sequences], parents)

    def truncate(self, sequence: KVSequence, length: int) -> None:
        self.real.truncate(sequence, length)
        self.naive.truncate(self.twins[sequence], length)

    def release(self, sequence: KVSequence) -> None:
        self.real.release(sequence)
        self.naive.release(self.twins.pop(sequence))

    def pending_copies(self) -> Any:
        copies = self.real.pending_copies()
        assert [row[2] for row in copies] == [valid for _, _, valid in self.naive.take_copies()]
        return copies


class BesideNaive(AllocatorMachine):
    """Every rule, on both managers."""

    policies: ClassVar = ("fifo", "lru")
    serves_host: ClassVar = False

    def choose_window(self, drawn: int) -> int | None:
        """The naive manager has no windows."""
        return None

    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
        ghosts = 16 * num_blocks if self.ghosts is None else self.ghosts
        real = super().make_manager(num_blocks, tokens_per_block, reuse)
        return Pair(self, real, self.make_naive(num_blocks, tokens_per_block, reuse, ghosts))

    def make_naive(self, num_blocks: int, tokens_per_block: int, reuse: bool, ghosts: int) -> NaiveManager:
        """Return the naive manager beside it."""
        assert isinstance(self.policy, str)
        return NaiveManager(num_blocks, tokens_per_block, self.policy, reuse, ghosts, self.partial)

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "manager"):
            return
        naive, stats = self.manager.naive, self.manager.stats()
        assert stats.free_blocks == len(naive.free)
        assert stats.evictable_blocks == len(naive.idle)
        assert stats.in_transfer_blocks == len(naive.limbo)
        for sequence, twin in self.manager.twins.items():
            assert sequence.anchored == len(twin.path)
            assert sequence.twins == twin.own
            gone = twin.table.count(None)  # what has left a window
            assert (sequence.left, sequence.num_blocks) == (gone, len(twin.table) - gone)
        evicted = [self.state_of(one) for one in naive.evicted]
        assert self.manager.evicted == evicted
        assert stats.evicted_blocks >= len(evicted)
        naive.evicted.clear()
        self.manager.evicted.clear()

    def state_of(self, one: Any) -> int:
        """Return the shadow's number for an identity of the naive manager."""
        tokens: list[Hashable] = []
        while one[0] != "root":
            tokens[:0] = one[1]
            one = one[0]
        return self.shadow.states(one[1], tokens)[-1]


class ReuseBesideNaive(BesideNaive, ReuseMachine):
    """As above; the rules of sharing are switched off, so that hits and evictions come quickly."""

    fork = sample = search = reorder_beams = truncate = join_all = join_or_leave = append_batch = None


class SharingBesideNaive(BesideNaive, SharingMachine):
    """As above, without matches and preemptions."""

    lookup = admit_with_match = preempt = readmit = None


class PartialBesideNaive(BesideNaive, PartialMachine):
    """As above, without what `ReuseBesideNaive` leaves out; with partial reuse always."""

    fork = sample = search = reorder_beams = truncate = join_all = join_or_leave = append_batch = None
    partials = ("copy", "steal")


class WithAnotherPolicy(ReuseBesideNaive):
    """What the comparison has to notice."""

    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
        pair = super().make_manager(num_blocks, tokens_per_block, reuse)
        pair.naive.policy = {"lru": "fifo", "fifo": "lru"}[pair.naive.policy]
        return pair


def test_another_policy_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_machine(WithAnotherPolicy, 6000)


TestBesideNaive = different_programs(BesideNaive)
TestReuseBesideNaive = different_programs(ReuseBesideNaive)
TestPartialBesideNaive = different_programs(PartialBesideNaive)
TestSharingBesideNaive = different_programs(SharingBesideNaive)
