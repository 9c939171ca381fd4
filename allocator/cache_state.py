"""CacheState: how every block and every sequence of a cache stands at one moment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.event_log import ROOT

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager

FREE, EVICTABLE, REFERENCED, IN_TRANSFER = range(4)
STATES = ("free", "evictable", "referenced", "in transfer")
"""Names of the states of a block, each of which has exactly one."""
UNCACHED = -2
"""Parent of a block that is not cached; a cached first block's is ROOT."""


class SequenceState(NamedTuple):
    """A running sequence: its length, its table, and the cached blocks that say what its prefix says.

    Where the prefix names another block than the table, the sequence computed what was cached already.
    """

    num_tokens: int
    table: tuple[int, ...]
    prefix: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CacheState:
    """How all blocks and sequences of a manager stand at one moment.

    states      uint8 [num_blocks]  FREE, EVICTABLE, REFERENCED or IN_TRANSFER
    references  int32 [num_blocks]  tables that hold the block
    holds       int32 [num_blocks]  prefixes (of sequences and of pending copies) that lead through a cached block
    parents     int32 [num_blocks]  the cached block before it in its prefix, ROOT, or UNCACHED
    sequences   by the number that the log gave them
    """

    states: NDArray[np.uint8]
    references: NDArray[np.int32]
    holds: NDArray[np.int32]
    parents: NDArray[np.int32]
    sequences: dict[int, SequenceState]

    def counts(self) -> dict[str, int]:
        """Return how many blocks are in each state, by its name."""
        counted = np.bincount(self.states, minlength=len(STATES)).tolist()
        return dict(zip(STATES, counted, strict=True))

    def prefix(self, block: int) -> list[int]:
        """Return the cached blocks from the first to `block`: those whose content `block` continues."""
        blocks = []
        while block >= 0:
            if self.parents[block] == UNCACHED:
                raise ValueError(f"block ({block}) must be cached")
            blocks.append(block)
            block = int(self.parents[block])
        return blocks[::-1]

    def differences(self, other: CacheState) -> list[str]:
        """Return what differs, a line each: "block 3 states 0, 1", "sequence 2 …"."""
        found = []
        for name in ("states", "references", "holds", "parents"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if len(mine) != len(theirs):
                return [f"pools of {len(mine)} and {len(theirs)} blocks"]
            for block in np.flatnonzero(mine != theirs).tolist():
                found.append(f"block {block} {name} {mine[block]}, {theirs[block]}")
        for number in sorted(self.sequences.keys() | other.sequences.keys()):
            one, two = self.sequences.get(number), other.sequences.get(number)
            if one != two:
                found.append(f"sequence {number} {one}, {two}")
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheState) and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    @classmethod
    def of(cls, manager: KVCacheManager) -> CacheState:
        """Return how a manager with events stands, recounted from its tables, its tree and its free list. Slow."""
        pool = manager.pool
        states = np.full(pool.num_blocks, REFERENCED, dtype=np.uint8)
        holds = np.zeros(pool.num_blocks, dtype=np.int32)
        parents = np.full(pool.num_blocks, UNCACHED, dtype=np.int32)
        states[pool.free_ids()] = FREE
        states[list(pool.limbo)] = IN_TRANSFER
        for extent in manager.index.extents():
            if not extent.ids:
                continue
            if not extent.references:
                states[extent.ids] = EVICTABLE
            holds[extent.ids] = extent.references
            above = extent.parent.ids if extent.parent is not None else ()
            parents[extent.ids] = [above[-1] if above else ROOT, *extent.ids[:-1]]
        references = np.zeros(pool.num_blocks, dtype=np.int32)
        named = Counter(block for sequence in manager.sequences for block in sequence.table)
        references[list(named)] = list(named.values())
        sequences = {}
        for sequence in manager.sequences:
            prefix: list[int] = []
            for extent in sequence.anchor.path():
                prefix[:0] = extent.ids
            sequences[sequence.number] = SequenceState(
                sequence.num_tokens, tuple(sequence.table), tuple(prefix)
            )
        return cls(states, references, holds, parents, sequences)
