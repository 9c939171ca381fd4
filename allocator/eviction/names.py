"""BlockNames: exact names of block contents, for policies that know content which is not cached."""

from __future__ import annotations

from collections.abc import Hashable

from allocator.prefix import Extent, Root


class Name:
    """One block's content behind one prefix: equal content, same object, for as long as anybody holds it."""

    __slots__ = ("children", "holders", "key", "parent")

    def __init__(self, parent: Name | None, key: Hashable) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[Hashable, Name] = {}
        self.holders = 0


class BlockNames:
    """A trie of single blocks, and the names of each extent's blocks.

    A name is held by its cached block and by whoever calls `hold`; it is forgotten when nobody holds it or any
    name behind it. Costs O(1) a block.
    """

    def __init__(self) -> None:
        self._top = Name(None, None)
        self._of: dict[Extent, list[Name]] = {}

    def child(self, parent: Name, key: Hashable) -> Name:
        """Return the name of the block with this key behind `parent`, made on first use."""
        name = parent.children.get(key)
        if name is None:
            name = parent.children[key] = Name(parent, key)
        return name

    def root(self, family: Hashable, salt: Hashable) -> Name:
        """Return what the names of one family of contents under one salt hang on."""
        return self.child(self._top, (family, salt))

    def find(self, family: Hashable, salt: Hashable, keys: bytes, width: int) -> list[Name]:
        """Return the names of a prompt's full blocks, `width` bytes each of `keys`, made where they are new."""
        name, found = self.root(family, salt), []
        for at in range(0, len(keys), width):
            name = self.child(name, keys[at : at + width])
            found.append(name)
        return found

    def hold(self, name: Name) -> None:
        """Keep a name."""
        name.holders += 1

    def drop(self, name: Name) -> None:
        """Undo one `hold`."""
        name.holders -= 1
        while not name.holders and not name.children and name.parent is not None:
            del name.parent.children[name.key]
            name = name.parent

    def of(self, extent: Extent) -> list[Name]:
        """Return the names of an extent's blocks."""
        return self._of[extent]

    def cached(self, extent: Extent, num_blocks: int) -> list[Name]:
        """Name the last `num_blocks` blocks of an extent, which were just cached, and return their names."""
        names = self._of.get(extent)
        if names is None:
            names = self._of[extent] = []
        if names:
            name = names[-1]
        else:
            assert extent.parent is not None
            name = self._last_of(extent.parent)
        width, first = extent.width, len(names)
        for at in range(first * width, (first + num_blocks) * width, width):
            name = self.child(name, bytes(extent.keys[at : at + width]))
            name.holders += 1
            names.append(name)
        return names[first:]

    def _last_of(self, extent: Extent) -> Name:
        """Return the name of an extent's last block, which only a windowed cache may have evicted already."""
        evicted = []
        while extent not in self._of and not isinstance(extent, Root):
            evicted.append(extent)
            assert extent.parent is not None
            extent = extent.parent
        name = self.root(extent.family, extent.salt) if isinstance(extent, Root) else self._of[extent][-1]
        for each in reversed(evicted):
            for at in range(0, len(each.keys), each.width):
                name = self.child(name, bytes(each.keys[at : at + each.width]))
        return name

    def split(self, head: Extent, tail: Extent) -> None:
        """Divide the names as the blocks were divided."""
        names, cut = self._of[tail], len(head.ids)
        self._of[head], self._of[tail] = names[:cut], names[cut:]

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        """Drop the names of the last blocks."""
        names = self._of[extent]
        for _ in range(num_blocks):
            self.drop(names.pop())
        if not names:
            del self._of[extent]
