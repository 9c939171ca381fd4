"""CacheState: how every block and every sequence of a cache stands at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.event_log import ROOT

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager
    from allocator.prefix import Extent

FREE, EVICTABLE, REFERENCED, IN_TRANSFER = range(4)
STATES = ("free", "evictable", "referenced", "in transfer")
"""Names of the states of a block, each of which has exactly one."""
UNCACHED = -2
"""Parent of a block that is not cached; a cached first block's is ROOT."""
GONE = -3
"""Parent of a block behind one that a windowed cache has evicted."""
HOST_PARENT = -4
"""Parent of what only the host holds behind a block that only the host holds, too: HOST_PARENT − that block."""

_NO_STATES: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
_NO_BLOCKS: NDArray[np.int32] = np.zeros(0, dtype=np.int32)


class SequenceState(NamedTuple):
    """A sequence: its length, its table, and the cached blocks that say what its prefix says.

    Where the prefix names another block than the table, the sequence computed what was cached already. In a
    windowed cache, table and prefix lack `left` blocks after those of the sinks, and the prefix has −1 instead of
    another block.
    """

    num_tokens: int
    table: tuple[int, ...]
    prefix: tuple[int, ...]
    left: int = 0


@dataclass(frozen=True, eq=False)
class CacheState:
    """How all blocks and sequences of a manager stand at one moment.

    states        uint8 [num_blocks]  FREE, EVICTABLE, REFERENCED or IN_TRANSFER
    references    int32 [num_blocks]  tables that hold the block
    holds         int32 [num_blocks]  prefixes (of sequences, copies, transfers) that lead through a cached block
    parents       int32 [num_blocks]  the cached block before it in its prefix, ROOT, GONE or UNCACHED
    sequences     running ones, by the number that the log gave them

    and of the host tier, if there is one:

    host_states   uint8 [num_host_blocks]  as above; REFERENCED is what a swapped-out sequence needs
    host_holds    int32 [num_host_blocks]  prefixes (of swapped-out sequences, transfers) that lead through it there
    host_parents  int32 [num_host_blocks]  as above, a GPU block or HOST_PARENT − host block
    host_copies   int32 [num_host_blocks]  the GPU block that holds the same content, or −1
    swapped       swapped-out sequences, with tables and prefixes of host blocks
    """

    states: NDArray[np.uint8]
    references: NDArray[np.int32]
    holds: NDArray[np.int32]
    parents: NDArray[np.int32]
    sequences: dict[int, SequenceState]
    host_states: NDArray[np.uint8] = field(default_factory=_NO_STATES.copy)
    host_holds: NDArray[np.int32] = field(default_factory=_NO_BLOCKS.copy)
    host_parents: NDArray[np.int32] = field(default_factory=_NO_BLOCKS.copy)
    host_copies: NDArray[np.int32] = field(default_factory=_NO_BLOCKS.copy)
    swapped: dict[int, SequenceState] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many blocks are in each state, by its name."""
        return _counts(self.states)

    def host_counts(self) -> dict[str, int]:
        """Return how many host blocks are in each state, by its name."""
        return _counts(self.host_states)

    def prefix(self, block: int) -> list[int]:
        """Return the cached blocks, from the first that is not GONE, to `block`: whose content `block` continues."""
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
        for name, values in vars(self).items():
            others = getattr(other, name)
            if isinstance(values, dict):
                for number in sorted(values.keys() | others.keys()):
                    if values.get(number) != others.get(number):
                        found.append(f"{name} {number} {values.get(number)}, {others.get(number)}")
            elif len(values) != len(others):
                found.append(f"{name} of {len(values)} and {len(others)} blocks")
            else:
                for block in np.flatnonzero(values != others).tolist():
                    found.append(f"{name} {block} {values[block]}, {others[block]}")
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheState) and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    @classmethod
    def of(cls, manager: KVCacheManager) -> CacheState:
        """Return how a manager with events stands, recounted from tables, tree, transfers and free lists. Slow."""
        pool, tier = manager.pool, manager.pool.tier
        extents = list(manager.index.extents())
        arriving = _held_with(manager, [] if tier is None else tier.queue.gpu_held())
        states = np.full(pool.num_blocks, REFERENCED, dtype=np.uint8)
        holds = np.zeros(pool.num_blocks, dtype=np.int32)
        parents = np.full(pool.num_blocks, UNCACHED, dtype=np.int32)
        states[pool.free_ids()] = FREE
        states[list(pool.limbo)] = IN_TRANSFER
        for extent in extents:
            if extent.ids:
                states[extent.ids] = _state_of_held(extent.references, arriving[extent])
                holds[extent.ids] = extent.references
                parents[extent.ids] = [_last(extent.parent), *extent.ids[:-1]]
        references = np.zeros(pool.num_blocks, dtype=np.int32)
        named = Counter(block for sequence in manager.sequences for block in sequence.table)
        references[list(named)] = list(named.values())
        sequences = {}
        for sequence in manager.sequences:
            prefix: list[int] = []
            if manager.windowed is None:
                for extent in sequence.anchor.path():
                    prefix[:0] = extent.ids
            else:
                prefix = [-1 if node is None else node.ids[0] for node in sequence.held]
            sequences[sequence.number] = SequenceState(
                sequence.num_tokens, tuple(sequence.table), tuple(prefix), sequence.left
            )
        state = cls(states, references, holds, parents, sequences)
        return state if tier is None else state._with_host(manager, extents)

    def _with_host(self, manager: KVCacheManager, extents: list[Extent]) -> CacheState:
        tier = manager.pool.tier
        assert tier is not None
        host = tier.host
        arriving = _held_with(manager, tier.queue.host_held())
        states = np.full(host.num_blocks, REFERENCED, dtype=np.uint8)
        states[host.free_ids()] = FREE
        states[list(host.limbo)] = IN_TRANSFER
        holds = np.zeros(host.num_blocks, dtype=np.int32)
        parents = np.full(host.num_blocks, UNCACHED, dtype=np.int32)
        copies = np.full(host.num_blocks, -1, dtype=np.int32)
        for extent in extents:
            if extent.host is None:
                continue
            states[extent.host] = _state_of_held(extent.host_references, arriving[extent])
            holds[extent.host] = extent.host_references
            if extent.ids:
                copies[extent.host] = extent.ids
                parents[extent.host] = [_last(extent.parent), *extent.ids[:-1]]
            else:
                parents[extent.host] = [
                    _last(extent.parent),
                    *(HOST_PARENT - block for block in extent.host[:-1]),
                ]
        swapped = {}
        for sequence in tier.swapped:
            assert sequence.host is not None
            table = tuple(tier.host_table(sequence))
            prefix = table[: len(table) - len(sequence.host)]
            if manager.windowed is not None:
                prefix = tuple(-1 if n is None or n.host is None else n.host[0] for n in sequence.held)
            state = SequenceState(sequence.num_tokens, table, prefix, sequence.left)
            swapped[sequence.number] = state
        return CacheState(
            self.states,
            self.references,
            self.holds,
            self.parents,
            self.sequences,
            states,
            holds,
            parents,
            copies,
            swapped,
        )


def _counts(states: NDArray[np.uint8]) -> dict[str, int]:
    counted = np.bincount(states, minlength=len(STATES)).tolist()
    return dict(zip(STATES, counted, strict=True))


def _state_of_held(holds: int, of_transfers: int) -> int:
    """Return the state of cached content that so many prefixes lead through, so many of them of transfers."""
    if not holds:
        return EVICTABLE
    return IN_TRANSFER if holds == of_transfers else REFERENCED


def _held_with(manager: KVCacheManager, extents: Iterable[Extent]) -> Counter[Extent]:
    """Return how often each extent is held by holding these."""
    counts: Counter[Extent] = Counter()
    for extent in extents:
        counts.update(manager.index.held_with(extent))
    return counts


def _last(extent: Extent | None) -> int:
    """Return what stands for an extent's last block as a parent."""
    if extent is None or extent.parent is None:
        return ROOT
    if extent.ids:
        return extent.ids[-1]
    return GONE if extent.host is None else HOST_PARENT - extent.host[-1]
