"""What an event log says: the exact state of a manager's blocks and tables after any number of its events.

    manager = KVCacheManager(1000, 16, events=True)
    ...
    state = rebuild(manager.events, 5000)               # after its first 5,000 events
    state = rebuild(EventLog.from_columns(columns))     # from arrays, `manager.events.columns()` for example

The manager logs what it chose (which blocks were taken, hit, evicted) and what was called. That a block is free,
evictable, referenced or in transfer is never logged: it follows from who holds it, by the rules of `Replayer`.
Events of one call follow each other, and the state between two of them is the state in the midst of that call.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator import event_log as kinds
from allocator.event_log import COLUMNS, KINDS, NOBODY, ROOT, Event, EventLog, Kind

if TYPE_CHECKING:
    from allocator.manager import KVCacheManager

__all__ = [
    "COLUMNS",
    "EVICTABLE",
    "FREE",
    "IN_TRANSFER",
    "KINDS",
    "NOBODY",
    "REFERENCED",
    "ROOT",
    "STATES",
    "UNCACHED",
    "CacheState",
    "Event",
    "EventLog",
    "Kind",
    "Replayer",
    "SequenceState",
    "rebuild",
]

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


class _Sequence:
    """A running sequence while events are applied; `num_tokens` lacks what its batch has advanced in all."""

    __slots__ = ("batch", "num_tokens", "prefix", "table")

    def __init__(self) -> None:
        self.table = array("i")
        self.prefix = array("i")
        self.num_tokens = 0
        self.batch = NOBODY


class Replayer:
    """Applies events, some or all at a time, and says how everything stands after them.

    A block in the prefix of a sequence or of a pending copy is held, one in a table is referenced by it, and
    either end of a pending copy is pinned. Hence, of a cached block: held or else evictable; of any other: in a
    table or else, while pinned, in transfer; or else free.
    """

    def __init__(self) -> None:
        self.num_events = 0
        self.tokens_per_block = 0
        self._sequences: dict[int, _Sequence] = {}
        self._ticks: Counter[int] = Counter()  # by batch
        self._pinned: list[int] = []
        self._held_for_copies: list[array[int]] = []
        self._resize(0)

    def _resize(self, num_blocks: int) -> None:
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._holds = np.zeros(num_blocks, dtype=np.int32)
        self._pins = np.zeros(num_blocks, dtype=np.int32)
        self._parents = np.full(num_blocks, UNCACHED, dtype=np.int32)

    def apply(self, log: EventLog, upto: int | None = None) -> None:
        """Apply the log's events from where this stands to its first `upto`, or to its end.

        Raises ValueError, naming the event, where the log contradicts itself.
        """
        upto = len(log) if upto is None else upto
        for event in log.events(self.num_events, upto):
            try:
                self._apply(event)
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"event {self.num_events} ({KINDS[event.kind].name}) cannot follow those before it: "
                    f"no {error}"
                ) from None
            except _Contradiction as error:
                raise ValueError(f"event {self.num_events} ({KINDS[event.kind].name}): {error}") from None
            self.num_events += 1

    def state(self) -> CacheState:
        """Return how everything stands, as a copy."""
        cached = self._parents != UNCACHED
        uncached = np.where(self._references, REFERENCED, np.where(self._pins, IN_TRANSFER, FREE))
        states = np.where(cached, np.where(self._holds, REFERENCED, EVICTABLE), uncached)
        sequences = {
            number: SequenceState(self._length(each), tuple(each.table), tuple(each.prefix))
            for number, each in self._sequences.items()
        }
        return CacheState(
            states.astype(np.uint8),
            self._references.copy(),
            self._holds.copy(),
            self._parents.copy(),
            sequences,
        )

    def _length(self, sequence: _Sequence) -> int:
        return sequence.num_tokens + self._ticks[sequence.batch]

    # -------------------------------------------------------- one event

    def _apply(self, event: Event) -> None:
        kind, number = event.kind, event.sequence
        if number == NOBODY:
            self._apply_to_pool(event)
        elif kind in (kinds.ADMITTED, kinds.FORKED):
            self._start(number, NOBODY if kind == kinds.ADMITTED else event.other)
        else:
            self._apply_to(self._sequences[number], event)

    def _apply_to_pool(self, event: Event) -> None:
        kind, _, other, value, blocks = event
        if kind == kinds.EVICTED:
            self._uncache(blocks)
            _require(not self._holds[blocks].any(), f"{blocks.tolist()} must not be held")
        elif kind == kinds.ADVANCED:
            self._ticks[other] += value
        elif kind == kinds.EXECUTED:
            self._release_copies()
        elif kind == kinds.UNSTORED:
            self._uncache(blocks)
        elif kind == kinds.CREATED:
            self.tokens_per_block = other
            self._resize(value)
        else:
            raise _Contradiction("it must be of a sequence")

    def _start(self, number: int, parent: int) -> None:
        _require(number not in self._sequences, f"sequence {number} must not run already")
        sequence = _Sequence()
        if parent != NOBODY:
            origin = self._sequences[parent]
            sequence.table, sequence.prefix = origin.table[:], origin.prefix[:]
            sequence.num_tokens = self._length(origin)
            self._references[sequence.table] += 1
            self._holds[sequence.prefix] += 1
        self._sequences[number] = sequence

    def _apply_to(self, sequence: _Sequence, event: Event) -> None:
        kind, number, other, value, blocks = event
        if kind == kinds.TAKEN:
            self._require_free(blocks)
            self._enter(sequence, blocks)
            sequence.num_tokens += value
        elif kind == kinds.STORED:
            self._store(sequence, other, value, blocks)
        elif kind == kinds.HIT:
            self._hold(sequence, blocks)
            self._enter(sequence, blocks)
            sequence.num_tokens += value
        elif kind == kinds.REPEATED:
            self._hold(sequence, blocks)
        elif kind == kinds.FREED:
            self._references[sequence.table] -= 1
            self._holds[sequence.prefix] -= 1
            del self._sequences[number]
        elif kind == kinds.JOINED:
            sequence.batch = other
            sequence.num_tokens -= self._ticks[other]
        elif kind == kinds.LEFT:
            sequence.num_tokens = self._length(sequence)
            sequence.batch = NOBODY
        elif kind == kinds.COPIED:
            self._copy(sequence, *blocks)
        elif kind == kinds.DETACHED:
            self._detach(sequence, value)
        elif kind == kinds.UNSTORED:
            self._detach(sequence, len(sequence.prefix) - len(blocks))
            self._uncache(blocks)
        elif kind == kinds.TRUNCATED:
            keep = -(-value // self.tokens_per_block)
            self._references[sequence.table[keep:]] -= 1
            del sequence.table[keep:]
            sequence.num_tokens = value
        elif kind == kinds.EXCHANGED:
            heir = self._sequences[other]
            sequence.table, heir.table = heir.table, sequence.table
            sequence.prefix, heir.prefix = heir.prefix, sequence.prefix
        else:
            raise _Contradiction(f"it must not be of a sequence ({number})")

    def _require_free(self, blocks: array[int]) -> None:
        free = (self._parents[blocks] == UNCACHED) & (self._references[blocks] + self._pins[blocks] == 0)
        _require(bool(free.all()), f"{blocks.tolist()} must be free")

    def _enter(self, sequence: _Sequence, blocks: array[int]) -> None:
        self._references[blocks] += 1
        sequence.table.extend(blocks)

    def _hold(self, sequence: _Sequence, blocks: array[int]) -> None:
        _require(bool((self._parents[blocks] != UNCACHED).all()), f"{blocks.tolist()} must be cached")
        self._holds[blocks] += 1
        sequence.prefix.extend(blocks)

    def _store(self, sequence: _Sequence, parent: int, position: int, blocks: array[int]) -> None:
        above = sequence.prefix[-1] if sequence.prefix else ROOT
        _require(parent == above, f"{parent} must be the last block of the sequence's prefix, {above}")
        _require(position == len(sequence.prefix), f"{position} must be its prefix's {len(sequence.prefix)}")
        _require(
            bool((self._parents[blocks] == UNCACHED).all()), f"{blocks.tolist()} must not be cached already"
        )
        self._parents[blocks] = [parent, *blocks[:-1]]
        self._holds[blocks] += 1
        sequence.prefix.extend(blocks)

    def _detach(self, sequence: _Sequence, end: int) -> None:
        self._holds[sequence.prefix[end:]] -= 1
        del sequence.prefix[end:]

    def _uncache(self, blocks: array[int]) -> None:
        _require(bool((self._parents[blocks] != UNCACHED).all()), f"{blocks.tolist()} must be cached")
        self._parents[blocks] = UNCACHED

    def _copy(self, sequence: _Sequence, source: int, destination: int) -> None:
        last = len(sequence.table) - 1
        _require(sequence.table[last] == source, f"{source} must be the last block of its table")
        self._require_free(array("i", (destination,)))
        sequence.table[last] = destination
        self._references[source] -= 1
        self._references[destination] += 1
        self._pin(destination)
        if self._parents[source] == UNCACHED:
            self._pin(source)
        else:  # a cached source is kept by its whole prefix
            self._holds[sequence.prefix] += 1
            self._held_for_copies.append(sequence.prefix[:])

    def _pin(self, block: int) -> None:
        self._pins[block] += 1
        self._pinned.append(block)

    def _release_copies(self) -> None:
        for block in self._pinned:
            self._pins[block] -= 1
        for prefix in self._held_for_copies:
            self._holds[prefix] -= 1
        self._pinned.clear()
        self._held_for_copies.clear()


class _Contradiction(Exception):
    """An event that the events before it rule out."""


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise _Contradiction(rule)


def rebuild(log: EventLog, upto: int | None = None) -> CacheState:
    """Return the exact state after the first `upto` events of a log, or after all of them.

    Raises ValueError where the log contradicts itself. To go on from there, use a `Replayer`.
    """
    replayer = Replayer()
    replayer.apply(log, upto)
    return replayer.state()
