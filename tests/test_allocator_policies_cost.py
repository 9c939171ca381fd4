"""What an eviction costs does not grow with how much is cached, whichever the policy. Counted in lines of Python.

A search in C (`list.remove`, `in` a list) would not count, so extents are made to be compared in Python. What a heap
does in C is logarithmic by construction.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest

from allocator.content import TokenContent
from allocator.eviction import POLICIES, Belady, EvictionPolicy, WeightedBelady
from allocator.eviction.lru import LRU
from allocator.manager import KVCacheManager
from allocator.prefix import Extent
from allocator.rules.cost import count_lines

CLASSES: dict[str, type[EvictionPolicy]] = {
    **POLICIES,
    "belady": Belady,
    "weighted belady": WeightedBelady,
}
EXTENTS = (100, 2500)
EVICTIONS = 100


@pytest.fixture(autouse=True)
def comparisons_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(one: Extent, other: object) -> bool:
        return one is other

    monkeypatch.setattr(Extent, "__eq__", same)
    monkeypatch.setattr(Extent, "__hash__", object.__hash__)


def lines_an_eviction(policy: EvictionPolicy, extents: int) -> float:
    """Return how many lines the allocator runs for each request that takes a block from a full pool.

    The pool holds `extents` extents of a block; every third one was hit once and every tenth three times. Half of the
    requests counted find a cached block first, so that the order changes between evictions.
    """
    manager = KVCacheManager(extents + 1, 1, policy=policy, ghost_blocks=extents)
    contents = [TokenContent([number, 0]) for number in range(extents + EVICTIONS)]
    hits = [number for number in range(extents) if number % 3 == 0]
    hits += 2 * [number for number in range(extents) if number % 10 == 0]
    again = [number for number in range(extents // 2, extents) if number % 3][:EVICTIONS:2]
    order = [*range(extents), *hits]
    for step in range(EVICTIONS):
        order += again[step : step + 1] if step % 2 else []
        order.append(extents + step)
    if isinstance(policy, Belady):
        numbers = [policy.foresee(contents[number], 1) for number in order]

    def serve(steps: range) -> None:
        for step in steps:
            if isinstance(policy, Belady):
                policy.begin(numbers[step])
            content = contents[order[step]]
            match = manager.lookup(content)
            manager.release(manager.admit(content, 2 - match.hit_tokens, match))

    warm = extents + len(hits)
    serve(range(warm))
    evicted = manager.stats().evicted_blocks
    lines = count_lines(lambda: serve(range(warm, len(order))))
    count = manager.stats().evicted_blocks - evicted
    assert count >= EVICTIONS
    return lines / count


@pytest.mark.parametrize("name", CLASSES)
def test_an_eviction_costs_the_same_among_many_times_as_many_extents(name: str) -> None:
    few, many = (lines_an_eviction(CLASSES[name](), extents) for extents in EXTENTS)
    assert many < 1.25 * few, f"{few:.0f} and {many:.0f} lines"


class Scanning(LRU):
    """LRU as it should not be: it looks at every extent to find the oldest."""

    def __init__(self) -> None:
        super().__init__()
        self._known: OrderedDict[Extent, None] = OrderedDict()

    def exposed(self, extent: Extent) -> None:
        super().exposed(extent)
        self._known[extent] = None

    def victim(self, wanted: int) -> tuple[Extent, int]:
        for extent in self._known:
            if not extent.ids:
                continue
        return super().victim(wanted)


def test_a_policy_that_scans_is_noticed() -> None:
    few, many = (lines_an_eviction(Scanning(), extents) for extents in (100, 1000))
    assert many > math.log2(10) * few
