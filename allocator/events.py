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
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from allocator.block_replay import NONE, BlockReplay, Column, Contradiction, Sequence
from allocator.cache_state import (
    EVICTABLE,
    FREE,
    GONE,
    HOST_PARENT,
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
    "GONE",
    "HOST_PARENT",
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


class _Transfers:
    """The transfers of one list, and what they keep until they are done."""

    __slots__ = ("blocks", "host_blocks", "host_prefixes", "prefixes")

    def __init__(self) -> None:
        self.blocks = array("i")
        self.host_blocks = array("i")
        self.prefixes: list[array[int]] = []
        self.host_prefixes: list[array[int]] = []


class Replayer(BlockReplay):
    """Applies events, some or all at a time, and says how everything stands after them.

    A position in the prefix of a sequence, a pending copy or a transfer is held, a block in a table is referenced,
    and either end of a copy or transfer is pinned. Hence, of a cached block: evictable, unless held; if held by
    transfers alone, in transfer. Of any other: in a table or else, while pinned, in transfer; or else free. Of the
    host's blocks the same, with the swapped-out sequences' prefixes and tables.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_events = 0
        self._swapped: dict[int, Sequence] = {}
        self._pending = _Transfers()
        self._in_flight: dict[int, _Transfers] = {}
        self._handlers = [getattr(self, kind.name) for kind in KINDS]

    def _resize(self, num_blocks: int, num_host_blocks: int) -> None:
        super()._resize(num_blocks, num_host_blocks)
        positions = num_blocks + num_host_blocks
        self._transfer_holds = Column(positions)
        self._host_holds = Column(positions)
        self._host_transfer_holds = Column(positions)
        self._host_at = Column(num_host_blocks, NONE)  # position
        self._host_pins = Column(num_host_blocks)

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
            except Contradiction as error:
                raise ValueError(f"event {self.num_events} ({KINDS[event.kind].name}): {error}") from None
            self.num_events += 1

    # -------------------------------------------------------- the state

    def state(self) -> CacheState:
        """Return how everything stands, as a copy."""
        at = self._cached_at.all
        holds, arriving = _of(self._holds, at), _of(self._transfer_holds, at)
        host_at = self._host_at.all
        host_holds, host_arriving = _of(self._host_holds, host_at), _of(self._host_transfer_holds, host_at)
        return CacheState(
            states=_states(at, holds, arriving, self._references.all, self._pins.all),
            references=self._references.all.copy(),
            holds=holds,
            parents=self._parents(at),
            sequences={number: self._running(each) for number, each in self._sequences.items()},
            host_states=_states(host_at, host_holds, host_arriving, self._private(), self._host_pins.all),
            host_holds=host_holds,
            host_parents=self._parents(host_at),
            host_copies=_of(self._block, host_at, NONE),
            swapped={number: self._swapped_out(each) for number, each in self._swapped.items()},
        )

    def _running(self, sequence: Sequence) -> SequenceState:
        prefix = [NONE if position == NONE else self._block.one[position] for position in sequence.prefix]
        return SequenceState(self.length(sequence), tuple(sequence.table), tuple(prefix), sequence.left)

    def _parents(self, at: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return what comes before the content of blocks that hold these positions."""
        if not len(at):
            return at.copy()
        parent = self._parent.all[at]
        if self._windowed:
            blocks = [self._before(place) for place in parent.tolist()]
            return np.where(at == NONE, UNCACHED, np.array(blocks, dtype=np.int32)).astype(np.int32)
        block, host = self._block.all[parent], HOST_PARENT - self._host_block.all[parent]
        found = np.where(parent == ROOT, ROOT, np.where(block != NONE, block, host))
        return np.where(at == NONE, UNCACHED, found).astype(np.int32)

    def _before(self, place: int) -> int:
        """Return what stands for a place of a windowed cache as a parent."""
        if place == ROOT:
            return ROOT
        position = self._position_at.get(place)
        if position is None:
            return GONE
        block = self._block.one[position]
        return HOST_PARENT - self._host_block.one[position] if block == NONE else block

    def _swapped_out(self, sequence: Sequence) -> SequenceState:
        prefix = [NONE if p == NONE else self._host_block.one[p] for p in sequence.prefix]
        table = _interleaved(prefix, sequence.table)
        return SequenceState(sequence.num_tokens, tuple(table), tuple(prefix), sequence.left)

    def _private(self) -> NDArray[np.int32]:
        """Return 1 for each uncached host block that a swapped-out sequence holds, else 0."""
        private = np.zeros(len(self._host_at.all), dtype=np.int32)
        for each in self._swapped.values():
            private[each.table] = 1
        return private

    # -------------------------------------------------------- the host tier

    def host(self, event: Event) -> None:
        self._resize(len(self._references.one), event.value)

    def offloaded(self, event: Event) -> None:
        blocks, host_blocks = _halves(event.blocks)
        positions = self._positions(blocks)
        self._settle_on_host(positions, host_blocks)
        self._move(blocks, host_blocks)
        self._keep(positions, on_gpu=False)

    def onboarded(self, event: Event) -> None:
        host_blocks, blocks = _halves(event.blocks)
        positions = self._host_positions(host_blocks)
        self._settle(positions, blocks)
        self._move(blocks, host_blocks)
        self._keep(positions, on_gpu=True)

    def recomputed(self, event: Event) -> None:
        blocks, host_blocks = _halves(event.blocks)
        sequence = self._sequences[event.sequence]
        self._check_place(sequence, event)
        positions = self._host_positions(host_blocks)
        self._settle(positions, blocks)
        self._hold(sequence, positions)

    def forgotten(self, event: Event) -> None:
        positions = self._host_positions(event.blocks)
        if not self._host_holds.are(positions, 0):
            raise Contradiction(f"{event.blocks.tolist()} must not be held on the host")
        self._leave_host(positions, event.blocks)

    def host_freed(self, event: Event) -> None:
        self._leave_host(self._host_positions(event.blocks), event.blocks)

    def let_go(self, event: Event) -> None:
        (position,) = self._host_positions(event.blocks)
        for transfers in (self._pending, *self._in_flight.values()):
            for prefix in [one for one in transfers.host_prefixes if one[-1] == position]:
                transfers.host_prefixes.remove(prefix)
                self._drop_on_host(prefix)

    def swapped_out(self, event: Event) -> None:
        sequence = self._sequences.pop(event.sequence)
        blocks, host_blocks = _halves(event.blocks)
        cached = event.value
        self._move(blocks, host_blocks)
        if cached:
            positions = self._positions(blocks[:cached])
            self._settle_on_host(positions, host_blocks[:cached])
            self._keep(positions, on_gpu=True)
        self._leave(sequence)
        self._host_holds.add(self._held(sequence.prefix), 1)
        sequence.table = host_blocks[cached:]
        self._swapped[event.sequence] = sequence

    def swapped_in(self, event: Event) -> None:
        sequence = self._swapped.pop(event.sequence)
        host_blocks, blocks = _halves(event.blocks)
        cached = event.value
        self._move(blocks, host_blocks)
        if cached:
            positions = self._host_positions(host_blocks[:cached])
            self._settle(positions, blocks[:cached])
            self._keep(positions, on_gpu=True)
        held = self._held(sequence.prefix)
        self._host_holds.add(held, -1)
        self._holds.add(held, 1)
        there = [NONE if p == NONE else self._block.one[p] for p in sequence.prefix]
        sequence.table = _interleaved(there, blocks[cached:])
        self._references.add(sequence.table, 1)
        self._sequences[event.sequence] = sequence

    def freed(self, event: Event) -> None:
        swapped = self._swapped.pop(event.sequence, None)
        if swapped is None:
            super().freed(event)
        else:
            self._host_holds.add(self._held(swapped.prefix), -1)

    def sent(self, event: Event) -> None:
        self._in_flight[event.value] = self._pending
        self._pending = _Transfers()

    def arrived(self, event: Event) -> None:
        transfers = self._in_flight.pop(event.value)
        for block, host_block in zip(transfers.blocks, transfers.host_blocks, strict=True):
            self._pins.one[block] -= 1
            self._host_pins.one[host_block] -= 1
        for prefix in transfers.prefixes:
            self._holds.add(prefix, -1)
            self._transfer_holds.add(prefix, -1)
        for prefix in transfers.host_prefixes:
            self._drop_on_host(prefix)

    def _move(self, blocks: array[int], host_blocks: array[int]) -> None:
        """Pin both ends of transfers, either way, until they are done."""
        self._pending.blocks.extend(blocks)
        self._pending.host_blocks.extend(host_blocks)
        for block, host_block in zip(blocks, host_blocks, strict=True):
            self._pins.one[block] += 1
            self._host_pins.one[host_block] += 1

    def _keep(self, positions: array[int], *, on_gpu: bool) -> None:
        """Hold the prefix that ends here until the pending transfers are done: on the host, and perhaps the GPU.

        In a windowed cache, hold the positions, each for itself.
        """
        if self._windowed:
            for each in positions:
                self._keep_prefix(array("i", (each,)), on_gpu=on_gpu)
            return
        position = positions[-1]
        prefix = array("i")
        while position != ROOT:
            prefix.append(position)
            position = self._parent.one[position]
        prefix.reverse()
        self._keep_prefix(prefix, on_gpu=on_gpu)

    def _keep_prefix(self, prefix: array[int], *, on_gpu: bool) -> None:
        self._pending.host_prefixes.append(prefix)
        self._host_holds.add(prefix, 1)
        self._host_transfer_holds.add(prefix, 1)
        if on_gpu:
            self._pending.prefixes.append(prefix)
            self._holds.add(prefix, 1)
            self._transfer_holds.add(prefix, 1)

    def _drop_on_host(self, prefix: array[int]) -> None:
        self._host_holds.add(prefix, -1)
        self._host_transfer_holds.add(prefix, -1)

    def _settle_on_host(self, positions: array[int], host_blocks: array[int]) -> None:
        self._host_block.set(positions, host_blocks)
        self._host_at.set(host_blocks, positions)

    def _host_positions(self, host_blocks: array[int]) -> array[int]:
        """Return the positions that host blocks hold; all must hold one."""
        positions = self._host_at.of(host_blocks)
        if NONE in positions:
            raise Contradiction(f"host blocks {host_blocks.tolist()} must be cached")
        return positions

    def _leave_host(self, positions: array[int], host_blocks: array[int]) -> None:
        self._host_at.set(host_blocks, NONE)
        self._host_block.set(positions, NONE)
        self._drop_empty(positions)


def _interleaved(prefix: Iterable[int], own: Iterable[int]) -> array[int]:
    """Return a table: the blocks of a prefix, the sequence's own in turn for each NONE, and its others behind."""
    rest = iter(own)
    table = array("i", [next(rest) if block == NONE else block for block in prefix])
    table.extend(rest)
    return table


def _halves(blocks: array[int]) -> tuple[array[int], array[int]]:
    half = len(blocks) // 2
    return blocks[:half], blocks[half:]


def _of(column: Column, at: NDArray[np.int32], otherwise: int = 0) -> NDArray[np.int32]:
    """Return the number of each position, `otherwise` where there is none."""
    found = np.full(len(at), otherwise, dtype=np.int32)
    found[at != NONE] = column.all[at[at != NONE]]
    return found


def _states(
    at: NDArray[np.int32],
    holds: NDArray[np.int32],
    of_transfers: NDArray[np.int32],
    references: NDArray[np.int32],
    pins: NDArray[np.int32],
) -> NDArray[np.uint8]:
    """Return the state of each block, by the rules of `Replayer`."""
    held = np.where(holds == of_transfers, IN_TRANSFER, REFERENCED)
    uncached = np.where(references, REFERENCED, np.where(pins, IN_TRANSFER, FREE))
    return np.where(at != NONE, np.where(holds, held, EVICTABLE), uncached).astype(np.uint8)


def rebuild(log: EventLog, upto: int | None = None) -> CacheState:
    """Return the exact state after the first `upto` events of a log, or after all of them.

    Raises ValueError where the log contradicts itself, or is None: a manager keeps one if made with events=True. To go
    on from there, use a `Replayer`.
    """
    if not isinstance(log, EventLog):
        raise ValueError(f"log ({log!r}) must be an EventLog, which a manager made with events=True keeps")
    replayer = Replayer()
    replayer.apply(log, upto)
    return replayer.state()
