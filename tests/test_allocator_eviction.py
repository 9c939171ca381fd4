"""Every policy keeps the contract, and evicts block by block what its published algorithm would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from allocator.content import TokenContent
from allocator.eviction import FIFO, LRU, POLICIES, EvictionPolicy, make_policy
from allocator.fuzz import AllocatorMachine, PolicyMachine, WindowMachine, run_machine
from allocator.manager import KVCacheManager
from allocator.rules.policies import PolicyRules


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_contract_and_reference(policy: str) -> None:
    for bases, steps in (
        ((PolicyMachine,), 400),
        ((PolicyRules, AllocatorMachine), 400),
        ((PolicyRules, WindowMachine), 300),
    ):
        machine = type("Witnessed", bases, {"policies": (policy,)})
        assert run_machine(machine, steps, seed_=11).evictions > 10


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_all_that_is_evictable_can_be_evicted(policy: str) -> None:
    manager = KVCacheManager(12, 2, policy=make_policy(policy))
    for ids in ([0] * 8, [0] * 4 + [1] * 4, [0] * 6 + [1] * 2, [1] * 6):
        content = TokenContent(ids)
        manager.release(manager.admit(content, len(ids) - manager.lookup(content).hit_tokens))
    evictable = manager.stats().evictable_blocks
    assert evictable > 8
    assert len(set(manager.pool.take(12))) == 12
    assert manager.stats().evicted_blocks == evictable


def test_a_hit_saves_from_lru_only() -> None:
    def order(policy: EvictionPolicy) -> list[int]:
        manager = KVCacheManager(5, 2, policy=policy)
        prompts = [TokenContent([i, i, 99]) for i in range(3)]
        for prompt in prompts:
            manager.release(manager.admit(prompt, 3))
        hit = manager.admit(prompts[0], 1)
        assert hit.hit_blocks == 1
        manager.release(hit)
        manager.pool.take(manager.pool.num_free)
        gone = []
        while len(gone) < 3:
            manager.pool.take(1)
            gone += [i for i in range(3) if i not in gone and not manager.lookup(prompts[i]).hit_blocks]
        return gone

    assert order(LRU()) == [1, 2, 0]
    assert order(FIFO()) == [0, 1, 2]


def test_policies_by_name() -> None:
    assert isinstance(make_policy("lru"), LRU)
    assert isinstance(make_policy("allocator.eviction.fifo:FIFO"), FIFO)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random", r"policy \(random\) must be one of .*lru"),
        ("no.such.module:LRU", r"policy \(no.such.module:LRU\) cannot be imported"),
        ("allocator.eviction:Nothing", "cannot be imported"),
        ("allocator.manager:KVCacheManager", "must be a subclass of allocator.eviction.EvictionPolicy"),
        (":", "cannot be imported"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no')", r"policy \(odd:P\) cannot be imported: no"),
        ("def (", r"policy \(odd:P\) cannot be imported"),
        ("P = 3", r"policy \(odd:P\) must be a subclass"),
        ("Q = 3", r"policy \(odd:P\) cannot be imported: .* no attribute"),
        (
            "from allocator.eviction import LRU\n\nclass P(LRU):\n    def __init__(self, n): ...",
            r"policy \(odd:P\) cannot be made without arguments",
        ),
        (
            "from allocator.eviction import EvictionPolicy\n\nclass P(EvictionPolicy): ...",
            r"policy \(odd:P\) cannot be made without arguments: .* abstract",
        ),
    ],
)
def test_a_policy_that_cannot_be_made_is_named(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    with pytest.raises(ValueError, match=message):
        make_policy("odd:P")
    monkeypatch.delitem(sys.modules, "odd", raising=False)
