"""HostPool: the host's blocks, and which extents they hold.

    free         taken first, last freed first
    evictable    content that only the host holds and nobody is waiting for; the least recently offloaded goes first
    held         needed by a swapped-out sequence
    in transfer  held by nothing but a transfer that still reads or writes it

The tiers are exclusive: what the GPU holds, the host holds only while somebody needs it there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from allocator.births import drop_last
from allocator.blocks import FreeBlocks
from allocator.event_log import FORGOTTEN, HOST_FREED, NOBODY, EventLog
from allocator.partial import PartialReuse
from allocator.prefix import Extent, PrefixIndex

_MERGED_EXTENT_BYTES = 4096
"""Extents offloaded in a row become one up to this size of keys: few extents, and no long copies to grow one."""


def demote(index: PrefixIndex, extent: Extent, num_blocks: int, host: array[int] | None = None) -> Extent:
    """Let only the host hold the last `num_blocks` blocks of an extent; return what stands for them now.

    `host` are their host blocks; None if the extent has them already. It must have no live children.
    """
    parent = extent.parent
    assert parent is not None
    keep = len(extent.ids) - num_blocks
    del extent.ids[keep:]
    if extent.born is not None:
        drop_last(extent.born, num_blocks)
    index.version += 1
    if keep == 0:
        parent.live_children -= 1
        if host is not None:
            extent.host = host
        return extent
    cut = keep * extent.width
    below = Extent(extent, extent.keys[cut:], array("i"), extent.width)
    del extent.keys[cut:]
    below.start = extent.end
    below.touched = extent.touched
    below.host_references = extent.host_references
    if host is None:
        assert extent.host is not None
        host = extent.host[keep:]
        del extent.host[keep:]
    below.host = host
    below.children = extent.children
    for child in (below.children or {}).values():
        child.parent = below
    extent.children = {below.first_key: below}
    return below


def _absorb(index: PrefixIndex, extent: Extent, child: Extent) -> None:
    """Join an extent with its only child, both held by the host alone."""
    assert extent.host is not None
    assert child.host is not None
    extent.keys += child.keys
    extent.host.extend(child.host)
    extent.children = child.children
    for each in (extent.children or {}).values():
        each.parent = extent
    index.version += 1


class HostPool(FreeBlocks):
    """The host tier's twin of BlockPool: `num_blocks` blocks in host memory.

    With `keep_cached` False, what nobody needs any more is freed at once (block reuse off).

    An extent is held through `host_references`, which count along its whole path; so children become evictable
    before their parents, and the least recently offloaded extent is never one with content below it. In a windowed
    cache it is single blocks that are held, and in whatever order they go, what is below stays within reach.
    """

    name = "host"

    def __init__(self, num_blocks: int, index: PrefixIndex, *, keep_cached: bool) -> None:
        super().__init__(num_blocks)
        self.index = index
        self.keep_cached = keep_cached
        self.events: EventLog | None = None
        self.order: OrderedDict[Extent, None] = OrderedDict()  # evictable, the next to be taken first
        self.partial: PartialReuse | None = None

    def acquire_path(self, extent: Extent) -> None:
        """Hold an extent and, unless the cache is windowed, all those above it."""
        for each in self.index.held_with(extent):
            if not each.host_references and each.host is not None and not each.ids:
                self.available -= len(each.host)
                self.order.pop(each, None)  # a head that was cut off was never listed itself
            each.host_references += 1

    def drop_path(self, extent: Extent) -> None:
        """Let go of what `acquire_path` holds, the deepest first."""
        for each in list(
            self.index.held_with(extent)
        ):  # one that is removed loses its parent's children, so walk first
            each.host_references -= 1
            if not each.host_references and each.host is not None:
                self._unneeded(each)

    def _unneeded(self, extent: Extent) -> None:
        """Keep what only the host holds as cached, free what the GPU holds too."""
        assert extent.host is not None
        if not extent.ids and self.keep_cached:
            self.available += len(extent.host)
            self._list(extent)
            return
        ids, extent.host = extent.host[::-1], None
        if not extent.ids:
            self.index.remove(extent)
        elif self.partial is not None:
            self.partial.changed(extent)
        self._free(ids)

    def _free(self, ids: array[int]) -> None:
        if self.events is not None:
            self.events.add_blocks(HOST_FREED, NOBODY, -1, -1, ids)
        self.give(ids)

    def _list(self, extent: Extent) -> None:
        """Make an extent the last to be taken; one offloaded just before, below it, becomes part of it."""
        if not self.index.windowed and extent.children and len(extent.children) == 1 and self.order:
            (child,) = extent.children.values()
            if next(reversed(self.order)) is child and len(child.keys) < _MERGED_EXTENT_BYTES:
                del self.order[child]
                _absorb(self.index, extent, child)
        self.order[extent] = None

    def discard(self, extent: Extent) -> None:
        """Free the host blocks of an extent that nobody needs and that the GPU holds again."""
        assert extent.host is not None
        self.available -= len(extent.host)
        self.order.pop(extent, None)
        ids, extent.host = extent.host[::-1], None
        self._free(ids)

    def forget(self, extent: Extent, num_blocks: int) -> array[int]:
        """Take the last blocks of an evictable extent, leave ghosts, and return the ids."""
        assert extent.host is not None
        if num_blocks == len(extent.host):
            del self.order[extent]
        self.available -= num_blocks
        self._evicted += num_blocks
        parent = extent.parent
        ids = self.index.trim_host(extent, num_blocks)
        if self.partial is not None and parent is not None and parent.ids:
            self.partial.changed(parent)  # it may be one now that nothing builds on
        if self.events is not None:
            self.events.add_blocks(FORGOTTEN, NOBODY, -1, -1, ids[::-1])
        return ids

    def _evict(self, wanted: int) -> None:
        extent = next(iter(self.order))
        assert extent.host is not None
        self.free_evicted(self.forget(extent, min(wanted, len(extent.host))))
