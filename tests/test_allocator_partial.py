"""Partial reuse: which block a lookup goes on into, and whether that is copied or stolen."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import CacheConfig
from allocator.content import ChunkContent, TokenContent, UniqueContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.overlap import Fan
from allocator.rules.cost import count_lines

COPY = CacheConfig(enable_partial_reuse=True)
STEAL = CacheConfig(enable_partial_reuse=True, copy_on_partial_reuse=False)


def run(manager: KVCacheManager, ids: list[int], salt: str = "") -> KVSequence:
    """Admit a prompt, compute all that is not cached, and end the step."""
    content = TokenContent(ids)
    match = manager.lookup(content, salt)
    sequence = manager.admit(content, len(ids) - match.hit_tokens, match, salt)
    manager.pending_copies()
    return sequence


def cache(manager: KVCacheManager, *prompts: list[int]) -> None:
    """Leave prompts in the cache. They are computed in one step, so that none goes on from another."""
    for ids in prompts:
        content = TokenContent(ids)
        match = manager.lookup(content)
        manager.release(manager.admit(content, len(ids) - match.hit_tokens, match))
    manager.pending_copies()


def hit_tokens(manager: KVCacheManager, ids: list[int], salt: str = "") -> int:
    return manager.lookup(TokenContent(ids), salt).hit_tokens


# ------------------------------------------------ copied or stolen


@pytest.mark.parametrize("config", [COPY, STEAL])
def test_an_idle_leaf_is_stolen(config: CacheConfig) -> None:
    manager = KVCacheManager(8, 4, config)
    cache(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    content = TokenContent([1, 1, 1, 1, 2, 2, 3, 3, 3])
    match = manager.lookup(content)
    assert (match.hit_blocks, match.hit_tokens, match.partial_tokens) == (1, 6, 2)
    assert match.miss_blocks == {"cold": 1, "short_of_block": 1}
    assert manager.blocks_needed(match, 3) == 3  # of them, one evictable and hit, one evictable and stolen
    sequence = manager.admit(content, 3, match)
    assert sequence.hit_tokens == 6
    assert sequence.block_table.tolist() == [0, 1, 2]
    assert manager.prefill_slots(sequence).tolist() == [6, 7, 8]
    assert manager.pending_copies().tolist() == []
    manager.check_invariants()
    stats = manager.stats()
    assert (stats.stolen_blocks, stats.partial_copies, stats.partial_hits) == (1, 0, 1)
    assert (stats.hit_blocks, stats.hit_tokens) == (1, 6)
    # What was stolen is gone, and remembered as a block that once was cached.
    assert manager.lookup(TokenContent([1, 1, 1, 1, 2, 2, 2, 2, 9])).miss_blocks["evicted"] == 1


def test_a_block_that_a_table_holds_is_copied() -> None:
    manager = KVCacheManager(8, 4, COPY)
    holder = run(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    content = TokenContent([1, 1, 1, 1, 2, 2, 2, 3])
    match = manager.lookup(content)
    assert match.hit_tokens == 7
    assert manager.blocks_needed(match, 1) == 1
    sequence = manager.admit(content, 1, match)
    assert sequence.block_table.tolist() == [0, 2]
    assert manager.pending_copies().tolist() == [[1, 2, 3]]
    assert holder.block_table.tolist() == [0, 1]
    stats = manager.stats()
    assert (stats.partial_copies, stats.partial_copied_tokens, stats.stolen_blocks) == (1, 3, 0)
    assert (stats.cow_copies, stats.cow_tokens) == (0, 0)
    manager.check_invariants()


def test_an_interior_block_is_copied_and_kept_until_then() -> None:
    manager = KVCacheManager(4, 4, COPY)
    cache(manager, [1] * 8 + [2] * 4)  # three blocks, none held; one is free
    content = TokenContent([1, 1, 5, 5, 5])
    match = manager.lookup(content)
    assert (match.hit_blocks, match.hit_tokens) == (0, 2)
    assert manager.blocks_needed(match, 3) == 3, "two of its own, and the source may not be evicted yet"
    sequence = manager.admit(content, 3, match)
    assert sequence.block_table.tolist() == [3, 2]
    assert manager.available_blocks == 1
    assert manager.pending_copies().tolist() == [[0, 3, 2]]
    assert manager.available_blocks == 2
    manager.check_invariants()


def test_where_copying_is_off_what_is_held_or_interior_is_not_hit() -> None:
    manager = KVCacheManager(16, 4, STEAL)
    holder = run(manager, [1, 1, 1, 1])
    assert hit_tokens(manager, [1, 1, 1, 2]) == 0
    manager.release(holder)
    assert hit_tokens(manager, [1, 1, 1, 2]) == 3
    cache(manager, [1] * 8)  # the block is interior now
    assert hit_tokens(manager, [1, 1, 1, 2]) == 0
    assert hit_tokens(manager, [1, 1, 1, 1, 1, 2]) == 5
    cache(manager, [1, 2, 2, 2])
    assert hit_tokens(manager, [1, 1, 1, 2]) == 1, "the best of those that may be stolen"
    manager.check_invariants()


def test_a_match_is_stale_once_a_block_may_not_be_stolen_any_more() -> None:
    manager = KVCacheManager(16, 4, STEAL)
    cache(manager, [1] * 4)
    content = TokenContent([1, 1, 1, 2])
    match = manager.lookup(content)
    assert match.hit_tokens == 3
    holder = run(manager, [1] * 5)
    assert not manager.is_current(match)
    with pytest.raises(ValueError, match=r"num_tokens \(5\) must be at most the prompt's remaining 4"):
        manager.admit(content, 5, match)
    sequence = manager.admit(content, 4, match)
    assert sequence.hit_tokens == 0
    assert set(sequence.table).isdisjoint(holder.table)
    manager.check_invariants()


def test_what_is_interior_by_its_ghosts_alone_is_stolen() -> None:
    manager = KVCacheManager(2, 4, COPY)
    cache(manager, [1] * 8, [2] * 4)  # the last prompt has taken the first one's second block
    sequence = run(manager, [1, 1, 1, 3])
    assert sequence.hit_tokens == 3
    assert manager.stats().stolen_blocks == 1
    assert manager.lookup(TokenContent([1] * 8 + [7])).miss_blocks == {"evicted": 2, "short_of_block": 1}
    manager.check_invariants()


# ------------------------------------------------ how much, and of which


def test_the_most_tokens_in_common_win() -> None:
    manager = KVCacheManager(16, 4, COPY)
    cache(manager, [1, 2, 3, 4], [1, 2, 9, 9], [1, 8, 8, 8], [7, 7, 7, 7])
    assert hit_tokens(manager, [1, 2, 3, 9]) == 3
    assert hit_tokens(manager, [1, 2, 7, 9]) == 2
    assert hit_tokens(manager, [1, 7, 7, 7, 7]) == 1
    assert hit_tokens(manager, [9, 2, 3, 4]) == 0
    assert hit_tokens(manager, [1, 2, 3, 9], salt="other") == 0


def test_of_equals_the_first_cached_is_taken() -> None:
    manager = KVCacheManager(16, 4, COPY)
    for ids in ([5, 5, 8, 8], [5, 5, 7, 7], [5, 5, 9, 9]):
        run(manager, ids)  # and keep it: block 0, 1, 2
    assert manager.stats().partial_copies == 2
    match = manager.lookup(TokenContent([5, 5, 6, 6]))
    assert match.partial is not None
    assert match.partial.extent.ids[match.partial.at] == 0


def test_the_last_token_is_always_computed() -> None:
    manager = KVCacheManager(16, 4, COPY)
    cache(manager, [1] * 8)
    match = manager.lookup(TokenContent([1] * 8))
    assert (match.hit_tokens, match.miss_blocks) == (7, {"last_token": 1})
    assert hit_tokens(manager, [1] * 7) == 6
    assert hit_tokens(manager, [1] * 6) == 5
    assert hit_tokens(manager, [1] * 5) == 4
    # The idle leaf is stolen, completed, and cached again.
    sequence = run(manager, [1] * 8)
    assert sequence.block_table.tolist() == [0, 1]
    assert not sequence.twins
    assert hit_tokens(manager, [1] * 9) == 8
    # While it is held, the next one gets a copy, and holds the cached block beside its own.
    other = run(manager, [1] * 8)
    assert other.block_table.tolist() == [0, 2]
    assert other.twins == {1}
    manager.check_invariants()


def test_blocks_of_one_token_have_no_parts() -> None:
    manager = KVCacheManager(8, 1, COPY)
    cache(manager, [1, 2, 3])
    assert hit_tokens(manager, [1, 2, 3]) == 2
    assert hit_tokens(manager, [1, 2, 4]) == 2
    assert manager.stats().partial_hits == 0


def test_a_hit_can_end_within_an_extent_of_many_blocks() -> None:
    manager = KVCacheManager(16, 4, COPY)
    cache(manager, list(range(40)))
    sequence = run(manager, [*range(18), 99])
    assert sequence.hit_tokens == 18
    assert manager.stats().partial_copied_tokens == 2
    assert sequence.block_table.tolist() == [0, 1, 2, 3, 10]
    manager.check_invariants()


def test_chunks_are_hit_in_units() -> None:
    manager = KVCacheManager(16, 8, COPY)
    content = ChunkContent([1, 2, 3], 6, 18)  # units of 2 tokens
    manager.release(manager.admit(content, 18))
    manager.pending_copies()
    match = manager.lookup(ChunkContent([1, 2, 4], 6, 18))
    assert match.hit_tokens == 12
    assert manager.lookup(ChunkContent([1, 4], 6, 12)).hit_tokens == 6
    assert manager.lookup(ChunkContent([1, 2], 6, 12)).hit_tokens == 10, (
        "whole units, the last token left out"
    )
    assert manager.lookup(ChunkContent([1, 2], 6, 11)).hit_tokens == 10
    assert manager.lookup(ChunkContent([1, 2], 6, 10)).hit_tokens == 8
    coarse = KVCacheManager(16, 4, COPY)
    coarse.release(coarse.admit(ChunkContent([1, 2], 4, 8), 8))
    coarse.pending_copies()
    assert coarse.lookup(ChunkContent([1, 3], 4, 8)).hit_tokens == 4, "a chunk is a block: it has no parts"


def test_a_prompt_of_which_nothing_is_known_has_no_parts() -> None:
    manager = KVCacheManager(16, 4, COPY)
    content = UniqueContent(10)
    manager.release(manager.admit(content, 10))
    manager.pending_copies()
    assert manager.lookup(content).hit_tokens == 8
    assert manager.lookup(UniqueContent(10)).hit_tokens == 0


def test_generated_tokens_are_hit_in_part_by_name() -> None:
    manager = KVCacheManager(16, 4, COPY)
    sequence = run(manager, [1, 2])
    manager.append([sequence], [[3, 4]], 2)
    manager.release(sequence)
    manager.pending_copies()
    assert hit_tokens(manager, [1, 2, 3, 9]) == 3
    unnamed = run(manager, [5, 6])
    manager.append([unnamed], None, 2)
    resumed = unnamed.content()
    manager.release(unnamed)
    manager.pending_copies()
    assert hit_tokens(manager, [5, 6, 3, 9]) == 2
    assert manager.lookup(resumed).hit_tokens == 3


# ------------------------------------------------ when


def test_what_the_step_computes_cannot_be_copied_in_it() -> None:
    manager = KVCacheManager(16, 4, COPY)
    first = manager.admit(TokenContent([1] * 8), 8)
    content = TokenContent([1] * 6 + [2] * 3)
    match = manager.lookup(content)
    assert match.hit_tokens == 4, "whole blocks can be read in the step that writes them"
    manager.pending_copies()
    assert not manager.is_current(match)
    assert manager.lookup(content).hit_tokens == 6
    manager.append([first], [[1] * 4], 4)
    longer = TokenContent([1] * 10 + [2])
    assert manager.lookup(longer).hit_tokens == 8
    manager.pending_copies()
    assert manager.lookup(longer).hit_tokens == 10
    manager.check_invariants()


def test_a_prompt_that_fills_the_pool_is_not_copied_to() -> None:
    """Its source would have to lie beside it: it could never start."""
    for prompt, hits in (([1, 1] + [2] * 10, 0), ([1, 1] + [2] * 6, 2)):
        manager = KVCacheManager(3, 4, COPY)
        cache(manager, [1] * 8)
        content = TokenContent(prompt)
        match = manager.lookup(content)
        assert match.hit_tokens == hits
        assert manager.can_admit(match, len(prompt) - hits)
        manager.admit(content, len(prompt) - hits, match)
        manager.check_invariants()


def test_refused_in_whole() -> None:
    manager = KVCacheManager(5, 4, COPY)
    cache(manager, [1] * 8)
    holder = run(manager, [9] * 8)
    content = TokenContent([1, 1] + [2] * 5)
    match = manager.lookup(content)
    assert (match.hit_tokens, manager.blocks_needed(match, 5)) == (2, 3)
    assert manager.can_admit(match, 5)
    manager.append([holder])
    assert not manager.can_admit(match, 5)
    before = manager.stats()
    with pytest.raises(OutOfBlocks, match="3 blocks needed, 2 free or evictable"):
        manager.admit(content, 5, match)
    assert manager.stats() == before
    assert manager.admit(content, 2, match).num_tokens == 4
    manager.check_invariants()


def test_what_the_host_builds_on_is_copied() -> None:
    """The second block of the first prompt is on the host: the first is interior, though the GPU has no more."""
    manager = KVCacheManager(3, 4, COPY, num_host_blocks=4)
    for ids in ([1] * 8, [2] * 8):
        manager.release(manager.admit(TokenContent(ids), 8))
        manager.transfers_done(manager.pending_swaps())
        manager.pending_copies()
    assert manager.lookup(TokenContent([1] * 9)).host_blocks == 1
    sequence = manager.admit(TokenContent([1, 1, 3]), 1)
    assert sequence.hit_tokens == 2
    manager.transfers_done(manager.pending_swaps())
    assert manager.pending_copies().tolist() == [[0, sequence.table[0], 2]]
    assert (manager.stats().partial_copies, manager.stats().stolen_blocks) == (1, 0)
    assert manager.lookup(TokenContent([1] * 9)).hit_blocks == 2
    manager.check_invariants()


def test_what_the_host_builds_on_is_not_taken_over_before_it_forgets() -> None:
    manager = KVCacheManager(3, 4, STEAL, num_host_blocks=2)

    def serve(ids: list[int]) -> None:
        content = TokenContent(ids)
        sequence = manager.admit(content, len(ids) - manager.lookup(content).hit_tokens)
        manager.transfers_done(manager.pending_swaps())
        manager.pending_copies()
        manager.release(sequence)

    serve([1] * 8)
    serve([2] * 8)  # pushes the second block of the first prompt out to the host
    serve([1] * 5)  # hits its first block, and pushes one more out
    assert manager.lookup(TokenContent([1] * 9)).host_blocks == 1
    assert manager.lookup(TokenContent([1, 1, 3])).partial is None
    serve([4] * 8)  # and one more: the host forgets the one that came first
    assert manager.lookup(TokenContent([1] * 9)).host_blocks == 0
    sequence = manager.admit(TokenContent([1, 1, 3]), 1)
    assert (sequence.hit_tokens, sequence.block_table.tolist()) == (2, [0])
    assert manager.stats().stolen_blocks == 1
    manager.check_invariants()


def test_off_by_default() -> None:
    manager = KVCacheManager(8, 4)
    cache(manager, [1] * 4)
    assert manager.lookup(TokenContent([1, 1, 1, 2])).partial is None
    assert hit_tokens(manager, [1, 1, 1, 2]) == 0


# ------------------------------------------------ the search

WORDS = st.lists(st.integers(0, 2), min_size=4, max_size=4).map(bytes)


def brute_force(keys: dict[bytes, None], query: bytes, unit: int) -> tuple[bytes, int]:
    def units(key: bytes) -> int:
        common = 0
        while common < min(len(key), len(query)) and key[common] == query[common]:
            common += 1
        return common // unit

    return max(((key, units(key)) for key in keys), key=lambda found: found[1])


@given(
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.sampled_from("aaaard"), WORDS, st.integers(0, 4)), max_size=80),
)
def test_a_fan_finds_what_comparing_all_finds(unit: int, steps: list[tuple[str, bytes, int]]) -> None:
    fan, keys = Fan(), dict[bytes, None]()
    for what, key, length in steps:
        if what == "a" and key not in fan:
            fan.add(key)
            keys[key] = None
        elif what == "d":
            fan.discard(key)
            keys.pop(key, None)
        elif keys:
            query = key[: length // unit * unit]
            assert fan.best(query, unit) == brute_force(keys, query, unit)
        assert list(fan.keys()) == list(keys)
        assert len(fan) == len(keys)


@pytest.mark.parametrize("config", [COPY, STEAL])
def test_the_cost_does_not_grow_with_the_children_of_a_hot_parent(config: CacheConfig) -> None:
    def costs(children: int) -> list[int]:
        rng = np.random.default_rng(0)
        manager = KVCacheManager(2 * children, 16, config)

        def prompt(tokens: int) -> list[int]:
            return [1] * 16 + rng.integers(0, 8, tokens).tolist()

        cache(manager, *(prompt(16) for _ in range(children)))
        contents = [TokenContent(prompt(17)) for _ in range(20)]
        assert manager.lookup(contents[0]).partial_tokens >= 2  # which makes the tree
        found = []
        for content in contents:
            found.append(count_lines(partial(manager.lookup, content)))
            sequence = manager.admit(content, 1)
            manager.pending_copies()
            found.append(count_lines(partial(manager.release, sequence)))
        return [max(found[::2]), max(found[1::2])]

    for few, many in zip(costs(64), costs(4000), strict=True):
        assert many < 2 * few
