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

import numpy as np

from allocator import event_log as kinds
from allocator.cache_state import (
    EVICTABLE,
    FREE,
    IN_TRANSFER,
    REFERENCED,
    STATES,
    UNCACHED,
    CacheState,
    SequenceState,
)
from allocator.event_log import COLUMNS, KINDS, NOBODY, ROOT, Event, EventLog, Kind

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


class _Sequence:
    """A running sequence while events are applied; `num_tokens` lacks what its batch has advanced in all."""

    __slots__ = ("batch", "num_tokens", "prefix", "table")

    def __init__(self) -> None:
        self.table = array("i")
        self.prefix = array("i")
        self.num_tokens = 0
        self.batch = NOBODY


class _PerBlock:
    """An integer a block: `one` for single blocks, several times faster, and `all` for many; the same memory."""

    __slots__ = ("all", "one")

    def __init__(self, num_blocks: int, value: int = 0) -> None:
        self.one = array("i", (value,)) * num_blocks
        self.all = np.asarray(self.one)

    def add(self, blocks: array[int], number: int) -> None:
        """Add to the number of each block, none of which comes twice."""
        if len(blocks) == 1:
            self.one[blocks[0]] += number
        else:
            self.all[blocks] += number

    def set(self, blocks: array[int], number: int) -> None:
        """Set the number of each block."""
        if len(blocks) == 1:
            self.one[blocks[0]] = number
        else:
            self.all[blocks] = number

    def are(self, blocks: array[int], number: int) -> bool:
        """Return whether each block's number is this."""
        if len(blocks) == 1:
            return self.one[blocks[0]] == number
        return bool((self.all[blocks] == number).all())

    def have(self, blocks: array[int], number: int) -> bool:
        """Return whether any block's number is this."""
        if len(blocks) == 1:
            return self.one[blocks[0]] == number
        return bool((self.all[blocks] == number).any())


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
        self._handlers = {
            kinds.CREATED: self._created,
            kinds.ADMITTED: self._admitted,
            kinds.HIT: self._hit,
            kinds.TAKEN: self._taken,
            kinds.STORED: self._stored,
            kinds.REPEATED: self._repeated,
            kinds.UNSTORED: self._unstored,
            kinds.DETACHED: self._detached,
            kinds.COPIED: self._copied,
            kinds.EXECUTED: self._executed,
            kinds.FORKED: self._forked,
            kinds.TRUNCATED: self._truncated,
            kinds.EXCHANGED: self._exchanged,
            kinds.FREED: self._freed,
            kinds.JOINED: self._joined,
            kinds.LEFT: self._left,
            kinds.ADVANCED: self._advanced,
            kinds.EVICTED: self._evicted,
            kinds.BRANCHED: self._branched,
            kinds.STOLEN: self._stolen,
        }

    def _resize(self, num_blocks: int) -> None:
        self._references = _PerBlock(num_blocks)
        self._holds = _PerBlock(num_blocks)
        self._pins = _PerBlock(num_blocks)
        self._parents = _PerBlock(num_blocks, UNCACHED)

    def apply(self, log: EventLog, upto: int | None = None) -> None:
        """Apply the log's events from where this stands to its first `upto`, or to its end.

        Raises ValueError, naming the event, where the log contradicts itself.
        """
        handlers = self._handlers
        for event in log.events(self.num_events, upto):
            try:
                handlers[event.kind](event)
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"event {self.num_events} ({KINDS[event.kind].name}) cannot follow those before it: "
                    f"there is no {error}"
                ) from None
            except _Contradiction as error:
                raise ValueError(f"event {self.num_events} ({KINDS[event.kind].name}): {error}") from None
            self.num_events += 1

    def state(self) -> CacheState:
        """Return how everything stands, as a copy."""
        cached = self._parents.all != UNCACHED
        uncached = np.where(self._references.all, REFERENCED, np.where(self._pins.all, IN_TRANSFER, FREE))
        states = np.where(cached, np.where(self._holds.all, REFERENCED, EVICTABLE), uncached)
        sequences = {
            number: SequenceState(self._length(each), tuple(each.table), tuple(each.prefix))
            for number, each in self._sequences.items()
        }
        return CacheState(
            states.astype(np.uint8),
            self._references.all.copy(),
            self._holds.all.copy(),
            self._parents.all.copy(),
            sequences,
        )

    def _length(self, sequence: _Sequence) -> int:
        return sequence.num_tokens + self._ticks[sequence.batch]

    # -------------------------------------------------------- sequences come and go

    def _created(self, event: Event) -> None:
        self.tokens_per_block = event.other
        self._resize(event.value)

    def _admitted(self, event: Event) -> None:
        self._start(event.sequence, _Sequence())

    def _forked(self, event: Event) -> None:
        parent, child = self._sequences[event.other], _Sequence()
        self._start(event.sequence, child)
        child.num_tokens = self._length(parent)
        self._enter(child, parent.table)
        self._hold(child, parent.prefix)

    def _start(self, number: int, sequence: _Sequence) -> None:
        if number in self._sequences:
            raise _Contradiction(f"sequence {number} must not run already")
        self._sequences[number] = sequence

    def _freed(self, event: Event) -> None:
        sequence = self._sequences.pop(event.sequence)
        self._references.add(sequence.table, -1)
        self._holds.add(sequence.prefix, -1)

    def _exchanged(self, event: Event) -> None:
        one, other = self._sequences[event.sequence], self._sequences[event.other]
        one.table, other.table = other.table, one.table
        one.prefix, other.prefix = other.prefix, one.prefix

    # -------------------------------------------------------- tables grow and shrink

    def _taken(self, event: Event) -> None:
        self._require_free(event.blocks)
        sequence = self._sequences[event.sequence]
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value

    def _hit(self, event: Event) -> None:
        self._repeated(event)
        sequence = self._sequences[event.sequence]
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value

    def _truncated(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        keep = -(-event.value // self.tokens_per_block)
        self._references.add(sequence.table[keep:], -1)
        del sequence.table[keep:]
        sequence.num_tokens = event.value

    def _joined(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        sequence.num_tokens -= self._ticks[event.other]
        sequence.batch = event.other

    def _left(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        sequence.num_tokens = self._length(sequence)
        sequence.batch = NOBODY

    def _advanced(self, event: Event) -> None:
        self._ticks[event.other] += event.value

    def _enter(self, sequence: _Sequence, blocks: array[int]) -> None:
        self._references.add(blocks, 1)
        sequence.table.extend(blocks)

    def _require_free(self, blocks: array[int]) -> None:
        if not (
            self._parents.are(blocks, UNCACHED)
            and self._references.are(blocks, 0)
            and self._pins.are(blocks, 0)
        ):
            raise _Contradiction(f"{blocks.tolist()} must be free")

    # -------------------------------------------------------- blocks are cached, and no longer

    def _stored(self, event: Event) -> None:
        sequence, blocks = self._sequences[event.sequence], event.blocks
        prefix = sequence.prefix
        above = prefix[-1] if prefix else ROOT
        if event.other != above:
            raise _Contradiction(f"{event.other} must be the last block of the sequence's prefix, {above}")
        if event.value != len(prefix):
            raise _Contradiction(f"{event.value} must be the length of its prefix, {len(prefix)}")
        if not self._parents.are(blocks, UNCACHED):
            raise _Contradiction(f"{blocks.tolist()} must not be cached already")
        self._parents.one[blocks[0]] = above
        if len(blocks) > 1:
            self._parents.all[blocks[1:]] = blocks[:-1]
        self._hold(sequence, blocks)

    def _repeated(self, event: Event) -> None:
        self._require_cached(event.blocks)
        self._hold(self._sequences[event.sequence], event.blocks)

    def _evicted(self, event: Event) -> None:
        if not self._holds.are(event.blocks, 0):
            raise _Contradiction(f"{event.blocks.tolist()} must not be held")
        self._uncache(event.blocks)

    def _unstored(self, event: Event) -> None:
        if event.sequence != NOBODY:
            sequence = self._sequences[event.sequence]
            self._cut_prefix(sequence, len(sequence.prefix) - len(event.blocks))
        self._uncache(event.blocks)

    def _detached(self, event: Event) -> None:
        self._cut_prefix(self._sequences[event.sequence], event.value)

    def _hold(self, sequence: _Sequence, blocks: array[int]) -> None:
        self._holds.add(blocks, 1)
        sequence.prefix.extend(blocks)

    def _cut_prefix(self, sequence: _Sequence, end: int) -> None:
        self._holds.add(sequence.prefix[end:], -1)
        del sequence.prefix[end:]

    def _require_cached(self, blocks: array[int]) -> None:
        if self._parents.have(blocks, UNCACHED):
            raise _Contradiction(f"{blocks.tolist()} must be cached")

    def _uncache(self, blocks: array[int]) -> None:
        self._require_cached(blocks)
        self._parents.set(blocks, UNCACHED)

    # -------------------------------------------------------- copies

    def _copied(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        source, destination = event.blocks
        if sequence.table[-1] != source:
            raise _Contradiction(f"{source} must be the last block of its table")
        self._require_free(event.blocks[1:])
        sequence.table[-1] = destination
        self._references.one[source] -= 1
        self._references.one[destination] += 1
        self._pin(destination)
        if self._parents.one[source] == UNCACHED:
            self._pin(source)
        else:  # a cached source is kept by its whole prefix
            self._holds.add(sequence.prefix, 1)
            self._held_for_copies.append(sequence.prefix[:])

    def _branched(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        _, destination = event.blocks
        self._require_cached(event.blocks[:1])
        self._require_free(event.blocks[1:])
        self._enter(sequence, event.blocks[1:])
        self._pin(destination)
        held = sequence.prefix + event.blocks[:1]
        self._holds.add(held, 1)
        self._held_for_copies.append(held)
        sequence.num_tokens += event.value

    def _stolen(self, event: Event) -> None:
        self._evicted(event)
        sequence = self._sequences[event.sequence]
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value

    def _executed(self, event: Event) -> None:
        for block in self._pinned:
            self._pins.one[block] -= 1
        for prefix in self._held_for_copies:
            self._holds.add(prefix, -1)
        self._pinned.clear()
        self._held_for_copies.clear()

    def _pin(self, block: int) -> None:
        self._pins.one[block] += 1
        self._pinned.append(block)


class _Contradiction(Exception):
    """An event that the events before it rule out."""


def rebuild(log: EventLog, upto: int | None = None) -> CacheState:
    """Return the exact state after the first `upto` events of a log, or after all of them.

    Raises ValueError where the log contradicts itself. To go on from there, use a `Replayer`.
    """
    replayer = Replayer()
    replayer.apply(log, upto)
    return replayer.state()
