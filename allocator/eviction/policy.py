"""EvictionPolicy: what a policy sees and what it has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from allocator.prefix import Extent


class EvictionPolicy(ABC):
    """Choose which cached block loses its content when the pool needs one.

    The pool tells a policy everything that happens to an extent (consecutive blocks of one prefix that are
    referenced alike) and asks it for a victim. A policy never changes an extent. Life of an extent:

        cached ──▶ (hit …) ──▶ released ──▶ (exposed) ──▶ evicted …
                     ▲             │
                     └─ referenced ┘

    `extent.retention` says how its requests want it kept, None if they do not. It changes only while the extent
    is referenced, and when it is over.

    Override what you need; only `victim` must be. Every call is O(blocks it names) at most, and should be O(1)
    or O(log extents) to be of use.

    In a windowed cache extents are single blocks, each referenced by those alone who hold it. Every evictable one
    is exposed, whatever hangs below it, and a sequence releases its blocks front first: parents leave first.

    A policy belongs to one pool. One that, having chosen a victim, would choose it again until it is empty or
    referenced, all its blocks if so many are wanted, may say so by `drains_victims = True` in its class, each class for
    itself, as it is not inherited. The pool then asks only once, and calls `evicted` when the victim is empty, or
    before anybody looks.
    """

    drains_victims: ClassVar[bool] = False
    in_use = False  # whether a pool has it

    def attached(self, num_blocks: int) -> None:
        """Note the size of the pool that is going to ask. Comes before everything else."""

    def cached(self, extent: Extent, num_blocks: int) -> None:
        """Note that `num_blocks` blocks were appended to `extent` (all it has, if it is new). It is referenced."""

    def hit(self, extent: Extent) -> None:
        """Note that a sequence was admitted that found all of `extent`; `referenced` came before, if due."""

    def referenced(self, extent: Extent) -> None:
        """Note that an evictable extent is referenced again and so no longer evictable."""

    def released(self, extent: Extent) -> None:
        """Note that the last reference is gone and `extent` evictable. Children are released before parents."""

    def exposed(self, extent: Extent) -> None:
        """Note that an evictable extent has no cached child: its last block could be taken right now."""

    def expired(self, extent: Extent) -> None:
        """Note that an evictable extent's retention is over: `extent.retention` is None from now on."""

    def split(self, head: Extent, tail: Extent) -> None:
        """Note that an extent was cut: `tail` is the known object, shorter; `head`, its parent, is new.

        Both are in the state the whole was in. An evictable extent is cut only to reference the head, so
        `referenced(head)` follows at once.
        """

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        """Note that the last `num_blocks` blocks were taken; an extent without blocks is gone for good.

        A referenced extent loses its last block this way too, when its only holder writes into it.
        """

    @abstractmethod
    def victim(self, wanted: int) -> tuple[Extent, int]:
        """Return an exposed extent and how many of its last blocks to take, at least 1.

        `wanted` is what the pool needs; more is not taken. Called only while an evictable block exists.
        """
