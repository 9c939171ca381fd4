"""Blocks of which the index learns late that they are filled or gone: nobody can tell from a manager whose index is
told of each at once.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.config import CacheConfig
from allocator.content import TokenContent
from allocator.eviction.lru import LRU
from allocator.eviction.policy import EvictionPolicy
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.prefix import Extent

UNKNOWN = -1


class Watchful(LRU):
    """LRU that wants to know of every block that fills, and is asked for each to be taken: so nothing may wait."""

    def cached(self, extent: Extent, num_blocks: int) -> None:
        pass


class Nosy(LRU):
    """LRU that walks the whole index whenever it is asked for a victim, in the midst of a step or of several."""

    drains_victims = True
    manager: KVCacheManager

    def victim(self, wanted: int) -> tuple[Extent, int]:
        for extent in self.manager.index.extents():
            assert extent.keys
        return super().victim(wanted)


class Life:
    """A manager, sequences in it with what they say, and all that was seen of them."""

    def __init__(
        self, policy: EvictionPolicy, num_blocks: int, size: int, host_blocks: int, ghost_blocks: int
    ) -> None:
        self.manager = KVCacheManager(
            num_blocks,
            size,
            CacheConfig(),
            policy=policy,
            num_host_blocks=host_blocks,
            ghost_blocks=ghost_blocks,
        )
        if isinstance(policy, Nosy):
            policy.manager = self.manager
        self.batch = self.manager.batch()
        self.running: dict[KVSequence, list[int]] = {}
        self.texts: list[list[int]] = [[0], [1]]
        self.away: list[KVSequence] = []
        self.seen: list[object] = []

    def chosen(self, number: int) -> KVSequence | None:
        return list(self.running)[number % len(self.running)] if self.running else None

    def do(self, operation: str, number: int) -> None:
        """Do it, if it can be done; note what came of it."""
        try:
            self.seen.append((operation, getattr(self, operation)(number)))
        except OutOfBlocks as error:
            self.seen.append((operation, str(error)))
            self.release(number)
        if self.manager.pool.tier is not None:
            self.manager.transfers_done(self.manager.pending_swaps())
        self.seen.append(self.manager.pending_copies().tolist())

    def admit(self, number: int) -> object:
        """Admit what begins as something that was said begins, also by who is still at it."""
        texts = [*self.texts, *self.running.values()]
        text = texts[number % len(texts)]
        prompt = text[: 1 + number % 23]
        if UNKNOWN in prompt:
            prompt = prompt[: prompt.index(UNKNOWN)] or [0]
        prompt = prompt + [number % 2] * (number % 3)
        content = TokenContent(prompt)
        match = self.manager.lookup(content)
        if len(self.running) < 6:
            sequence = self.manager.admit(content, len(prompt) - match.hit_tokens, match)
            self.running[sequence] = list(prompt)
            self.batch.add(sequence)
        return match.hit_blocks, match.hit_tokens, dict(match.miss_blocks)

    def name(self, number: int) -> object:
        """Generate named tokens, which often repeat what others say."""
        slots = []
        for step in range(1 + number % 7):
            tokens = [(number >> step) & (place == number % 5) for place in range(len(self.batch))]
            slots.append(self.manager.append(self.batch, tokens).tolist())
            for sequence, token in zip(self.batch, tokens, strict=True):
                self.running[sequence].append(token)
        return slots

    def advance(self, number: int) -> object:
        self.manager.advance(self.batch, 1 + number % 3)
        for sequence in self.batch:
            self.running[sequence] += [UNKNOWN] * (1 + number % 3)
        return None

    def fork(self, number: int) -> object:
        parent = self.chosen(number)
        if parent is not None and len(self.running) < 6:
            (child,) = self.manager.fork(parent)
            self.running[child] = list(self.running[parent])
            self.batch.add(child)
        return None

    def reorder(self, number: int) -> object:
        beams = [s for s in self.batch if s.num_tokens == self.batch[0].num_tokens]
        parents = [(number >> place) % len(beams) for place in range(len(beams))]
        self.manager.reorder_beams(beams, parents)
        said = [self.running[beams[parent]] for parent in parents]
        self.running.update(zip(beams, map(list, said), strict=True))
        return parents

    def leave(self, number: int) -> object:
        sequence = self.chosen(number)
        if sequence is not None and sequence.batch is not None:
            self.batch.remove(sequence)
        elif sequence is not None:
            self.batch.add(sequence)
        return None

    def truncate(self, number: int) -> object:
        for sequence, said in self.running.items():
            if sequence.batch is None:
                del said[1 + number % len(said) :]
                self.manager.truncate(sequence, len(said))
                return len(said)
        return None

    def release(self, number: int) -> object:
        sequence = self.chosen(number)
        if sequence is not None:
            self.manager.release(sequence)
            self.texts.append(self.running.pop(sequence))
        return None

    def swap(self, number: int) -> object:
        sequence = self.chosen(number)
        if self.manager.pool.tier is None or sequence is None:
            return None
        if sequence.batch is not None:
            self.batch.remove(sequence)
        self.manager.transfers_done(self.manager.pending_swaps())
        self.manager.swap_out(sequence)
        self.manager.transfers_done(self.manager.pending_swaps())
        self.manager.swap_in(sequence)
        self.manager.transfers_done(self.manager.pending_swaps())
        return sequence.table.tolist()

    def look(self, _: int) -> object:
        """Look without making anybody catch up."""
        tables = [sequence.table.tolist() for sequence in self.running]
        return tables, self.manager.stats(), [len(said) for said in self.running.values()]

    def check(self, _: int) -> object:
        """Look at everything: block by block, since where extents are cut may differ."""
        self.manager.check_invariants()
        for sequence, said in self.running.items():
            ids = TokenContent([token if token >= 0 else 0 for token in said]).prompt_keys(1)
            told = sequence.history.content(len(said)).prompt_keys(1)
            for place, token in enumerate(said):
                if token >= 0:
                    assert ids[4 * place : 4 * place + 4] == told[4 * place : 4 * place + 4]
        return sorted(
            (block, extent.start + place, extent.references)
            for extent in self.manager.index.extents()
            for place, block in enumerate(extent.ids)
        )


OPERATIONS = {
    "admit": 5,
    "name": 9,
    "advance": 1,
    "fork": 1,
    "reorder": 1,
    "leave": 2,
    "truncate": 1,
    "release": 2,
    "swap": 1,
    "look": 2,
    "check": 1,
}


def program(seed: int) -> list[tuple[str, int]]:
    random = Random(seed)
    names = random.choices(list(OPERATIONS), list(OPERATIONS.values()), k=random.choice([15, 60]))
    without = random.choice(["", "check", "advance", "fork"])
    return [(name, random.randrange(10**6)) for name in names if name != without]


@settings(max_examples=4 * settings().max_examples)
@given(
    st.integers(0, 2**32).map(program),
    st.sampled_from([1, 2, 2, 4]),
    st.sampled_from([16, 40, 200]),
    st.sampled_from([0, 0, 12]),
    st.sampled_from([0, 3, 20, 1000]),
    st.sampled_from([2, 256]),
    st.sampled_from([LRU, LRU, Nosy]),
)
def test_nobody_can_tell_when_the_index_is_told(
    operations: list[tuple[str, int]],
    size: int,
    num_blocks: int,
    host_blocks: int,
    ghost_blocks: int,
    steps: int,
    policy: type[LRU],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allocator.ring._STEPS", steps)
        late, early = (
            Life(kind(), num_blocks, size, host_blocks, ghost_blocks) for kind in (policy, Watchful)
        )
        for operation, number in [*operations, ("check", 0)]:
            if operation == "reorder" and not len(late.batch):
                continue
            late.do(operation, number)
            early.do(operation, number)
            assert late.seen[-2:] == early.seen[-2:]


def test_blocks_do_wait_until_somebody_looks() -> None:
    """Or the tests above would compare a manager with itself."""
    manager = KVCacheManager(40, 2)
    batch = manager.batch()
    sequence = manager.admit(TokenContent([1, 2]), 2)
    batch.add(sequence)
    for token in (3, 4, 5, 6, 7, 8, 9):
        manager.append(batch, [token])
    assert sequence.anchor.end == 1
    assert sequence.anchor.grower is sequence
    match = manager.lookup(TokenContent([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    assert match.hit_blocks == 4 == sequence.anchor.end
    assert sequence.anchor.grower is None
    for token in (10, 11):
        manager.append(batch, [token])
    match = manager.lookup(TokenContent(list(range(1, 14))))
    assert match.hit_blocks == 5
    manager.append(batch, [12])
    assert not manager.is_current(match), "a block waits, of which the match does not know"
    for token in (13, 14):
        manager.append(batch, [token])
    assert sequence.anchor.end == 5
    assert sequence.anchor.grower is sequence
    assert sequence.anchored == 7
    manager.check_invariants()


def test_ghosts_are_driven_out_before_one_of_them_is_revived() -> None:
    """Though the victim that drives them out has blocks left, and nobody has looked at it."""
    manager = KVCacheManager(9, 1, ghost_blocks=4)

    def serve(*tokens: int) -> KVSequence:
        return manager.admit(TokenContent(tokens), len(tokens))

    for sequence in [serve(1), serve(2, 3), serve(4, 5)]:
        manager.release(sequence)
    victim = serve(10, 11, 12, 13, 14)  # with it, 1 is a ghost
    serve(20, 21, 22, 23)  # now 2, 3, 4 and 5 are, and 1 is forgotten
    manager.release(victim)
    again = serve(4, 5, 30)  # from the victim's last three blocks: these drive out 2, 3 and 5
    assert again.table.tolist() == [0, 8, 7]
    assert manager.lookup(TokenContent([2, 3, 99])).miss_blocks == {"unknown": 3}
    assert manager.lookup(TokenContent([10, 11, 12, 13, 14])).miss_blocks == {"evicted": 3}
