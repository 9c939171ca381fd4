"""BlockReplay: events applied to blocks and tables, without the host tier, which `allocator.events` adds.

What a block caches is a *position*: a place in a prefix. Positions have numbers of their own, since their content
can move from one block to another.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from allocator.event_log import NOBODY, ROOT, Event

NONE = -1
"""Position of a block that is not cached, and block of a position that has none."""


class Contradiction(Exception):
    """An event that the events before it rule out."""


class Sequence:
    """A sequence while events are applied.

    num_tokens  its length, less what its batch has advanced in all
    table       its blocks, of the GPU or, while it is swapped out, of the host beyond the cached ones
    prefix      the positions that say what its prefix says
    left        blocks that a window has passed; a windowed prefix has NONE for what it repeats
    """

    __slots__ = ("batch", "left", "num_tokens", "prefix", "table")

    def __init__(self) -> None:
        self.table = array("i")
        self.prefix = array("i")
        self.num_tokens = 0
        self.batch = NOBODY
        self.left = 0


class Column:
    """An integer for each of many: `one` for single ones, several times faster, `all` for many; the same memory."""

    __slots__ = ("all", "one")

    def __init__(self, length: int, value: int = 0) -> None:
        self.one = array("i", (value,)) * length
        self.all = np.asarray(self.one)

    def of(self, places: array[int]) -> array[int]:
        """Return the numbers at these places."""
        if len(places) == 1:
            return array("i", (self.one[places[0]],))
        return array("i", self.all[places].tobytes())

    def add(self, places: array[int], number: int) -> None:
        """Add to the number at each place, none of which comes twice."""
        if len(places) == 1:
            self.one[places[0]] += number
        else:
            self.all[places] += number

    def set(self, places: array[int], number: int | array[int]) -> None:
        """Set the number at each place, to the same or to one each."""
        self.all[places] = number

    def are(self, places: array[int], number: int) -> bool:
        """Return whether the number at each place is this."""
        if len(places) == 1:
            return self.one[places[0]] == number
        return bool((self.all[places] == number).all())

    def have(self, places: array[int], number: int) -> bool:
        """Return whether the number at any place is this."""
        if len(places) == 1:
            return self.one[places[0]] == number
        return bool((self.all[places] == number).any())


class BlockReplay:
    """Blocks, positions, tables and copies; a handler for each kind of event, named like it."""

    def __init__(self) -> None:
        self.tokens_per_block = 0
        self._sequences: dict[int, Sequence] = {}
        self._ticks: Counter[int] = Counter()  # by batch
        self._pinned: list[int] = []
        self._held_for_copies: list[array[int]] = []
        self._windowed = False
        self._position_at: dict[int, int] = {}  # by place, of a windowed cache
        self._resize(0, 0)

    def _resize(self, num_blocks: int, num_host_blocks: int) -> None:
        positions = num_blocks + num_host_blocks
        self._references = Column(num_blocks)
        self._pins = Column(num_blocks)
        self._cached_at = Column(num_blocks, NONE)  # position
        self._block = Column(positions, NONE)
        self._parent = Column(positions, ROOT)  # of a windowed cache, the place
        self._place = Column(positions, NONE)
        self._holds = Column(positions)
        self._host_block = Column(positions, NONE)
        self._unused = array("i", range(positions - 1, -1, -1))

    def length(self, sequence: Sequence) -> int:
        """Return a sequence's length."""
        return sequence.num_tokens + self._ticks[sequence.batch]

    # -------------------------------------------------------- sequences come and go

    def created(self, event: Event) -> None:
        self.tokens_per_block = event.other
        self._resize(event.value, 0)

    def admitted(self, event: Event) -> None:
        self._start(event.sequence, Sequence())

    def forked(self, event: Event) -> None:
        parent, child = self._sequences[event.other], Sequence()
        self._start(event.sequence, child)
        child.num_tokens, child.left = self.length(parent), parent.left
        self._enter(child, parent.table)
        self._hold(child, parent.prefix)

    def _start(self, number: int, sequence: Sequence) -> None:
        if number in self._sequences:
            raise Contradiction(f"sequence {number} must not run already")
        self._sequences[number] = sequence

    def freed(self, event: Event) -> None:
        self._leave(self._sequences.pop(event.sequence))

    def exchanged(self, event: Event) -> None:
        one, other = self._sequences[event.sequence], self._sequences[event.other]
        one.table, other.table = other.table, one.table
        one.prefix, other.prefix = other.prefix, one.prefix
        one.left, other.left = other.left, one.left

    def _leave(self, sequence: Sequence) -> None:
        """Let a sequence hold nothing on the GPU."""
        self._references.add(sequence.table, -1)
        self._holds.add(self._held(sequence.prefix), -1)

    # -------------------------------------------------------- tables grow and shrink

    def taken(self, event: Event) -> None:
        self._require_free(event.blocks)
        sequence = self._sequences[event.sequence]
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value

    def hit(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        self._hold(sequence, self._positions(event.blocks))
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value
        if self._windowed:
            sequence.left = event.value // self.tokens_per_block - len(event.blocks)

    def truncated(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        keep = -(-event.value // self.tokens_per_block) - sequence.left
        self._references.add(sequence.table[keep:], -1)
        del sequence.table[keep:]
        sequence.num_tokens = event.value

    def joined(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        sequence.num_tokens -= self._ticks[event.other]
        sequence.batch = event.other

    def left(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        sequence.num_tokens = self.length(sequence)
        sequence.batch = NOBODY

    def advanced(self, event: Event) -> None:
        self._ticks[event.other] += event.value

    def _enter(self, sequence: Sequence, blocks: array[int]) -> None:
        self._references.add(blocks, 1)
        sequence.table.extend(blocks)

    def _require_free(self, blocks: array[int]) -> None:
        # A block that is evicted may still be read by the transfer that saves its content.
        if not (self._cached_at.are(blocks, NONE) and self._references.are(blocks, 0)):
            raise Contradiction(f"{blocks.tolist()} must be free")

    # -------------------------------------------------------- blocks are cached, and no longer

    def stored(self, event: Event) -> None:
        sequence, blocks = self._sequences[event.sequence], event.blocks
        self._check_place(sequence, event)
        if not self._cached_at.are(blocks, NONE):
            raise Contradiction(f"{blocks.tolist()} must not be cached already")
        count = len(blocks)
        positions = self._unused[-count:]
        del self._unused[-count:]
        self._parent.one[positions[0]] = sequence.prefix[-1] if sequence.prefix else ROOT
        if count > 1:
            self._parent.set(positions[1:], positions[:-1])
        self._settle(positions, blocks)
        self._hold(sequence, positions)

    def _check_place(self, sequence: Sequence, event: Event) -> None:
        """Require that what is stored goes on from the sequence's prefix."""
        above = self._block.one[sequence.prefix[-1]] if sequence.prefix else ROOT
        if event.other != above:
            raise Contradiction(f"{event.other} must be the last block of the sequence's prefix, {above}")
        if event.value != len(sequence.prefix):
            raise Contradiction(f"{event.value} must be the length of its prefix, {len(sequence.prefix)}")

    def repeated(self, event: Event) -> None:
        sequence, positions = self._sequences[event.sequence], self._positions(event.blocks)
        if self._windowed:
            sequence.prefix.append(NONE)
        else:
            self._hold(sequence, positions)

    def evicted(self, event: Event) -> None:
        positions = self._positions(event.blocks)
        if not self._holds.are(positions, 0):
            raise Contradiction(f"{event.blocks.tolist()} must not be held")
        self._uncache(positions, event.blocks)

    def unstored(self, event: Event) -> None:
        if event.sequence != NOBODY:
            sequence = self._sequences[event.sequence]
            self._cut_prefix(sequence, len(sequence.prefix) - len(event.blocks))
        self._uncache(self._positions(event.blocks), event.blocks)

    def detached(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        self._cut_prefix(sequence, event.value - sequence.left)

    def _settle(self, positions: array[int], blocks: array[int]) -> None:
        """Let blocks hold what belongs at these positions."""
        self._block.set(positions, blocks)
        self._cached_at.set(blocks, positions)

    def _positions(self, blocks: array[int]) -> array[int]:
        """Return the positions that blocks hold; all must be cached."""
        positions = self._cached_at.of(blocks)
        if NONE in positions:
            raise Contradiction(f"{blocks.tolist()} must be cached")
        return positions

    def _hold(self, sequence: Sequence, positions: array[int]) -> None:
        self._holds.add(self._held(positions), 1)
        sequence.prefix.extend(positions)

    def _cut_prefix(self, sequence: Sequence, end: int) -> None:
        self._holds.add(self._held(sequence.prefix[end:]), -1)
        del sequence.prefix[end:]

    def _held(self, prefix: array[int]) -> array[int]:
        """Return the positions that a sequence with this prefix holds."""
        return array("i", [p for p in prefix if p != NONE]) if self._windowed else prefix

    def _uncache(self, positions: array[int], blocks: array[int]) -> None:
        self._cached_at.set(blocks, NONE)
        self._block.set(positions, NONE)
        self._drop_empty(positions)

    def _drop_empty(self, positions: Iterable[int]) -> None:
        """Give up those positions that no block holds any more."""
        block, host_block = self._block.one, self._host_block.one
        empty = [p for p in positions if block[p] == host_block[p] == NONE]
        self._unused.extend(empty)
        if self._windowed:
            for position in empty:
                del self._position_at[self._place.one[position]]

    # -------------------------------------------------------- windows

    def window(self, event: Event) -> None:
        self._windowed = True

    def passed(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        gone = slice(event.other, event.other + event.value)
        self._references.add(sequence.table[gone], -1)
        self._holds.add(self._held(sequence.prefix[gone]), -1)
        del sequence.table[gone], sequence.prefix[gone]
        sequence.left += event.value

    def placed(self, event: Event) -> None:
        """Positions last as long as their blocks, places for good: a parent may be cached later, or again."""
        if not self._cached_at.are(event.blocks, NONE):
            raise Contradiction(f"{event.blocks.tolist()} must not be cached already")
        known = self._position_at.get(event.value)  # where the host has it
        if known is not None and self._block.one[known] != NONE:
            raise Contradiction(f"place {event.value} must not be cached already")
        position = array("i", (self._unused.pop() if known is None else known,))
        self._place.one[position[0]] = event.value
        self._parent.one[position[0]] = event.other
        self._position_at[event.value] = position[0]
        self._settle(position, event.blocks)
        self._hold(self._sequences[event.sequence], position)

    # -------------------------------------------------------- copies

    def copied(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        source, destination = event.blocks
        if sequence.table[-1] != source:
            raise Contradiction(f"{source} must be the last block of its table")
        self._require_free(event.blocks[1:])
        sequence.table[-1] = destination
        self._references.one[source] -= 1
        self._references.one[destination] += 1
        self._pin(destination)
        if self._cached_at.one[source] == NONE:
            self._pin(source)
        else:  # a cached source is kept by its whole prefix
            held = sequence.prefix[-1:] if self._windowed else sequence.prefix[:]
            self._holds.add(held, 1)
            self._held_for_copies.append(held)

    def branched(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        held = self._positions(event.blocks[:1])
        if not self._windowed:
            held = sequence.prefix + held
        destination = event.blocks[1:]
        self._require_free(destination)
        self._enter(sequence, destination)
        self._pin(destination[0])
        self._holds.add(held, 1)
        self._held_for_copies.append(held)
        sequence.num_tokens += event.value

    def stolen(self, event: Event) -> None:
        self.evicted(event)
        sequence = self._sequences[event.sequence]
        self._enter(sequence, event.blocks)
        sequence.num_tokens += event.value

    def executed(self, event: Event) -> None:
        for block in self._pinned:
            self._pins.one[block] -= 1
        for prefix in self._held_for_copies:
            self._holds.add(prefix, -1)
        self._pinned.clear()
        self._held_for_copies.clear()

    def _pin(self, block: int) -> None:
        self._pins.one[block] += 1
        self._pinned.append(block)
