"""Witness: stands between a pool and its policy, and checks what the two owe each other."""

from __future__ import annotations

from allocator.eviction import EvictionPolicy
from allocator.pool import BlockPool
from allocator.prefix import Extent, Root
from allocator.retention import DEFAULT_PRIORITY, Retention
from allocator.rules.references import Identity, Reference


class Witness(EvictionPolicy):
    """Pass everything on to a policy; check the contract, and each victim against the policy's reference.

    It keeps an account of its own of each extent: its blocks, and whether it is evictable and was exposed. The
    reference is told of single blocks, by what they say: what extents are is none of its business. Without a
    reference, the contract alone is checked. Raises AssertionError.
    """

    def __init__(
        self, policy: EvictionPolicy, reference: Reference | None = None, *, windowed: bool = False
    ) -> None:
        self.policy = policy
        self.reference = reference or _Anything(0)
        self.windowed = windowed  # blocks leave singly, in any order
        self.pool: BlockPool | None = None  # to read the time from
        self.blocks: dict[Extent, list[Identity]] = {}
        self.evictable: set[Extent] = set()
        self.exposed_once: set[Extent] = set()
        self.chosen: tuple[Extent, int] | None = None

    def attached(self, num_blocks: int) -> None:
        assert num_blocks > 0
        assert not self.blocks, "the pool's size comes first"
        self.policy.attached(num_blocks)

    def _read_time(self) -> None:
        if self.pool is not None and self.pool.now != self.reference.now:
            self.reference.pass_time(self.pool.now)

    def cached(self, extent: Extent, num_blocks: int) -> None:
        blocks = self.blocks.setdefault(extent, [])
        assert len(blocks) + num_blocks == len(extent.ids) == extent.num_blocks
        assert num_blocks > 0
        assert extent.references > 0, "content is cached by whoever computed it"
        assert extent not in self.evictable
        new = self._identities(extent)[len(blocks) :]
        blocks += new
        for block in new:
            self.reference.cached(block)
        self.policy.cached(extent, num_blocks)

    @staticmethod
    def _identities(extent: Extent) -> list[Identity]:
        """Return what the blocks of an extent say, and all before them."""
        path = list(extent.path())[::-1]
        root = path[0].parent
        assert isinstance(root, Root)
        name: Identity = ("root", (root.family, root.salt))
        names = []
        for each in path:
            for at in range(0, len(each.keys), each.width):
                name = (name, bytes(each.keys[at : at + each.width]))
                names.append(name)
        return names[extent.start :]

    def hit(self, extent: Extent) -> None:
        assert extent.references > 0
        assert extent not in self.evictable, "referenced comes before hit"
        for block in self.blocks[extent]:
            self.reference.hit(block)
        self.policy.hit(extent)

    def referenced(self, extent: Extent) -> None:
        self._read_time()
        self.evictable.remove(extent)
        self.exposed_once.discard(extent)
        for block in self.blocks[extent]:
            self.reference.referenced(block)
        self.policy.referenced(extent)

    def released(self, extent: Extent) -> None:
        self._read_time()
        assert extent not in self.evictable
        assert extent.references == 0
        children = [child for child in (extent.children or {}).values() if child.ids]
        assert self.windowed or all(child in self.evictable for child in children), "parents come last"
        assert not self.windowed or len(extent.ids) == 1
        self.evictable.add(extent)
        for block in reversed(self.blocks[extent]):
            self.reference.retained(block, *(extent.retention or Retention(DEFAULT_PRIORITY)))
            self.reference.released(block)
        self.policy.released(extent)

    def exposed(self, extent: Extent) -> None:
        assert extent in self.evictable
        assert self.windowed or extent.live_children == 0
        self.exposed_once.add(extent)
        self.policy.exposed(extent)

    def expired(self, extent: Extent) -> None:
        self._read_time()
        assert extent in self.evictable, "only what is evictable can expire"
        assert extent.retention is None
        self.policy.expired(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        whole, cut = self.blocks[tail], len(head.ids)
        assert len(whole) == cut + len(tail.ids)
        assert head.ids
        assert tail.ids
        self.blocks[head], self.blocks[tail] = whole[:cut], whole[cut:]
        assert tail.parent is head
        if tail in self.evictable:
            self.evictable.add(head)
        self.policy.split(head, tail)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        blocks = self.blocks[extent]
        if extent in self.evictable:
            assert self.chosen == (extent, num_blocks), "only the victim is evicted"
            self.chosen = None
        else:
            for block in blocks[: -num_blocks - 1 : -1]:
                self.reference.uncached(block)
        del blocks[-num_blocks:]
        assert len(blocks) == len(extent.ids)
        if not blocks:
            del self.blocks[extent]
            self.evictable.discard(extent)
            self.exposed_once.discard(extent)
        self.policy.evicted(extent, num_blocks)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        self._read_time()
        assert wanted > 0
        assert self.evictable
        extent, count = self.policy.victim(wanted)
        assert extent in self.evictable, "a victim is evictable"
        assert extent in self.exposed_once, "a victim was said to be exposed"
        assert extent.references == 0
        assert self.windowed or extent.live_children == 0
        assert 1 <= count <= min(wanted, len(extent.ids))
        gone: set[Identity] = set()
        for block in self.blocks[extent][: -count - 1 : -1]:
            leaves = self.leaves(gone)
            assert block in leaves
            expected = self.reference.victim(leaves)
            assert expected in (None, block), f"{type(self.reference).__name__} takes {expected}, not {block}"
            gone.add(block)
            del self.reference.order[block]
            self.reference.evicted(block)
        self.chosen = extent, count
        return extent, count

    def leaves(self, gone: set[Identity]) -> set[Identity]:
        """Return the evictable blocks without cached children, once those in `gone` are evicted.

        In a windowed cache these are all evictable blocks.
        """
        left = [block for blocks in self.blocks.values() for block in blocks if block not in gone]
        parents = set() if self.windowed else {block[0] for block in left}
        evictable = {block for extent in self.evictable for block in self.blocks[extent]}
        return evictable - parents - gone


class _Anything(Reference):
    """Agrees with every policy."""

    def victim(self, leaves: set[Identity]) -> Identity:
        return None  # type: ignore[return-value]
