"""PartialReuse: the part of a cached block that a prompt agrees with, found, then copied or taken over.

Where a lookup ends, the cache can still hold blocks that begin as the prompt goes on. Of those, the *candidates*,
the one with most leading tokens in common is used:

    copied     to a fresh block, if tables hold it or cached blocks build on it
    stolen     if neither: it leaves the index and goes to the sequence as it is
    candidate  for copying, any cached block; with `copy` False, only one that could be stolen

Only what was computed in an earlier step can be used: a list of copies runs before the writes of its step. A
step ends, for the cache, when its copies are asked for (`pending_copies`).

In a windowed cache, what is hit in part lies right behind the deepest whole hit. What that needs of the window
serves the tokens behind, too, so it is held as for a query right behind the whole blocks.

The same rules as TensorRT-LLM's partial reuse (`enablePartialReuse`, `copyOnPartialReuse`), but for the search:
that compares all children of a node, while the cost here does not depend on their number (see Fan).
"""

from __future__ import annotations

from typing import NamedTuple

from allocator.content import Content
from allocator.overlap import Fan
from allocator.prefix import Extent, PrefixIndex, common_blocks


class PartialHit(NamedTuple):
    """Block `at` of `extent`, of which a prompt agrees with the first `num_tokens` tokens, but not with all."""

    extent: Extent
    at: int
    num_tokens: int
    has_host: bool = False
    """Whether there is a host tier, which might hold what builds on the block."""

    @property
    def can_be_stolen(self) -> bool:
        """Return whether nobody holds the block and no cached block builds on it."""
        extent = self.extent
        return self.at == len(extent.ids) - 1 and is_free_leaf(extent, has_host=self.has_host)


def is_free_leaf(extent: Extent, *, has_host: bool = False) -> bool:
    """Return whether an extent has blocks, but neither references nor cached children, here or on the host."""
    if not extent.ids or extent.references or extent.live_children:
        return False
    if not has_host:
        return True
    return extent.host is None and all(child.host is None for child in (extent.children or {}).values())


class PartialReuse:
    """The candidates below each extent, and what the step being scheduled computes.

    The pool says what happens to extents: `cached`, `changed` (references, children, blocks, parent). Of equal
    overlaps, the block that has been a candidate for longest is found.
    """

    def __init__(self, index: PrefixIndex, num_blocks: int, *, copy: bool, has_host: bool = False) -> None:
        self.copy = copy
        self.has_host = has_host
        self._index = index
        self.num_blocks = num_blocks
        self._fans: dict[Extent, Fan] = {}  # by parent; of extents, the first block is the candidate
        self._fresh: set[int] = set()  # blocks that the step being scheduled fills
        self._waiting: dict[Extent, None] = {}  # extents that begin with one

    # -------------------------------------------------------- what can be found

    def cached(self, extent: Extent, num_blocks: int) -> None:
        """Note that `num_blocks` blocks were appended to `extent`, and are being filled."""
        self._fresh.update(extent.ids[-num_blocks:])
        if num_blocks == len(extent.ids):
            self._waiting[extent] = None

    def changed(self, extent: Extent) -> None:
        """Note that an extent has got or lost references, cached children, blocks, or another parent."""
        if not self.copy:
            self._index.version += 1
        parent = extent.parent
        assert parent is not None
        key = extent.first_key
        fan = self._fans.get(parent)
        if extent.ids and extent.ids[0] in self._fresh:
            self._waiting[extent] = None
        elif self._is_candidate(extent):
            if fan is None:
                fan = self._fans[parent] = Fan()
            if key not in fan:
                fan.add(key)
        elif fan is not None:
            fan.discard(key)
            if not fan:
                del self._fans[parent]

    def _is_candidate(self, extent: Extent) -> bool:
        """Return whether the first block of an extent, not being filled right now, can be used."""
        if self.copy:
            return bool(extent.ids)
        return len(extent.ids) == 1 and is_free_leaf(extent, has_host=self.has_host)

    def end_step(self) -> None:
        """Note that whatever is filled is computed before anything that is scheduled from now on."""
        if self._fresh:
            self._fresh.clear()
            self._index.version += 1
            waiting = list(self._waiting)
            self._waiting.clear()
            for extent in waiting:
                if extent.ids:
                    self.changed(extent)

    # -------------------------------------------------------- finding it

    def find_hit(
        self,
        parent: Extent,
        at: int,
        content: Content,
        tokens_per_block: int,
        hit_blocks: int,
        prompt_blocks: int,
    ) -> PartialHit | None:
        """Return what a prompt hits of a block beyond its `hit_blocks`, its last token apart; see `find`."""
        query, unit = content.block_units(tokens_per_block, hit_blocks)
        found = self.find(parent, at, query, unit, prompt_blocks)
        if found is None:
            return None
        extent, at, units = found
        tokens = tokens_per_block * unit // parent.width  # of a unit
        units = min(units, (content.num_prompt_tokens - 1 - hit_blocks * tokens_per_block) // tokens)
        return PartialHit(extent, at, units * tokens, self.has_host) if units else None

    def find(
        self, parent: Extent, at: int, query: bytes, unit: int, prompt_blocks: int
    ) -> tuple[Extent, int, int] | None:
        """Return (extent, its block, units in common) for the candidate that agrees with most of `query`, or None.

        parent         the extent (or root) in which a lookup ends, after `at` of its blocks
        query          keys of the units that follow there, `unit` bytes each, at most a block's
        prompt_blocks  blocks that the prompt needs at once, at the least, to be computed
        """
        if self.copy and prompt_blocks >= self.num_blocks:
            return None  # a copy needs its source beside it: the prompt could never start
        if at < len(parent.ids):
            width = parent.width
            if parent.ids[at] in self._fresh:
                return None
            if not self.copy and not PartialHit(parent, at, 0, self.has_host).can_be_stolen:
                return None
            return parent, at, common_blocks(parent.keys[at * width : (at + 1) * width], query, 0, unit)
        fan = self._fans.get(parent)
        if fan is None:
            return None
        assert parent.children is not None
        key, units = fan.best(query, unit)
        return parent.children[key], 0, units

    # -------------------------------------------------------- invariants

    def check(self) -> None:
        """Recount the candidates from the tree. Raises AssertionError where a fan is off."""
        expected: dict[Extent, set[bytes]] = {}
        for extent in self._index.extents():
            if not extent.ids or extent.ids[0] in self._fresh:
                assert not extent.ids or extent in self._waiting, f"{extent} will never be a candidate"
            elif self._is_candidate(extent):
                assert extent.parent is not None
                expected.setdefault(extent.parent, set()).add(extent.first_key)
        found = {parent: set(fan.keys()) for parent, fan in self._fans.items()}
        assert found == expected, "the candidates for partial reuse are not those in the tree"
