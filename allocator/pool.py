"""BlockPool: which blocks are free, which could be freed, and who refers to the rest.

    free        no content worth keeping; taken first, last freed first
    evictable   cached content that no table holds; taken when nothing is free, in the policy's order
    referenced  in a table
    in transfer held by nothing but a copy or transfer that still reads or writes it

Policies choose; only the pool changes anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from allocator.births import one_by_one
from allocator.blocks import FreeBlocks, OutOfBlocks
from allocator.event_log import EVICTED, NOBODY, UNSTORED, EventLog
from allocator.eviction.policy import EvictionPolicy
from allocator.host import demote
from allocator.lifetimes import Lifetimes
from allocator.partial import PartialReuse
from allocator.prefix import Extent, PrefixIndex
from allocator.retaining import Expiries

if TYPE_CHECKING:
    from allocator.tiers import HostTier

__all__ = ["BlockPool", "OutOfBlocks"]


class BlockPool(FreeBlocks):
    """A pool of `num_blocks` blocks, numbered from 0.

    With `keep_cached` False, an extent whose last reference goes is freed at once (block reuse off).
    """

    def __init__(
        self, num_blocks: int, policy: EvictionPolicy, index: PrefixIndex, *, keep_cached: bool = True
    ) -> None:
        super().__init__(num_blocks)
        self.policy = policy
        self.index = index
        self.keep_cached = keep_cached
        self.tier: HostTier | None = None
        self.lifetimes: Lifetimes | None = None
        self.events: EventLog | None = None
        self.expiries = Expiries()
        self.partial: PartialReuse | None = None
        self._births = array("q", (0, 0))  # to make more of
        self.shared: dict[int, int] = {}  # holders of an uncached block, where more than one
        # Called for every block that fills up: not at all where the policy does not care.
        self.notes_cached = type(policy).cached is not EvictionPolicy.cached
        self._notes_exposed = type(policy).exposed is not EvictionPolicy.exposed
        # A policy that empties one victim before it chooses the next need not be asked block by block. It has to
        # say so itself: a subclass may choose differently.
        self.drains = bool(vars(type(policy)).get("drains_victims", False))
        self._settle_at = 0  # the stock at which index and policy are to be told
        index.settle = self.settle
        self._windowed = index.windowed
        policy.in_use = True
        policy.attached(self.num_blocks)

    def collect_lifetimes(self) -> None:
        """Note from now on how long blocks live: in a pool that has just been made."""
        self.lifetimes = Lifetimes(self.settle)
        self._evictions = self.lifetimes.evictions

    @property
    def num_in_transfer(self) -> int:
        """Return the number of blocks that only copies and transfers hold. O(extents that transfers hold)."""
        held = 0 if self.tier is None else self.tier.num_gpu_blocks_held()
        return len(self.limbo) + held

    @property
    def num_referenced(self) -> int:
        """Return the number of blocks held by tables, or by the twins and pending copies that need them."""
        return self.num_blocks - self.available - self.num_in_transfer

    def _evict(self, wanted: int) -> None:
        extent, count = self._choose(wanted)
        if not self.drains or self.tier is not None:
            self.free_evicted(self._evict_from(extent, count))
            return
        index, ids = self.index, extent.ids
        index.draining = extent
        index.version += 1  # a match that leads through it is not current any more
        self._freed[:0] = ids
        self._stock = self._stocked = blocks = len(ids)
        self._touched = extent.touched
        settle_at = 0
        ghosts = index.ghost_blocks + blocks
        if ghosts > index.ghost_capacity and not index.forgot:
            # When the first ghost has to be forgotten, everybody has to know.
            settle_at = max(0, ghosts - index.ghost_capacity - 1)
        self._settle_at = settle_at
        self._tell_at = settle_at if self.events is None else blocks
        if blocks - count > self._tell_at:  # as a rule, these are all that are wanted
            self._draw(blocks - count)

    def _choose(self, wanted: int) -> tuple[Extent, int]:
        """Ask the policy for a victim. Policies are the users', and a mistake in an answer would corrupt the pool."""
        # What it declares to answer is not what it may answer: compiled code would believe it.
        choose: Callable[[int], object] = self.policy.victim
        chosen = choose(wanted)
        if type(chosen) is tuple and len(chosen) == 2:
            extent, count = chosen
            if (
                type(extent) is Extent
                and type(count) is int
                and 1 <= count <= wanted
                and count <= len(extent.ids)
                and not extent.references
                and (not extent.live_children or self._windowed)
            ):
                return chosen
        raise ValueError(
            f"policy {type(self.policy).__name__} chose {chosen!r}: a victim must be an extent without references "
            f"and cached children, and an int, between 1 and {wanted}, of its blocks"
        )

    def _evict_stock(self, left: int) -> None:
        """Note that the victim has only `left` blocks left; `settle` will tell index and policy."""
        before = self._stocked
        self._draw(left)
        if self.events is not None:
            self.events.add_blocks(EVICTED, NOBODY, -1, -1, self._freed[left:before][::-1])
        if left <= self._settle_at:
            self.settle()

    def settle(self) -> None:
        """Let index and policy know how much of the victim that is being emptied is gone.

        Until then nobody has asked: the index calls this before it would tell anyone about the victim, or about
        ghosts, of which there are more now.
        """
        extent, left = self.index.draining, self._stocked
        if extent is None:
            return
        self.index.draining = None
        if left:
            del self._freed[:left]
        gone = self._stock - left
        self._evicted += gone
        self._stock = self._stocked = 0
        if gone:
            self._trim(extent, gone)

    def _evict_from(self, extent: Extent, count: int) -> array[int]:
        if self.lifetimes is not None:
            self.lifetimes.evictions.append((self.now, count, extent.touched))
        self.available -= count
        self._evicted += count
        ids = self._trim(extent, count)
        if self.events is not None:
            self.events.add_blocks(EVICTED, NOBODY, -1, -1, ids[::-1])
        return ids

    def _trim(self, extent: Extent, count: int) -> array[int]:
        """Let everybody know that an extent loses its last `count` blocks; return these."""
        parent, partial = extent.parent, self.partial
        assert parent is not None
        if self.lifetimes is not None:
            self.lifetimes.gone(extent, count)
        ids = self.index.trim(extent, count) if self.tier is None else self.tier.evict(extent, count)
        self.policy.evicted(extent, count)
        if partial is not None:
            partial.changed(extent)
        if not extent.ids:
            if extent.retention is not None:
                self.expiries.discard(extent)
                extent.retention = None
            if self._windowed:
                self._note_bereft(parent)
            elif (self._notes_exposed or partial is not None) and self._is_exposed(parent):
                self.policy.exposed(parent)
                if partial is not None:
                    partial.changed(parent)
        return ids

    def _note_bereft(self, node: Extent) -> None:
        """Let partial reuse know that a node of a windowed cache has lost a cached child: it need not be held."""
        if self.partial is not None and node.parent is not None:
            self.partial.changed(node)

    def _is_exposed(self, extent: Extent) -> bool:
        return (
            not extent.references
            and (not extent.live_children or self._windowed)
            and extent.parent is not None
        )

    def share(self, block: int, holders: int) -> None:
        """Add `holders` to the holders of an uncached block."""
        self.shared[block] = self.shared.get(block, 1) + holders

    def unshare(self, block: int) -> bool:
        """Drop one holder of an uncached block and return whether others are left."""
        holders = self.shared.get(block)
        if holders is None:
            return False
        if holders == 2:
            del self.shared[block]
        else:
            self.shared[block] = holders - 1
        return True

    @property
    def notes_growth(self) -> bool:
        """Return whether `cached` does anything."""
        return self.notes_cached or self.lifetimes is not None or self.partial is not None

    def cached(self, extent: Extent, num_blocks: int, dates: array[int] | None = None) -> None:
        """Note that `num_blocks` referenced blocks were appended to `extent` in the index.

        dates  when they were filled, int64 [num_blocks], if that was before now
        """
        if self.lifetimes is not None:
            if dates is not None:
                births = one_by_one(dates)
            else:
                births = self._births
                births[0], births[1] = num_blocks, self.now
            if extent.born is None:
                extent.born = births[:]
            else:
                extent.born.extend(births)
        if self.notes_cached:
            self.policy.cached(extent, num_blocks)
        if self.partial is not None:
            self.partial.cached(extent, num_blocks)

    def uncache(self, extent: Extent) -> int:
        """Take an extent's last block out of the index, leave a ghost, and return the block.

        Its only holder is about to write into it; no cached block hangs below.
        """
        self.settle()  # ghosts are listed in the order of their making
        (block,) = self.index.trim(extent, 1)
        self.policy.evicted(extent, 1)
        if not extent.ids:
            extent.references = 0
            extent.retention = None
        if self.partial is not None:
            self.partial.changed(extent)
            if self._windowed and extent.parent is not None:
                self._note_bereft(extent.parent)
        return block

    def steal(self, extent: Extent) -> int:
        """Take the one block of an unreferenced leaf out of the index for a sequence that is going to write it."""
        if self.lifetimes is not None:
            self.lifetimes.evicted(extent, 1, self.now)
        self.acquire(extent)
        return self.uncache(extent)

    def pass_time(self, now: int) -> None:
        """Let it be `now`: the retentions that are over by then end, in their order."""
        self.now = now
        for extent in self.expiries.due(now):
            extent.retention = None
            self.policy.expired(extent)

    def acquire(self, extent: Extent, references: int = 1) -> None:
        """Add references to an extent; an evictable one becomes referenced."""
        if not extent.references and extent.ids:
            self.available -= len(extent.ids)
            if extent.retention is not None:
                self.expiries.discard(extent)
            self.policy.referenced(extent)
            if self.partial is not None:
                extent.references += references
                self.partial.changed(extent)
                return
        extent.references += references

    def hit(self, extent: Extent) -> None:
        """Acquire an extent for a sequence that found all its blocks in the cache."""
        if self.lifetimes is not None:
            self.lifetimes.hit(extent, self.now)
        self.acquire(extent)
        extent.sealed = True
        self.policy.hit(extent)

    def drop(self, extent: Extent) -> None:
        """Remove one reference; without any, the extent becomes evictable, or is freed if nothing is kept."""
        extent.references -= 1
        if extent.references:
            return
        extent.sealed = True
        extent.touched = self.now
        if self.keep_cached:
            self.available += len(extent.ids)
            if extent.retention is not None:
                self.expiries.released(extent, self.now)
            self.policy.released(extent)
            if self._notes_exposed and (not extent.live_children or self._windowed):
                self.policy.exposed(extent)
            if self.partial is not None:
                self.partial.changed(extent)
        else:
            ids = extent.ids[::-1]
            if extent.host is None:
                self.index.remove(extent)
            else:
                demote(self.index, extent, len(ids))
            self.policy.evicted(extent, len(ids))
            if self.events is not None:
                self.events.add_blocks(UNSTORED, NOBODY, -1, -1, ids)
            self.give(ids)

    def acquire_path(self, extent: Extent, references: int = 1) -> None:
        """Add references to an extent and, unless the cache is windowed, all those above it."""
        for each in self.index.held_with(extent):
            self.acquire(each, references)

    def drop_path(self, extent: Extent) -> Extent:
        """Undo one `acquire_path`, the deepest extent first; return the last one's parent."""
        parent = extent.parent
        while parent is not None:
            self.drop(extent)
            if self._windowed:
                return parent
            extent, parent = parent, parent.parent
        return extent

    def split(self, extent: Extent, at: int) -> Extent:
        """Cut an extent after `at` blocks and return the new head."""
        head = self.index.split(extent, at)
        if extent.ids:
            if extent.retention is not None:
                self.expiries.split(head, extent)
            self.policy.split(head, extent)
            if self.partial is not None:
                self.partial.changed(head)
                self.partial.changed(extent)
        return head
