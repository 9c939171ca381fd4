"""Segmented LRU."""

from __future__ import annotations

from collections import OrderedDict, deque

from allocator.eviction.policy import EvictionPolicy
from allocator.prefix import Extent


class _Run:
    """Consecutive blocks of one extent that lie side by side in a segment."""

    __slots__ = ("blocks", "extent")

    def __init__(self, extent: Extent, blocks: int) -> None:
        self.extent = extent
        self.blocks = blocks


class SLRU(EvictionPolicy):
    """Take the least recently used block that was not hit; those hit are protected, up to a share of the pool.

    Karedla, Love and Wherry, Caching Strategies to Improve Disk System Performance, IEEE Computer 27(3), 1994.
    Two LRU lists of evictable blocks. A block that becomes unreferenced joins the protected one if it was hit
    since it was cached (or demoted), else the one on probation. When more than `protected_share` of the pool's
    blocks are protected, the least recently used of them is demoted: it joins the probation list as its most
    recent, and needs another hit to come back. Victims come from probation, and if it is empty, from the
    protected list. Both are lists, the last block of a sequence joining first, so there are no ties.

    Whoever hits a block hits those before it, and a block is demoted before its parent; so the first in line
    never has cached children.

    Raises ValueError unless 0 < protected_share < 1. The default 0.8 is that of Caffeine and libCacheSim.
    """

    def __init__(self, protected_share: float = 0.8) -> None:
        if not 0 < protected_share < 1:
            raise ValueError(f"protected_share ({protected_share}) must lie between 0 and 1")
        self.protected_share = protected_share
        self._room = 0
        self._protected_blocks = 0
        self._probation: OrderedDict[_Run, None] = OrderedDict()  # the next to be taken, first
        self._protected: OrderedDict[_Run, None] = OrderedDict()  # the next to be demoted, first
        self._on_probation: dict[Extent, deque[_Run]] = {}  # the last blocks first
        self._safe: dict[Extent, _Run] = {}  # the leading blocks of an extent, if protected
        self._hit: dict[Extent, int] = {}  # how many blocks, from the first on, were hit since demoted

    def attached(self, num_blocks: int) -> None:
        self._room = int(num_blocks * self.protected_share)

    def hit(self, extent: Extent) -> None:
        self._hit[extent] = len(extent.ids)

    def released(self, extent: Extent) -> None:
        hit = self._hit.get(extent, 0)
        if len(extent.ids) > hit:
            self._join_probation(extent, len(extent.ids) - hit)
        if hit:
            run = self._safe[extent] = _Run(extent, hit)
            self._protected[run] = None
            self._protected_blocks += hit
            while self._protected_blocks > self._room:
                self._demote()

    def _join_probation(self, extent: Extent, blocks: int) -> None:
        runs = self._on_probation.setdefault(extent, deque())
        if runs and next(reversed(self._probation)) is runs[-1]:
            runs[-1].blocks += blocks
            return
        run = _Run(extent, blocks)
        runs.append(run)
        self._probation[run] = None

    def _demote(self) -> None:
        run = next(iter(self._protected))
        extent = run.extent
        blocks = min(run.blocks, self._protected_blocks - self._room)
        self._hit[extent] -= blocks
        self._unprotect(run, blocks)
        self._join_probation(extent, blocks)

    def _unprotect(self, run: _Run, blocks: int) -> None:
        run.blocks -= blocks
        self._protected_blocks -= blocks
        if not run.blocks:
            del self._protected[run]
            del self._safe[run.extent]

    def referenced(self, extent: Extent) -> None:
        for run in self._on_probation.pop(extent, ()):
            del self._probation[run]
        safe = self._safe.get(extent)
        if safe is not None:
            self._unprotect(safe, safe.blocks)

    def split(self, head: Extent, tail: Extent) -> None:
        cut = len(head.ids)
        hit = self._hit.pop(tail, 0)
        if hit:
            self._hit[head] = min(hit, cut)
        if hit > cut:
            self._hit[tail] = hit - cut
        # The head of an evictable extent is about to be referenced: its blocks leave the lists.
        safe = self._safe.get(tail)
        if safe is not None:
            leaving = min(safe.blocks, cut)
            self._unprotect(safe, leaving)
            cut -= leaving
        runs = self._on_probation.get(tail)
        while cut and runs:
            run = runs[-1]
            leaving = min(run.blocks, cut)
            run.blocks -= leaving
            cut -= leaving
            if not run.blocks:
                del self._probation[runs.pop()]

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if self._hit.get(extent, 0) > len(extent.ids):
            self._hit[extent] = len(extent.ids)
        runs = self._on_probation.get(extent)
        while num_blocks and runs:
            run = runs[0]
            leaving = min(run.blocks, num_blocks)
            run.blocks -= leaving
            num_blocks -= leaving
            if not run.blocks:
                del self._probation[runs.popleft()]
        safe = self._safe.get(extent)
        if safe is not None and num_blocks:
            self._unprotect(safe, num_blocks)
        if not extent.ids:
            self._hit.pop(extent, None)
            self._on_probation.pop(extent, None)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        run = next(iter(self._probation or self._protected))
        return run.extent, min(wanted, run.blocks)
