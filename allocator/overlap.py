"""Fan: which of many blocks has most in common, from its front, with one that is not among them.

    parent ──┬─ [the cat sat on]   ◀── 3 tokens in common with "the cat sat up": the best overlap
             ├─ [the dog sat on]       1
             └─ [all cats sit up]      0

Whose front those blocks are, and which of them may be used, is not decided here: see allocator.partial.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from allocator.prefix import common_blocks

_FEW = 8
"""Candidates that are simply compared one by one; a tree is made where there are more."""


class _Node:
    """Keys that agree on their first `depth` units, in the order in which they came, and how they go on."""

    __slots__ = ("branches", "depth", "keys")

    def __init__(self, depth: int, keys: OrderedDict[bytes, None]) -> None:
        self.depth = depth
        self.keys = keys
        self.branches: dict[bytes, _Node | bytes] = {}  # by the unit at `depth`; a lone key stands for itself


class Fan:
    """Distinct keys of one width, made of units, among which to find the best overlap with a query.

    `best` returns the key with most leading units in common with the query; of equals, the one added first.
    Keys are kept in a path-compressed tree over units, in which each node lists the keys below it in their
    order. So a search costs at most one look-up for each unit of a block, whatever the number of keys. So does a
    change, averaged over changes (a key is listed anew only where the tree grows a level above it); the tree is
    made when a search first finds more than a few keys.
    """

    __slots__ = ("_keys", "_top", "_unit")

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._top: _Node | None = None
        self._unit = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def keys(self) -> Iterator[bytes]:
        """Yield the keys in the order in which they were added."""
        return iter(self._keys)

    def add(self, key: bytes) -> None:
        """Add a key that is not here yet."""
        self._keys[key] = None
        if self._top is not None:
            self._insert(self._top, key)

    def discard(self, key: bytes) -> None:
        """Take a key out if it is here."""
        if key in self._keys:
            del self._keys[key]
            if not self._keys:
                self._top = None
            elif self._top is not None:
                self._remove(self._top, key)

    def best(self, query: bytes, unit: int) -> tuple[bytes, int]:
        """Return the key with most units of `unit` bytes in common with the query, and how many. Not when empty."""
        if self._top is None and len(self._keys) <= _FEW:
            best, most = b"", -1
            for key in self._keys:
                units = common_blocks(key, query, 0, unit)
                if units > most:
                    best, most = key, units
            return best, most
        if self._top is None:
            self._unit = unit
            self._top = _Node(0, OrderedDict())
            for key in self._keys:
                self._insert(self._top, key)
        node = self._top
        while True:
            first = next(iter(node.keys))
            shared = common_blocks(first[: node.depth * unit], query, 0, unit)
            if shared < node.depth:
                return first, shared
            below = node.branches.get(query[shared * unit : (shared + 1) * unit])
            if below is None:
                return first, shared
            if isinstance(below, bytes):
                return below, common_blocks(below, query, 0, unit)
            node = below

    def _insert(self, node: _Node, key: bytes) -> None:
        unit = self._unit
        while True:  # `node` agrees with the key on all its depth
            node.keys[key] = None
            branch = key[node.depth * unit : (node.depth + 1) * unit]
            below = node.branches.get(branch)
            if below is None:
                node.branches[branch] = key
                return
            other = below if isinstance(below, bytes) else next(iter(below.keys))
            shared = common_blocks(other, key, 0, unit)
            if isinstance(below, bytes) or shared < below.depth:
                keys = OrderedDict({below: None}) if isinstance(below, bytes) else below.keys.copy()
                between = _Node(shared, keys)
                between.branches[other[shared * unit : (shared + 1) * unit]] = below
                node.branches[branch] = below = between
            node = below

    def _remove(self, node: _Node, key: bytes) -> None:
        unit = self._unit
        while True:
            del node.keys[key]
            branch = key[node.depth * unit : (node.depth + 1) * unit]
            below = node.branches[branch]
            # A node that is left with one branch stays: taking it out would make room for growing it again.
            if isinstance(below, bytes) or len(below.keys) == 1:
                del node.branches[branch]
                return
            node = below
