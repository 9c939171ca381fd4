"""What the allocator's operations cost, counted in lines of Python: neither the pool's size nor what is cached counts.

Wall time says little on a busy machine; lines executed are exact, and the same everywhere. So that a search in C, by
list.remove for example, counts as well, extents are made to be compared in Python here.
"""

from __future__ import annotations

import pytest

from allocator.content import TokenContent
from allocator.eviction import POLICIES, EvictionPolicy, make_policy
from allocator.manager import KVCacheManager, KVSequence
from allocator.prefix import Extent
from allocator.rules.cost import count_lines

SIZE = 16
POOLS = (10_000, 1_000_000, 10_000_000)


@pytest.fixture(autouse=True)
def comparisons_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(one: Extent, other: object) -> bool:
        return one is other

    monkeypatch.setattr(Extent, "__eq__", same)
    monkeypatch.setattr(Extent, "__hash__", object.__hash__)


def prompt(first: int, blocks: int = 8) -> TokenContent:
    """Return a prompt that begins with a block of its own."""
    return TokenContent([first] * SIZE + list(range(SIZE * (blocks - 1))) + [7])


def cached(manager: KVCacheManager, prompts: int) -> None:
    """Leave content of that many prompts, and ghosts of as many, in the cache."""
    for first in range(prompts):
        content = prompt(1000 + first)
        manager.release(manager.admit(content, content.num_prompt_tokens))


def fill(manager: KVCacheManager) -> None:
    """Use up what is free, so that each further block has to be evicted."""
    content = TokenContent([999_999] * (SIZE * manager.pool.num_free))
    manager.release(manager.admit(content, content.num_prompt_tokens))
    assert manager.pool.num_free == 0


def life(manager: KVCacheManager) -> dict[str, int]:
    """Return the lines of each operation of some requests, at the same moments of their lives."""
    batch = manager.batch()
    members = [manager.admit(prompt(i), 8 * SIZE + 1) for i in range(8)]
    for member in members:
        batch.add(member)
    tokens = [3] * len(members)
    for _ in range(4 * SIZE):
        manager.append(batch, tokens)
    counts = {"append": sum(count_lines(lambda: manager.append(batch, tokens)) for _ in range(2 * SIZE))}
    new, repeated = prompt(50), prompt(0)
    kept: list[KVSequence] = []
    for name, content in (("new", new), ("repeated", repeated)):
        match = manager.lookup(content)
        counts[f"look up {name}"] = count_lines(lambda content=content: manager.lookup(content))
        left = content.num_prompt_tokens - match.hit_tokens
        admit = lambda c=content, n=left: kept.append(manager.admit(c, n))  # noqa: E731
        counts[f"admit {name}"] = count_lines(admit)
    counts["join"] = count_lines(lambda: batch.add(kept[0]))
    counts["leave"] = count_lines(lambda: batch.remove(kept[0]))
    counts["release"] = sum(count_lines(lambda s=s: manager.release(s)) for s in [*members, *kept])
    return counts


@pytest.mark.parametrize("full", [False, True], ids=["free blocks", "evicting"])
def test_no_operation_grows_with_the_pool(full: bool) -> None:
    found = []
    for num_blocks in POOLS[: 2 if full else 3]:
        manager = KVCacheManager(num_blocks, SIZE)
        if full:
            fill(manager)
        found.append(life(manager))
    assert all(counts == found[0] for counts in found), found


def test_no_operation_grows_with_what_is_cached() -> None:
    found = []
    for prompts in (10, 100, 2000):
        manager = KVCacheManager(100_000, SIZE)
        cached(manager, prompts)
        found.append(life(manager))
    assert all(counts == found[0] for counts in found), found


def test_no_operation_grows_with_the_evictions_before() -> None:
    """Ghosts, and the order of what can be evicted, are as cheap when there are many."""
    found = []
    for prompts in (200, 2000):
        manager = KVCacheManager(500, SIZE, ghost_blocks=100_000)
        cached(manager, prompts)
        found.append(life(manager))
    assert all(counts == found[0] for counts in found), found


def test_a_token_costs_less_the_more_sequences_decode() -> None:
    """A step has a cost of its own, and one for each block that starts and fills: no other for its members."""

    def step(members: int) -> int:
        manager = KVCacheManager(10_000, SIZE)
        batch = manager.batch()
        for i in range(members):
            batch.add(manager.admit(prompt(i), 8 * SIZE + 1))  # all at the same place of their blocks
        tokens = [3] * members
        manager.append(batch, tokens)
        return count_lines(lambda: manager.append(batch, tokens))

    assert step(1) == step(8) == step(64)


def test_an_admission_costs_by_the_extent_not_by_the_block() -> None:
    def admission(blocks: int) -> tuple[int, int]:
        manager = KVCacheManager(10_000, SIZE)
        manager.pool.give(
            manager.pool.take(10_000)
        )  # the first time a block is used, it comes with many others
        content = prompt(1, blocks)
        first = count_lines(lambda: manager.admit(content, content.num_prompt_tokens))
        match = manager.lookup(content)
        left = content.num_prompt_tokens - match.hit_tokens
        return first, count_lines(lambda: manager.admit(content, left, match))

    assert admission(8) == admission(64) == admission(4096)


def test_what_an_admission_needs_is_told_without_looking_at_its_hits() -> None:
    """Right after the lookup, and when a reference at the front of the path, or all along it, has come or gone."""

    def answers(extents: int) -> list[int]:
        manager = KVCacheManager(10_000, SIZE)
        ids = [1] * (SIZE * extents + 1)
        content = TokenContent(ids)
        manager.release(manager.admit(content, len(ids)))
        for branch in range(1, extents):  # leaves the path after so many blocks, and so cuts an extent there
            branching = TokenContent(ids[: SIZE * branch] + [2 + branch] * SIZE)
            left = branching.num_prompt_tokens - manager.lookup(branching).hit_tokens
            manager.release(manager.admit(branching, left))
        match = manager.lookup(content)
        assert len(match.path) == extents == match.evictable_blocks
        counts = []

        def ask(needed: int) -> None:
            counts.append(count_lines(lambda: manager.blocks_needed(match, 1)))
            counts.append(count_lines(lambda: manager.can_admit(match, 1)))
            assert manager.blocks_needed(match, 1) == needed
            assert manager.is_current(match)

        ask(extents + 1)
        head = manager.admit(TokenContent(ids[: SIZE + 1]), 1)
        ask(extents)
        manager.release(head)
        ask(extents + 1)
        whole = manager.admit(content, 1)
        assert manager.blocks_needed(match, 1) == 1  # here it pays for all that have been referenced since
        ask(1)
        counts.append(count_lines(lambda: manager.remaining_blocks(whole, 10_000)))
        return counts

    assert answers(1) == answers(10) == answers(100)


class ListLRU(EvictionPolicy):
    """LRU on a list, from which an extent is taken out by a search."""

    def __init__(self) -> None:
        self.order: list[Extent] = []

    def released(self, extent: Extent) -> None:
        self.order.append(extent)

    def referenced(self, extent: Extent) -> None:
        if extent in self.order:
            self.order.remove(extent)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids and extent in self.order:
            self.order.remove(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        return self.order[0], min(wanted, len(self.order[0].ids))


@pytest.mark.parametrize("policy", [ListLRU, *(type(make_policy(name)) for name in POLICIES)])
def test_taking_out_of_the_middle_of_the_eviction_order_is_no_search(policy: type[EvictionPolicy]) -> None:
    def hit_of_the_middle(prompts: int) -> int:
        manager = KVCacheManager(20 * prompts, SIZE, policy=policy())
        cached(manager, prompts)
        content = prompt(1000 + prompts // 2)
        match = manager.lookup(content)
        assert match.hit_blocks
        left = content.num_prompt_tokens - match.hit_tokens
        return count_lines(lambda: manager.admit(content, left, match))

    few, many = hit_of_the_middle(16), hit_of_the_middle(1600)
    if policy is ListLRU:
        assert many > few + 700, "a search through a list goes unnoticed"
    else:
        assert many == few


def test_counting_sees_a_loop_over_the_pool() -> None:
    """The measure itself: a manager that looks at each of its blocks is found out."""

    class Slow(KVCacheManager):
        def release(self, sequence: KVSequence) -> None:
            for _ in range(self.num_blocks):
                pass
            super().release(sequence)

    assert life(Slow(2000, SIZE))["release"] > life(Slow(1000, SIZE))["release"]
