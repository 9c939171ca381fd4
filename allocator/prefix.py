"""PrefixIndex: which cached block holds which tokens after which prefix.

A radix tree whose node is an *extent*: consecutive blocks of one prefix, as many as are referenced alike. A
child is found by the key of its first block, the rest is compared in bulk, and an extent is cut only where a
sequence leaves it halfway. So a lookup, a hit, an insertion and an eviction cost per extent, not per block.

    root ── [b0 b1 b2 b3] ─┬─ [b4 b5]           three extents, two cached prefixes of 6 and 7 blocks
                           └─ [b6 b7 b8]

When an extent is cut, the *tail* keeps the object (whoever points at the deepest block still does, and its
place in the eviction order is kept) and the head is new.

An evicted block leaves a *ghost* behind: its key stays in the tree without a block, so that a later miss can
be told from one on content never seen. Ghosts are bounded; the one evicted first is forgotten first. They
always lie below everything live, because a block is evicted only when nothing live hangs below it.

With a host tier, an extent may have its content in host memory instead (or, for a while, in both). On a path
come first the extents that the GPU holds, then those that only the host holds, then ghosts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from allocator.births import cut_first, drop_last

if TYPE_CHECKING:
    from allocator.retention import Retention

_MERGED_GHOST_BYTES = 4096
"""Ghosts evicted in a row share a node up to this size: few nodes, and no long copies to grow one."""


_NO_BLOCKS: Final = array("i")
"""Of what has lost all its blocks: replaced, never added to, once it has some again."""


class Grower(Protocol):
    """A sequence that prolongs an extent which nobody else holds, and tells the index only when somebody looks."""

    def catch_up(self) -> None:
        """Let the index have all blocks that it has filled; from now on it is the extent's grower no longer."""


class Extent:
    """Consecutive blocks of one prefix, referenced alike.

    keys            the blocks' keys, `width` bytes each; what makes the extent equal to another
    ids             the block ids, array of int32; empty unless the GPU holds it
    host            the ids of its host blocks, array of int32, as many as keys; None unless the host holds it
    start           blocks before this extent on the way from the root
    references      sequences whose path leads through here (a parent has at least its children's)
    host_references swapped-out sequences and transfers that need what the host holds here or below
    live_children   children that hold blocks
    sealed          once hit or released, or where the next block is to be kept otherwise; a sealed extent is not
                    grown in place, so that all its blocks have been hit and released together (a root, which
                    has no blocks, always is)
    retention       how its blocks are to be kept while nobody references them, None if nobody asked
    born, touched   lifetimes: when its blocks were filled (see births.py), when it was last used; the caller's clock
    grower          the sequence that prolongs it, if not all that it has filled is here; whoever reads keys or ids
                    lets it catch up before
    """

    __slots__ = (
        "born",
        "children",
        "grower",
        "host",
        "host_references",
        "ids",
        "keys",
        "live_children",
        "parent",
        "references",
        "retention",
        "sealed",
        "start",
        "touched",
        "width",
    )

    def __init__(self, parent: Extent | None, keys: bytes | bytearray, ids: array[int], width: int) -> None:
        self.parent = parent
        self.children: dict[bytes, Extent] | None = None
        self.keys = bytearray(keys)
        self.ids = ids
        self.host: array[int] | None = None
        self.host_references = 0
        self.start: int = 0 if parent is None else parent.start + len(parent.keys) // width
        self.references = 0
        self.live_children = 0
        self.sealed = False
        self.width = width
        self.retention: Retention | None = None
        self.born: array[int] | None = None
        self.touched = 0
        self.grower: Grower | None = None

    @property
    def num_blocks(self) -> int:
        """Return the blocks it stands for, held or, for a ghost, once held."""
        return len(self.keys) // self.width

    @property
    def end(self) -> int:
        """Return the depth of its last block, counted in blocks from the root."""
        return self.start + len(self.keys) // self.width

    @property
    def first_key(self) -> bytes:
        """Return the key under which the parent finds it."""
        return bytes(self.keys[: self.width])

    def path(self) -> Iterator[Extent]:
        """Yield this extent and those above it, the root left out."""
        extent = self
        while extent.parent is not None:
            yield extent
            extent = extent.parent

    def __repr__(self) -> str:
        kind = f"ids={self.ids.tolist()}" if self.ids else "ghost" if self.host is None else ""
        if self.host is not None:
            kind += f" host={self.host.tolist()} host_references={self.host_references}"
        return f"<Extent [{self.start}, {self.end}) {kind} references={self.references}>"


class Root(Extent):
    """Where the prefixes of one family of contents and one salt begin; `references` counts sequences."""

    __slots__ = ("family", "salt")

    def __init__(self, family: Hashable, salt: Hashable, width: int) -> None:
        super().__init__(None, b"", array("i"), width)
        self.sealed = True
        self.family = family
        self.salt = salt


def common_blocks(keys: bytearray | bytes, other: bytes, at: int, width: int) -> int:
    """Return how many blocks `keys` and `other` from block `at` on have in common."""
    base = at * width
    if other.startswith(keys, base):  # the common case, and without a copy
        return len(keys) // width
    limit, rest = len(keys) // width, len(other) // width - at
    if rest < limit:
        limit = rest
    if keys[: limit * width] == other[base : base + limit * width]:
        return limit
    low, high = 0, limit  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if keys[low * width : middle * width] == other[base + low * width : base + middle * width]:
            low = middle
        else:
            high = middle
    return low


def _nothing() -> None:
    """Do nothing."""


class PrefixIndex:
    """The tree, and the ghosts in it. It knows neither references nor policies; the pool does."""

    windowed = False
    """Whether blocks can be taken in any order, so that ghosts lie above live blocks, too."""

    def __init__(self, ghost_capacity: int) -> None:
        self.roots: dict[Hashable, dict[Hashable, Root]] = {}  # family -> salt -> root
        self.version = 0  # changes whenever a match could
        self.ghost_capacity = ghost_capacity
        self.ghost_blocks = 0
        self.forgot = False  # a ghost has been forgotten: what is unknown need not be cold
        self.draining: Extent | None = None  # being evicted: the pool has yet to say which blocks are gone
        self.settle: Callable[[], None] = _nothing  # lets the pool say it
        self._ghosts: OrderedDict[Extent, None] = OrderedDict()  # evicted first, first
        self._last_ghost: Extent | None = None

    def root(self, family: Hashable, salt: Hashable, width: int) -> Root:
        """Return the root for contents of one family and salt, made on first use."""
        salts = self.roots.get(family)
        if salts is None:
            salts = self.roots[family] = {}
        root = salts.get(salt)
        if root is None:
            root = salts[salt] = Root(family, salt, width)
        return root

    def discard_if_unused(self, root: Extent) -> None:
        """Forget a root that no sequence and no extent needs any more."""
        if not root.references and not root.children and isinstance(root, Root):
            salts = self.roots[root.family]
            del salts[root.salt]
            if not salts:
                del self.roots[root.family]

    def held_with(self, extent: Extent) -> Iterator[Extent]:
        """Yield what is held by whoever holds an extent: all that is on its path, the deepest first."""
        return extent.path()

    def match(self, root: Extent, keys: bytes) -> list[tuple[Extent, int]]:
        """Return the extents that `keys` leads through and how many blocks of each; ghosts come last."""
        path: list[tuple[Extent, int]] = []
        width = root.width
        node, base, total = root, 0, len(keys)
        while base < total and node.children:
            child = node.children.get(keys[base : base + width])
            if child is None:
                break
            if child.grower is not None:
                child.grower.catch_up()
            whole = len(child.keys)
            if not keys.startswith(child.keys, base):
                path.append((child, common_blocks(child.keys, keys, base // width, width)))
                break
            path.append((child, whole // width))
            base += whole
            node = child
        if self.draining is not None and path and self._is_behind(path):
            self.settle()
            return self.match(root, keys)
        return path

    def _is_behind(self, path: list[tuple[Extent, int]]) -> bool:
        """Return whether what is being evicted, and has not been settled, could change where a path leads."""
        draining, last = self.draining, path[-1][0]
        if last.ids:
            return last is draining
        # It ends at a ghost. Ghosts that are to come drive out others only where some have been driven out.
        return self.forgot or any(extent is draining for extent, _ in path)

    def split(self, extent: Extent, at: int) -> Extent:
        """Cut `extent` after its first `at` blocks and return the new head; the object stays the tail."""
        width, parent = extent.width, extent.parent
        assert parent is not None
        assert parent.children is not None
        cut = at * width
        head = Extent(parent, extent.keys[:cut], extent.ids[:at], width)
        head.references = extent.references
        head.host_references = extent.host_references
        if extent.host is not None:
            head.host = extent.host[:at]
            del extent.host[:at]
        head.sealed = extent.sealed
        head.touched = extent.touched
        head.retention = extent.retention
        if extent.born:  # neither of a ghost nor of what only the host holds
            head.born = cut_first(extent.born, at)
        parent.children[head.first_key] = head
        del extent.keys[:cut]
        del extent.ids[:at]
        head.children = {extent.first_key: extent}
        head.live_children = 1 if extent.ids else 0
        extent.parent = head
        extent.start += at
        self.version += 1
        return head

    def insert(
        self, anchor: Extent, keys: bytes, ids: array[int], split: Callable[[Extent, int], Extent]
    ) -> Iterator[tuple[Extent, bool]]:
        """Put blocks below `anchor`; yield the extents they lead through, and whether each took them in.

        Where the content is there already (False), the index keeps the block it has. Where a ghost is, it is
        revived. The caller must reference each extent before it asks for the next.
        """
        width = anchor.width
        at, total = 0, len(ids)
        try:
            while at < total:
                child = (anchor.children or {}).get(keys[at * width : (at + 1) * width])
                if child is None:
                    yield self.attach(anchor, keys[at * width :], ids[at:]), True
                    return
                if child.grower is not None:
                    child.grower.catch_up()
                is_ghost = not child.ids
                if self.draining is not None and (child is self.draining or (is_ghost and self.forgot)):
                    self.settle()
                    continue
                matched = common_blocks(child.keys, keys, at, width)
                if matched * width < len(child.keys):
                    child = split(child, matched)
                if is_ghost:
                    self.revive(child, ids[at : at + matched])
                yield child, is_ghost
                anchor = child
                at += matched
        except StopIteration as error:  # a policy's: compiled code would take it for the end of this
            raise RuntimeError("a StopIteration came up where blocks are indexed") from error

    def attach(self, parent: Extent, keys: bytes, ids: array[int]) -> Extent:
        """Hang a new extent below `parent`, which must have no child with that first key."""
        extent = Extent(parent, keys, ids, parent.width)
        if parent.children is None:
            parent.children = {}
        parent.children[keys[: parent.width]] = extent
        parent.live_children += 1
        self.version += 1
        return extent

    def revive(self, ghost: Extent, ids: array[int]) -> None:
        """Give a ghost, or what only the host holds, blocks again; its parent must be live."""
        assert ghost.parent is not None
        if ghost.host is None:
            self._unlist(ghost)
        ghost.ids = ids
        ghost.sealed = False
        ghost.parent.live_children += 1
        self.version += 1

    def trim(self, extent: Extent, num_blocks: int) -> array[int]:
        """Take the last `num_blocks` blocks out of the index, leave ghosts, and return the ids."""
        keep = len(extent.ids) - num_blocks
        self.version += 1
        if keep:
            ids = extent.ids[keep:]
            del extent.ids[keep:]
            if extent.born is not None:
                drop_last(extent.born, num_blocks)
        else:
            assert extent.parent is not None
            extent.parent.live_children -= 1
            ids, extent.ids = extent.ids, _NO_BLOCKS
            extent.born = None
        if keep or extent.children or not self.ghost_capacity:
            self._bury(extent, keep)
            return ids
        self._ghosts[extent] = None  # of a leaf that goes whole, as most do, the node is the ghost
        self._last_ghost = extent
        self.ghost_blocks += num_blocks
        if self.ghost_blocks > self.ghost_capacity:
            self._forget()
        return ids

    def trim_host(self, extent: Extent, num_blocks: int) -> array[int]:
        """Do what `trim` does to an extent that only the host holds; return the host ids."""
        assert extent.host is not None
        keep = len(extent.host) - num_blocks
        ids = extent.host[keep:]
        del extent.host[keep:]
        if keep == 0:
            extent.host = None
        self.version += 1
        self._bury(extent, keep)
        return ids

    def _bury(self, extent: Extent, keep: int) -> None:
        """Leave ghosts of all but the first `keep` blocks of an extent, which it has just lost."""
        self.ghost_blocks += len(extent.keys) // extent.width - keep
        if keep == 0:
            if self.ghost_capacity:
                self._become_ghost(extent)
            else:
                self._detach(extent)
        else:
            tail = extent.keys[keep * extent.width :]
            del extent.keys[keep * extent.width :]
            if self.ghost_capacity:
                self._leave_ghost(extent, tail)
        if self.ghost_blocks > self.ghost_capacity:
            self._forget()

    def remove(self, extent: Extent) -> None:
        """Take a childless extent out without leaving a ghost."""
        if extent.ids:
            assert extent.parent is not None
            extent.parent.live_children -= 1
        self._detach(extent)
        extent.ids = array("i")
        self.version += 1

    def _detach(self, extent: Extent) -> None:
        parent = extent.parent
        assert parent is not None
        assert parent.children is not None
        del parent.children[extent.first_key]
        if not parent.children:
            parent.children = None
            if parent.parent is None:
                self.discard_if_unused(parent)

    def _recent_child(self, extent: Extent) -> Extent | None:
        """Return the ghost right below that was evicted just before, if it can take more keys in."""
        ghost = self._last_ghost
        if ghost is None or ghost.parent is not extent or not extent.children:
            return None
        if len(extent.children) > 1 or len(ghost.keys) >= _MERGED_GHOST_BYTES:
            return None
        return ghost

    def _become_ghost(self, extent: Extent) -> None:
        below = self._recent_child(extent)
        if below is None:
            self._list(extent)
            return
        parent = extent.parent
        assert parent is not None
        assert parent.children is not None
        below.keys[0:0] = extent.keys
        below.start = extent.start
        below.parent = parent
        parent.children[below.first_key] = below

    def _leave_ghost(self, extent: Extent, keys: bytearray) -> None:
        below = self._recent_child(extent)
        if below is not None:
            below.keys[0:0] = keys
            below.start = extent.end
        else:
            below = Extent(extent, keys, array("i"), extent.width)
            below.children = extent.children
            for child in (below.children or {}).values():
                child.parent = below
            self._list(below)
        extent.children = {below.first_key: below}

    def _list(self, ghost: Extent) -> None:
        self._ghosts[ghost] = None
        self._last_ghost = ghost

    def _unlist(self, ghost: Extent) -> None:
        # After a cut only the tail is listed: the head is being revived right now.
        self._ghosts.pop(ghost, None)
        if self._last_ghost is ghost:
            self._last_ghost = None
        self.ghost_blocks -= ghost.num_blocks

    def _forget(self) -> None:
        """Forget the ghosts evicted first, or the last blocks of one, until no more are left than there may be."""
        self.forgot = True
        if not self.ghost_capacity:
            self.ghost_blocks = 0
            return
        while (excess := self.ghost_blocks - self.ghost_capacity) > 0:
            oldest = next(iter(self._ghosts))
            if excess < oldest.num_blocks:
                del oldest.keys[-excess * oldest.width :]
                self.ghost_blocks -= excess
            else:
                self._unlist(oldest)
                self._detach(oldest)

    def extents(self) -> Iterator[Extent]:
        """Yield every extent, ghosts included, parents first."""
        self.settle()
        stack: list[Extent] = [root for salts in self.roots.values() for root in salts.values()]
        while stack:
            node = stack.pop()
            if node.grower is not None:
                node.grower.catch_up()
            if node.parent is not None:
                yield node
            if node.children:
                stack.extend(node.children.values())
