"""HostTier: what happens to content that leaves the GPU for host memory, and comes back.

A block evicted from the GPU is *offloaded* if its priority is high enough and the host has room: it stays in the
prefix index, held by the host. A hit on it *onboards* it: GPU blocks are taken for it, and a transfer brings it
back. A preempted sequence can be swapped out: everything it holds is then held on the host until it is swapped
in, or released. What is moved by which list, and when, `allocator.transfers` says.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from allocator.event_log import NOBODY, OFFLOADED, ONBOARDED, SWAPPED_IN, SWAPPED_OUT, EventLog
from allocator.host import HostPool, demote
from allocator.pool import BlockPool
from allocator.prefix import Extent
from allocator.retention import DEFAULT_PRIORITY
from allocator.sequence import KVSequence
from allocator.stats import HostStats
from allocator.transfers import TransferQueue


class HostTier:
    """Host memory behind a pool: `host` has its blocks, `queue` the transfers, `swapped` the sequences out there.

    pool          the GPU's blocks
    num_blocks    blocks of the host
    min_priority  blocks retained by a priority of less are not offloaded
    """

    def __init__(self, pool: BlockPool, num_blocks: int, min_priority: int) -> None:
        self.pool = pool
        self.index = pool.index
        self.host = HostPool(num_blocks, pool.index, keep_cached=pool.keep_cached)
        self.queue = TransferQueue(pool, self.host)
        self.min_priority = min_priority
        self.swapped: dict[KVSequence, None] = {}
        self.offloaded_blocks = 0
        self.onboarded_blocks = 0
        self.hit_blocks = 0
        self.swapped_out_blocks = 0
        self.swapped_in_blocks = 0
        self.events: EventLog | None = None

    def log_to(self, events: EventLog) -> None:
        """Log what happens on the host, too."""
        self.events = self.host.events = self.queue.events = events

    # -------------------------------------------------------- eviction from the GPU

    def evict(self, extent: Extent, count: int) -> array[int]:
        """Take the last `count` blocks of an extent from the GPU and return their ids.

        Content below what is not offloaded would be out of reach, so the host forgets it. What a request wanted
        for the blocks ends here; on the host, the least recently offloaded goes first.
        """
        ids = extent.ids[-count:]
        if extent.host is not None:  # somebody needs it there, and has it there
            self._reanchor(extent, demote(self.index, extent, count))
            return ids
        priority = DEFAULT_PRIORITY if extent.retention is None else extent.retention.priority
        kept = min(count, self.host.available) if priority >= self.min_priority else 0
        if kept < count:
            self._forget_below(extent)
            self.index.trim(extent, count - kept)
        if kept:
            host_ids = self.host.take(kept)
            if self.events is not None:
                self.events.add_blocks(OFFLOADED, NOBODY, -1, -1, extent.ids[-kept:] + host_ids)
            self.queue.out(extent.ids[-kept:], host_ids)
            self.host.acquire_path(extent)  # before the host has it: so it never was evictable there
            self.queue.keep(demote(self.index, extent, kept, host_ids))
            self.offloaded_blocks += kept
        return ids

    def _reanchor(self, extent: Extent, below: Extent) -> None:
        """Let swapped-out sequences and transfers that held `extent` hold what was cut off it as well."""
        if below is not extent:
            self.queue.reanchor(extent, below)
            for sequence in self.swapped:
                if sequence.anchor is extent:
                    sequence.anchor = below

    def _forget_below(self, extent: Extent) -> None:
        """Forget all that the host holds below an extent; nobody but transfers can be holding it."""
        for each in self._held_below(extent):
            self.queue.release_host(each)
        for each in reversed(self._held_below(extent)):  # releasing may have joined some
            assert each.host is not None
            self.host.give(self.host.forget(each, len(each.host))[::-1])

    @staticmethod
    def _held_below(extent: Extent) -> list[Extent]:
        found: list[Extent] = []
        todo = [extent]
        while todo:
            held = [child for child in (todo.pop().children or {}).values() if child.host is not None]
            found += held
            todo += held
        return found

    # -------------------------------------------------------- coming back

    def onboard(self, extents: Sequence[Extent], *, count: bool) -> array[int]:
        """Bring a path's extents that only the host holds back for a sequence; return their GPU blocks.

        extents  in order, those above them referenced already
        count    whether this counts as a hit
        """
        pool, blocks = self.pool, array("i")
        ends = self._covering(extents)
        for end in ends:
            self.host.acquire_path(end)  # what is evicted now must not displace it
        wanted = sum(extent.num_blocks for extent in extents)
        taken = pool.take(wanted)
        if self.events is not None:
            host_ids = array("i", [block for extent in extents for block in extent.host or ()])
            self.events.add_blocks(ONBOARDED, NOBODY, -1, -1, host_ids + taken)
        for extent in extents:
            ids = taken[len(blocks) : len(blocks) + extent.num_blocks]
            self._revive(extent, ids)
            if pool.lifetimes is not None:
                pool.lifetimes.reused(extent, pool.now)
            pool.policy.hit(extent)
            blocks.extend(ids)
        for end in ends:
            self.queue.hold(end)
            self.host.drop_path(end)
        self.onboarded_blocks += wanted
        self.hit_blocks += wanted if count else 0
        return blocks

    def _covering(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """Return by which of a path's extents, in order, all of them are held."""
        return extents[-1:]

    def _revive(self, extent: Extent, ids: array[int]) -> None:
        """Give an extent that only the host holds GPU blocks, one reference, and the transfers that fill them."""
        assert extent.host is not None
        self.index.revive(extent, ids)
        extent.sealed = True
        extent.references = 1
        self.pool.cached(extent, len(ids))
        self.queue.back(extent.host, ids)

    def recomputed(self, extent: Extent) -> None:
        """Note that an extent was computed anew while only the host held it."""
        if extent.host_references:
            extent.sealed = True  # it must not outgrow what the host holds
        else:
            self.host.discard(extent)

    # -------------------------------------------------------- swapping sequences

    def blocks_to_swap_out(self, sequence: KVSequence) -> int:
        """Return how many host blocks a sequence needs: those of its tokens that the host does not hold yet."""
        indexed = sum(len(extent.ids) for extent in sequence.anchor.path() if extent.host is None)
        return indexed + len(sequence.table) - sequence.anchor.end

    def save(self, sequence: KVSequence) -> None:
        """Let the host hold all that a sequence holds; it is about to let go of the GPU's blocks."""
        needed = self.blocks_to_swap_out(sequence)
        host_ids = self.host.take(needed)
        at = 0
        deepest = None
        moved = array("i")
        for extent in reversed(list(sequence.anchor.path())):
            if extent.host is None:
                moved.extend(extent.ids)
                extent.host = host_ids[at : at + len(extent.ids)]
                at += len(extent.ids)
                extent.sealed = True
                self.queue.out(extent.ids, extent.host)
                deepest = extent
        self.host.acquire_path(sequence.anchor)
        if deepest is not None:
            self.queue.hold(deepest)
        sequence.host = host_ids[at:]
        private = sequence.table[sequence.anchor.end :]
        self.queue.out(private, sequence.host)
        if self.events is not None:
            self.events.add_blocks(SWAPPED_OUT, sequence.number, -1, at, moved + private + host_ids)
        self.swapped[sequence] = None
        self.swapped_out_blocks += needed

    def blocks_to_swap_in(self, sequence: KVSequence) -> tuple[int, int]:
        """Return how many GPU blocks a swapped-out sequence has to take, and how many evictable ones it holds."""
        assert sequence.host is not None
        taken, held = len(sequence.host), 0
        for extent in sequence.anchor.path():
            if not extent.ids:
                taken += extent.num_blocks
            elif not extent.references:
                held += len(extent.ids)
        return taken, held

    def restore(self, sequence: KVSequence) -> None:
        """Give a swapped-out sequence its table back; there must be room."""
        private = sequence.host
        assert private is not None
        taken = self.blocks_to_swap_in(sequence)[0]
        path = list(sequence.anchor.path())
        path.reverse()
        table = sequence.table
        for extent in path:
            if extent.ids:
                self.pool.acquire(extent)
        blocks = self.pool.take(taken)
        at = 0
        deepest = None
        host_ids = array("i")
        for extent in path:
            if not extent.ids:
                deepest = extent
                host_ids.extend(extent.host or ())
                self._revive(extent, blocks[at : at + extent.num_blocks])
                at += extent.num_blocks
            table.extend(extent.ids)
        if deepest is not None:
            self.queue.hold(deepest)
        self.queue.back(private, blocks[at:])
        table.extend(blocks[at:])
        if self.events is not None:
            self.events.add_blocks(SWAPPED_IN, sequence.number, -1, at, host_ids + private + blocks)
        self.forget(sequence)
        self.swapped_in_blocks += taken

    def forget(self, sequence: KVSequence) -> None:
        """Stop holding what a swapped-out sequence has on the host."""
        assert sequence.host is not None
        self.host.give(sequence.host[::-1])
        self.host.drop_path(sequence.anchor)
        sequence.host = None
        del self.swapped[sequence]

    def host_table(self, sequence: KVSequence) -> array[int]:
        """Return the host blocks that hold a swapped-out sequence's tokens, in order."""
        assert sequence.host is not None
        table = array("i")
        for extent in reversed(list(sequence.anchor.path())):
            assert extent.host is not None
            table.extend(extent.host)
        table.extend(sequence.host)
        return table

    # -------------------------------------------------------- counting

    def num_gpu_blocks_held(self) -> int:
        """Return how many cached GPU blocks only transfers hold."""
        extents = self.queue.gpu_held()
        if not extents:
            return 0
        held = self._references(extents)
        return sum(len(extent.ids) for extent, count in held.items() if extent.references == count)

    def stats(self) -> HostStats:
        """Return a snapshot of the host's counters and block states. O(extents that transfers hold)."""
        host = self.host
        held = self._references(self.queue.host_held())
        in_transfer = len(host.limbo) + sum(
            len(extent.host or ()) for extent, count in held.items() if extent.host_references == count
        )
        return HostStats(
            num_blocks=host.num_blocks,
            free_blocks=host.num_free,
            evictable_blocks=host.num_evictable,
            held_blocks=host.num_blocks - host.num_free - host.num_evictable - in_transfer,
            in_transfer_blocks=in_transfer,
            offloaded_blocks=self.offloaded_blocks,
            onboarded_blocks=self.onboarded_blocks,
            hit_blocks=self.hit_blocks,
            evicted_blocks=host.evicted_blocks,
            swapped_out_blocks=self.swapped_out_blocks,
            swapped_in_blocks=self.swapped_in_blocks,
        )

    def _references(self, extents: Iterable[Extent]) -> Counter[Extent]:
        """Return how often holding these extents, each with its path, counts on each extent."""
        return Counter(each for extent in extents for each in self.index.held_with(extent))
