"""Every policy keeps the contract, and evicts block by block what its published algorithm would."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from allocator.content import TokenContent
from allocator.eviction import FIFO, LRU, POLICIES, EvictionPolicy, make_policy
from allocator.fuzz import AllocatorMachine, ManagerMachine, ReuseMachine, WindowMachine, run_machine
from allocator.manager import KVCacheManager
from allocator.prefix import Extent


class PerBlockLRU:
    """Single blocks in the order in which they became unreferenced."""

    def __init__(self) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()

    def cached(self, block: int) -> None: ...
    def hit(self, block: int) -> None: ...
    def released(self, block: int) -> None:
        self.order[block] = None

    def referenced(self, block: int) -> None:
        del self.order[block]

    def gone(self, block: int) -> None:
        self.order.pop(block, None)

    def victim(self, leaves: set[int]) -> int:
        return next(block for block in self.order if block in leaves)


class PerBlockFIFO:
    """Single blocks, numbered as they were cached."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.next = 0

    def cached(self, block: int) -> None:
        self.numbers[block] = self.next
        self.next += 1

    def hit(self, block: int) -> None: ...
    def released(self, block: int) -> None: ...
    def referenced(self, block: int) -> None: ...
    def gone(self, block: int) -> None:
        del self.numbers[block]

    def victim(self, leaves: set[int]) -> int:
        return min(leaves, key=self.numbers.__getitem__)


class NoReference:
    """For policies whose reference is elsewhere: the contract alone is checked."""

    def cached(self, block: int) -> None: ...
    def hit(self, block: int) -> None: ...
    def released(self, block: int) -> None: ...
    def referenced(self, block: int) -> None: ...
    def gone(self, block: int) -> None: ...
    def victim(self, leaves: set[int]) -> None: ...


REFERENCES: dict[str, type[Any]] = {"lru": PerBlockLRU, "fifo": PerBlockFIFO}


class Witness(EvictionPolicy):
    """Passes everything on to a policy, and checks what pool and policy owe each other.

    It keeps its own account of each extent: its blocks, and whether it is referenced, evictable, exposed.
    """

    evictions = 0

    def __init__(self, policy: EvictionPolicy, reference: Any, *, windowed: bool = False) -> None:
        self.policy, self.reference = policy, reference
        self.windowed = windowed  # blocks leave singly, in any order
        self.blocks: dict[Extent, list[int]] = {}
        self.evictable: set[Extent] = set()
        self.exposed_once: set[Extent] = set()
        self.chosen: tuple[Extent, int] | None = None

    def attached(self, num_blocks: int) -> None:
        assert num_blocks > 0
        assert not self.blocks, "the pool's size comes first"
        self.policy.attached(num_blocks)

    def cached(self, extent: Extent, num_blocks: int) -> None:
        blocks = self.blocks.setdefault(extent, [])
        new = extent.ids[len(blocks) :].tolist()
        assert len(new) == num_blocks > 0
        assert extent.references > 0, "content is cached by whoever computed it"
        assert extent not in self.evictable
        blocks += new
        for block in new:
            self.reference.cached(block)
        self.policy.cached(extent, num_blocks)

    def hit(self, extent: Extent) -> None:
        assert extent.references > 0
        assert extent not in self.evictable, "referenced comes before hit"
        for block in self.blocks[extent]:
            self.reference.hit(block)
        self.policy.hit(extent)

    def referenced(self, extent: Extent) -> None:
        self.evictable.remove(extent)
        self.exposed_once.discard(extent)
        for block in self.blocks[extent]:
            self.reference.referenced(block)
        self.policy.referenced(extent)

    def released(self, extent: Extent) -> None:
        assert extent not in self.evictable
        assert extent.references == 0
        children = [child for child in (extent.children or {}).values() if child.ids]
        assert self.windowed or all(child in self.evictable for child in children), "parents come last"
        assert not self.windowed or len(extent.ids) == 1
        self.evictable.add(extent)
        for block in reversed(self.blocks[extent]):
            self.reference.released(block)
        self.policy.released(extent)

    def exposed(self, extent: Extent) -> None:
        assert extent in self.evictable
        assert self.windowed or extent.live_children == 0
        self.exposed_once.add(extent)
        self.policy.exposed(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        whole = self.blocks[tail]
        assert whole == head.ids.tolist() + tail.ids.tolist()
        self.blocks[head], self.blocks[tail] = head.ids.tolist(), tail.ids.tolist()
        assert tail.parent is head
        assert head.ids
        assert tail.ids
        if tail in self.evictable:
            self.evictable.add(head)
        self.policy.split(head, tail)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if extent in self.evictable:
            assert self.chosen == (extent, num_blocks), "only the victim is evicted"
            self.chosen = None
        blocks = self.blocks[extent]
        for block in reversed(blocks[-num_blocks:]):
            self.reference.gone(block)
        del blocks[-num_blocks:]
        assert blocks == extent.ids.tolist()
        if not blocks:
            del self.blocks[extent]
            self.evictable.discard(extent)
            self.exposed_once.discard(extent)
        self.policy.evicted(extent, num_blocks)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        assert wanted > 0
        assert self.evictable
        extent, count = self.policy.victim(wanted)
        assert extent in self.evictable, "a victim is evictable"
        assert extent in self.exposed_once, "a victim was said to be exposed"
        assert extent.references == 0
        assert self.windowed or extent.live_children == 0
        assert 1 <= count <= min(wanted, len(extent.ids))
        gone: list[int] = []
        for block in reversed(extent.ids[-count:]):
            expected = self.reference.victim(self.leaves(gone))
            assert expected in (None, block), "the reference takes another block"
            gone.append(block)
        type(self).evictions += count
        self.chosen = extent, count
        return extent, count

    def leaves(self, gone: list[int]) -> set[int]:
        """Return the evictable blocks without cached children, once those in `gone` are evicted.

        In a windowed cache these are all evictable blocks.
        """
        parents, blocks = set(), set()
        for extent in self.blocks:
            left = [block for block in extent.ids if block not in gone]
            parents.update(left[:-1])
            if left and extent.parent is not None and extent.parent.ids:
                parents.add(extent.parent.ids[-1])
            if extent in self.evictable:
                blocks.update(left)
        return blocks if self.windowed else blocks - parents


def witnessed(base: type[ManagerMachine], policy: str) -> Any:
    class Witnessed(base):  # type: ignore[valid-type,misc]
        policies: ClassVar = (policy,)

        def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> KVCacheManager:
            windowed = self.window is not None
            witness = Witness(make_policy(policy), REFERENCES.get(policy, NoReference)(), windowed=windowed)
            return KVCacheManager(
                num_blocks,
                tokens_per_block,
                self.cache_config(reuse),
                policy=witness,
                ghost_blocks=self.ghosts,
                events=self.keeps_log,
            )

    return Witnessed


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_contract_and_reference(policy: str) -> None:
    before = Witness.evictions
    run_machine(witnessed(ReuseMachine, policy), 800, seed_=11)
    run_machine(witnessed(AllocatorMachine, policy), 500, seed_=12)
    run_machine(witnessed(WindowMachine, policy), 500, seed_=13)
    assert Witness.evictions - before > 20


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
