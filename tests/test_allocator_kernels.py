"""What the manager hands out, executed by the kernels: swaps, copies and writes, and every sequence reads its own KV.

The CPU runner executes the CUDA sources. The value of a token's key depends on all the tokens before it, as it does in
a model, so that a block moved wrongly, or reused for other content, cannot go unnoticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from allocator.config import CacheConfig
from allocator.content import TokenContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.shadow import ShadowKV, Story
from kernels import ops
from kernels.compile import backend_available
from kernels.layout import CacheLayout

pytestmark = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")

SIZE = 4
LAYOUT = CacheLayout("float32", 2, 1, 64, SIZE)


def values_of(states: list[int]) -> np.ndarray[Any, Any]:
    """Return the vectors of some histories, float32 [len(states), layers, 2, heads, dim]."""
    shape = (LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    return np.array(
        [np.random.default_rng(state).standard_normal(shape, np.float32) for state in states], np.float32
    ).reshape(-1, *shape)


class Device:
    """A pool and a host pool, both full of NaN, and what a serving engine does to them each step."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.pool = LAYOUT.empty_pool(manager.num_blocks)
        self.host_pool = LAYOUT.empty_host_pool(manager.host_tier.host.num_blocks)
        self.pool[:] = self.host_pool[:] = np.nan
        self.shadow = ShadowKV(SIZE)
        self.stories: dict[KVSequence, Story] = {}
        self.swapped: dict[KVSequence, Story] = {}
        self.writes: list[tuple[np.ndarray[Any, Any], list[int]]] = []

    # ------------------------------------------------ scheduling

    def admit(self, tokens: list[int]) -> KVSequence:
        content = TokenContent(tokens)
        match = self.manager.lookup(content)
        sequence = self.manager.admit(content, len(tokens) - match.hit_tokens, match)
        story = self.stories[sequence] = Story(self.shadow, "", list(tokens), len(tokens))
        story.say(match.hit_tokens)
        self.writes.append((self.manager.prefill_slots(sequence), story.say(len(tokens) - match.hit_tokens)))
        return sequence

    def append(self, sequences: list[KVSequence], token: int) -> None:
        slots = self.manager.append(sequences, [token] * len(sequences))
        for sequence, slot in zip(sequences, slots, strict=True):
            self.writes.append((np.array([slot]), self.stories[sequence].say(1, [token])))

    def fork(self, sequence: KVSequence) -> KVSequence:
        (child,) = self.manager.fork(sequence)
        self.stories[child] = self.stories[sequence].fork()
        return child

    def release(self, sequence: KVSequence) -> None:
        self.manager.release(sequence)
        del self.stories[sequence]

    def swap_out(self, sequence: KVSequence) -> None:
        self.manager.swap_out(sequence)
        self.swapped[sequence] = self.stories.pop(sequence)

    def swap_in(self, sequence: KVSequence) -> None:
        self.manager.swap_in(sequence)
        self.stories[sequence] = self.swapped.pop(sequence)

    # ------------------------------------------------ executing

    def step(self) -> None:
        """Execute what has been scheduled, in the documented order, and compare what every sequence then reads."""
        transfers = self.manager.pending_swaps()
        ops.swap_blocks(LAYOUT, self.pool, self.host_pool, transfers.swap_outs)
        ops.swap_blocks(LAYOUT, self.host_pool, self.pool, transfers.swap_ins)
        ops.copy_blocks(LAYOUT, self.pool, self.manager.pending_copies())
        slots = np.concatenate([np.zeros(0, np.int64), *(slots for slots, _ in self.writes)])
        written = values_of([state for _, states in self.writes for state in states])
        for layer in range(LAYOUT.num_layers):
            key, value = (np.ascontiguousarray(written[:, layer, which]) for which in (0, 1))
            ops.write_kv(LAYOUT, self.pool, layer, key, value, slots)
        self.writes.clear()
        self.manager.transfers_done(transfers)
        self.manager.check_invariants()
        self.check()

    def check(self) -> None:
        sequences = list(self.stories)
        if not sequences:
            return
        held = [self.held(sequence) for sequence in sequences]
        starts = np.cumsum([0, *map(len, held)]).astype(np.int32)
        tables = self.manager.block_tables(sequences)
        assert self.manager.context_lens(sequences).tolist() == np.diff(starts).tolist()
        for layer in range(LAYOUT.num_layers):
            found = ops.gather_kv(LAYOUT, self.pool, layer, tables, starts)
            for which in (0, 1):
                expected = values_of([state for states in held for state in states])[:, layer, which]
                np.testing.assert_array_equal(found[which], expected)

    def held(self, sequence: KVSequence) -> list[int]:
        """Return the histories of the tokens whose blocks a sequence has: all of them, or those of its window."""
        first = sequence.sink_blocks * SIZE
        gone = range(first, first + sequence.left * SIZE)
        return [state for at, state in enumerate(self.stories[sequence].states) if at not in gone]


def test_a_sequence_comes_back_from_the_host_as_it_went() -> None:
    device = Device(KVCacheManager(6, SIZE, num_host_blocks=8))
    first = device.admit(list(range(10)))
    device.step()
    device.swap_out(first)
    device.step()
    second = device.admit([100 + i for i in range(22)])  # takes every block
    device.step()
    assert sorted(second.table) == list(range(6))
    with pytest.raises(OutOfBlocks):
        device.swap_in(first)
    device.release(second)
    device.swap_in(first)
    device.append([first], 7)
    device.step()
    assert device.manager.stats().host is not None
    assert first.num_tokens == 11


def test_evicted_content_comes_back_on_a_hit() -> None:
    device = Device(KVCacheManager(4, SIZE, num_host_blocks=8))
    device.release(device.admit(list(range(12))))
    device.step()
    device.release(device.admit([50] * 16))
    device.step()
    again = device.admit(list(range(13)))
    assert again.hit_tokens == 12
    device.step()
    host = device.manager.stats().host
    assert host is not None
    assert host.hit_blocks == 3


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_read_what_they_wrote(seed: int) -> None:
    run_program(KVCacheManager(9, SIZE, num_host_blocks=12), seed)


@pytest.mark.parametrize("num_sinks", [0, 5])
def test_random_programs_of_a_windowed_cache_read_what_they_wrote(num_sinks: int) -> None:
    config = CacheConfig(window=6, num_sinks=num_sinks)
    run_program(KVCacheManager(9, SIZE, config, num_host_blocks=12), num_sinks)


def run_program(manager: KVCacheManager, seed: int, steps: int = 60) -> None:
    """Schedule at random, refused calls included, and execute each step; see that all kinds of moves occurred."""
    rng = np.random.default_rng(seed)
    device = Device(manager)

    def one_of(sequences: dict[KVSequence, Story]) -> KVSequence:
        return list(sequences)[rng.integers(len(sequences))]

    for _ in range(steps):
        for _ in range(rng.integers(1, 4)):
            action = rng.integers(9)
            try:
                if action < 3 and len(device.stories) < 4:
                    first = 100 * int(rng.integers(3))  # one of three texts, up to somewhere
                    device.admit(list(range(first, first + int(rng.integers(1, 22)))))
                elif action == 3 and device.swapped:
                    device.swap_in(one_of(device.swapped))
                elif device.stories and not device.writes:  # what is scheduled cannot be taken back
                    sequence = one_of(device.stories)
                    if action <= 5:
                        device.release(sequence)
                    elif action == 6 and not device.swapped:
                        device.swap_out(sequence)
                    elif action == 7:
                        device.fork(sequence)
                    else:
                        device.append(list(device.stories), int(rng.integers(2)))
            except OutOfBlocks:
                pass
            except ValueError as error:
                if "is still to be filled" not in str(error):
                    raise
        device.step()
    stats = manager.stats()
    assert stats.host is not None
    moved = stats.host.offloaded_blocks, stats.host.onboarded_blocks
    assert min(*moved, stats.host.swapped_out_blocks, stats.host.swapped_in_blocks) > 0
    assert stats.cow_copies > 0
