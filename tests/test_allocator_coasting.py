"""Coasting against advancing: two managers live the same life, and differ in nothing once all have caught up."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.config import CacheConfig
from allocator.content import ChunkContent, Content, UniqueContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks


class Life:
    """One manager, a batch in it, and what is done to them; `coasts` says which way the batch goes on."""

    def __init__(self, num_blocks: int, size: int, policy: str, ghosts: int | None, coasts: bool) -> None:
        self.manager = KVCacheManager(
            num_blocks, size, CacheConfig(policy=policy), ghost_blocks=ghosts, lifetimes=True
        )
        self.batch = self.manager.batch()
        self.running: list[KVSequence] = []
        self.seen: list[object] = []
        self._coasts = coasts
        if not coasts:
            self.manager.pool.drains = False  # the other one empties its victims without asking again

    def admit(self, content: Content) -> None:
        match = self.manager.lookup(content)
        self.seen.append((match.hit_blocks, dict(match.miss_blocks)))
        tokens = content.num_prompt_tokens - match.hit_tokens
        if self.manager.can_admit(match, tokens):
            sequence = self.manager.admit(content, tokens, match)
            self.running.append(sequence)
            self.batch.add(sequence)

    def go_on(self, steps: int) -> None:
        manager, batch = self.manager, self.batch
        room = 2 * len(batch) * (steps // manager.tokens_per_block + 2) <= manager.available_blocks
        if not room:
            return
        if self._coasts and manager.writes_in_place(batch):
            before = manager.logical_blocks
            first = batch.growth(1)
            later = manager.coast(batch, steps)
            assert later == manager.logical_blocks - before - first
        else:
            for _ in range(steps):
                manager.advance(batch)
        manager.pending_copies()

    def fork(self, which: int) -> None:
        if self.running:
            child = self.manager.fork(self.running[which % len(self.running)])[0]
            self.running.append(child)
            self.batch.add(child)

    def leave(self, which: int) -> None:
        if self.running:
            self.manager.release(self.running.pop(which % len(self.running)))

    def preempt(self, which: int) -> Content | None:
        if not self.running:
            return None
        sequence = self.running.pop(which % len(self.running))
        self.batch.remove(sequence)
        content = sequence.content(sequence.num_tokens + 1)
        self.manager.release(sequence)
        return content

    def check(self) -> None:
        stats = self.manager.stats()
        self.seen.append(stats)
        self.seen.append([sequence.table.tolist() for sequence in self.running])

    def finish(self) -> list[object]:
        self.manager.check_invariants()
        # Block by block: where extents are cut may differ, as a hit cuts only what it finds.
        self.seen.append(
            sorted(
                (block, extent.start + place, extent.references)
                for extent in self.manager.index.extents()
                for place, block in enumerate(extent.ids)
            )
        )
        while self.running:
            self.leave(0)
        self.manager.check_invariants()
        lifetimes = self.manager.pool.lifetimes
        assert lifetimes is not None
        for name, (values, weights) in sorted(lifetimes.take().items()):
            self.seen.append((name, np.repeat(values, weights).tolist()))
        return self.seen


KINDS = {
    "unique": (3, 20),
    "shared": (1, 20),
    "go on": (8, 30),
    "fork": (1, 9),
    "leave": (2, 9),
    "preempt": (1, 9),
    "resume": (1, 9),
    "check": (1, 0),
}
"""How often each operation comes, and the largest number it takes."""


def program(seed: int) -> list[tuple[str, int]]:
    """Return a random life, long enough for blocks to be evicted piece by piece."""
    random = Random(seed)
    kinds = random.choices(list(KINDS), [often for often, _ in KINDS.values()], k=random.choice([10, 120]))
    return [(kind, random.randint(min(1, KINDS[kind][1]), KINDS[kind][1])) for kind in kinds]


@settings(max_examples=2 * settings().max_examples)
@given(
    operations=st.integers(0, 2**32).map(program),
    num_blocks=st.sampled_from([12, 40, 100]),
    size=st.sampled_from([1, 2, 4, 16]),
    policy=st.sampled_from(["lru", "lru", "fifo", "lfu"]),
    ghosts=st.sampled_from([None, 0, 5]),
)
def test_coasting_is_advancing(
    operations: list[tuple[str, int]], num_blocks: int, size: int, policy: str, ghosts: int | None
) -> None:
    lives = [Life(num_blocks, size, policy, ghosts, coasts) for coasts in (True, False)]
    preempted: list[list[Content]] = [[], []]
    for now, (operation, number) in enumerate(operations):
        for life, contents in zip(lives, preempted, strict=True):
            life.manager.now = now
            if operation == "unique":
                life.admit(UniqueContent(number))
            elif operation == "shared":
                life.admit(ChunkContent(np.arange(20), 1, number))
            elif operation == "go on":
                life.go_on(number)
            elif operation == "fork":
                life.fork(number)
            elif operation == "leave":
                life.leave(number)
            elif operation == "preempt":
                content = life.preempt(number)
                if content is not None:
                    contents.append(content)
            elif operation == "resume" and contents:
                life.admit(contents.pop(number % len(contents)))
            elif operation == "check":
                life.check()
    one, other = (life.finish() for life in lives)
    assert one == other


def test_without_room_nothing_changes() -> None:
    manager = KVCacheManager(4, 2)
    batch = manager.batch()
    batch.add(manager.admit(UniqueContent(6), 6))
    before = manager.stats()
    assert manager.writes_in_place(batch)
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free or evictable"):
        manager.coast(batch, 3)
    assert manager.stats() == before
    assert batch.tick == 0


@pytest.mark.parametrize("size", [1, 4])
def test_whoever_never_leaves_remembers_when_its_blocks_were_filled(size: int) -> None:
    manager = KVCacheManager(8000, size, lifetimes=True)
    batch = manager.batch()
    sequence = manager.admit(UniqueContent(4), 4)
    batch.add(sequence)
    for now in range(6000):
        manager.now = now
        assert manager.writes_in_place(batch)
        manager.coast(batch, 1)
    manager.release(sequence)
    assert sequence.table
    extent = next(iter(manager.index.extents()))
    assert extent.born is not None
    filled = [size * block + size - 1 for block in range(6000 // size)]
    assert np.repeat(extent.born[1::2], extent.born[::2]).tolist() == [0] * (4 // size) + filled


def test_beams_that_die_after_coasting_leave_what_they_filled_in_the_cache() -> None:
    def free_after(coasts: bool) -> tuple[int, int]:
        manager = KVCacheManager(40, 2)
        batch = manager.batch()
        sequence = manager.admit(UniqueContent(4), 4)
        beams = [sequence, *manager.fork(sequence, 1)]
        for beam in beams:
            batch.add(beam)
        assert manager.writes_in_place(batch)
        if coasts:
            manager.coast(batch, 5)
        else:
            manager.advance(batch, 5)
        manager.reorder_beams(beams, [1, 1])
        manager.check_invariants()
        return manager.pool.num_free, manager.pool.num_evictable

    assert free_after(coasts=True) == free_after(coasts=False) == (33, 2)


def test_every_eviction_has_a_lifetime_even_of_a_victim_that_is_not_empty_yet() -> None:
    manager = KVCacheManager(8, 2, lifetimes=True)
    manager.release(manager.admit(UniqueContent(12), 12))
    manager.now = 5
    manager.admit(UniqueContent(8), 8)
    lifetimes = manager.pool.lifetimes
    assert lifetimes is not None
    durations = {
        name: (values.tolist(), weights.tolist()) for name, (values, weights) in lifetimes.take().items()
    }
    assert manager.stats().evicted_blocks == 2
    assert durations == {"lifetime": ([5], [2]), "idle_before_evict": ([5], [2]), "reuse_gap": ([], [])}
