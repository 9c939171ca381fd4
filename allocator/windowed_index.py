"""WindowedIndex: the prefix tree of a windowed cache, in which a block can go before those that follow it.

A sequence lets go of its blocks one by one, front first, and a hit needs a few blocks in the midst of a prefix. So
here every extent is a single block, referenced by exactly those that hold the block. What says the content of a
block (the keys on the way to it) must outlast the blocks above it: a node stays in the tree

    while it holds a block,  is remembered as a ghost,  has children,  or is where some sequence is *anchored*

and of these only the first two can be hit or known; the others are kept for what hangs below them. A node holds a
block on the GPU, on the host, or on both; which of the two, and whether its neighbours do, is all one to a hit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from allocator.prefix import Extent, PrefixIndex


class WindowedIndex(PrefixIndex):
    """A prefix tree of single blocks; see PrefixIndex for ghosts, which here can lie above live blocks."""

    def __init__(self, ghost_capacity: int) -> None:
        super().__init__(ghost_capacity)
        self.windowed = True
        self.numbers: dict[Extent, int] | None = None  # of nodes in the event log, if there is one
        self._numbered = 0
        self.anchors: dict[Extent, int] = {}  # sequences whose last full block a node stands for

    def held_with(self, extent: Extent) -> Iterator[Extent]:
        """Yield the node alone: whoever needs those above it holds them himself."""
        yield extent

    def anchor(self, node: Extent, sequences: int = 1) -> None:
        """Keep a node for sequences that go on from it."""
        self.anchors[node] = self.anchors.get(node, 0) + sequences

    def release(self, node: Extent) -> None:
        """Undo one `anchor`."""
        left = self.anchors[node] - 1
        if left:
            self.anchors[node] = left
        else:
            del self.anchors[node]
            self._prune(node)

    def number(self, node: Extent) -> int:
        """Return the number of a node in the event log, for good; −1 for a root."""
        assert self.numbers is not None
        if node.parent is None:
            return -1
        if node not in self.numbers:
            self.numbers[node] = self._numbered
            self._numbered += 1
        return self.numbers[node]

    def _detach(self, extent: Extent) -> None:
        super()._detach(extent)
        if self.numbers is not None:
            del self.numbers[extent]

    def walk(self, root: Extent, keys: bytes) -> list[Extent]:
        """Return the nodes that `keys` leads through, whether they hold a block or not."""
        nodes: list[Extent] = []
        width, node = root.width, root
        for at in range(0, len(keys), width):
            child = node.children.get(keys[at : at + width]) if node.children else None
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def is_known(self, node: Extent) -> bool:
        """Return whether a node's content is cached, or remembered to have been."""
        return bool(node.ids) or node.host is not None or node in self._ghosts

    def attach(self, parent: Extent, keys: bytes, ids: array[int]) -> Extent:
        """Hang a new block below `parent`."""
        node = super().attach(parent, keys, ids)
        node.sealed = True
        return node

    def revive(self, ghost: Extent, ids: array[int]) -> None:
        """Give a node a block again."""
        assert ghost.parent is not None
        if ghost in self._ghosts:
            del self._ghosts[ghost]
            self.ghost_blocks -= 1
        ghost.ids = ids
        ghost.parent.live_children += 1
        self.version += 1

    def trim(self, extent: Extent, num_blocks: int) -> array[int]:
        """Take the block out of the index, leave a ghost, and return its id."""
        ids = self._empty(extent)
        self._leave_ghost_of(extent)
        return ids

    def trim_host(self, extent: Extent, num_blocks: int) -> array[int]:
        """Do what `trim` does to a node that only the host holds; return its host block's id."""
        assert extent.host is not None
        ids, extent.host = extent.host, None
        self.version += 1
        self._leave_ghost_of(extent)
        return ids

    def _leave_ghost_of(self, extent: Extent) -> None:
        """Remember what a node held that holds nothing any more."""
        if self.ghost_capacity:
            self._ghosts[extent] = None
            self.ghost_blocks += 1
        else:
            self.forgot = True
            self._prune(extent)
        while self.ghost_blocks > self.ghost_capacity:
            self.forgot = True
            oldest, _ = self._ghosts.popitem(last=False)
            self.ghost_blocks -= 1
            self._prune(oldest)

    def remove(self, extent: Extent) -> None:
        """Take the block, if it has one, out without leaving a ghost."""
        if extent.ids:
            self._empty(extent)
        else:
            self.version += 1
        self._prune(extent)

    def _empty(self, node: Extent) -> array[int]:
        assert node.parent is not None
        node.parent.live_children -= 1
        self.version += 1
        ids, node.ids = node.ids, array("i")
        node.born = None
        return ids

    def _prune(self, node: Extent) -> None:
        """Take a node that nothing needs out of the tree, and those above it that nothing needs any more."""
        while node.parent is not None and not (
            node.ids or node.host is not None or node.children or node in self._ghosts or node in self.anchors
        ):
            parent = node.parent
            self._detach(node)
            node = parent
