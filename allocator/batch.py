"""Batch: sequences that decode in lockstep, sorted by the step at which each needs its next block."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Sequence
from struct import Struct
from struct import error as StructError
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from allocator.content import History, are_token_ids
from allocator.event_log import JOINED, LEFT, NOBODY, EventLog
from allocator.ring import LastSlots, Rows, TokenRing
from allocator.sequence import KVSequence


class Bucket(dict[KVSequence, int]):
    """Members that start their blocks at the same ticks, and the row of each.

    eager  those of them whose blocks go into the index as soon as they are full; the others prolong extents of their
           own, and catch up when somebody looks
    dates  lifetimes: when the blocks were filled before which they started others while coasting, the latest last
    """

    __slots__ = ("dates", "eager")

    def __init__(self) -> None:
        # No super().__init__(): a dict's has nothing to do here, and small batches make many buckets.
        self.eager: dict[KVSequence, int] = {}
        self.dates = array("q")


_NONE: Final = Bucket()


def _nothing(sequence: KVSequence) -> None:
    """Do nothing."""


class Batch(Sequence[KVSequence]):
    """Running sequences, each of which gets one token a tick. Made by `KVCacheManager.batch()`.

    A sequence of t tokens at tick 0 starts a new block at every tick with (t + tick) mod tokens_per_block = 0,
    so the members are kept in buckets by −t mod tokens_per_block, and a step touches only the bucket whose
    turn it is, whatever the size of the batch. Add a sequence once its prefill is complete; remove it before
    releasing it. Iteration is in the order of addition.

    What a step does for everyone is done by array: member i has a row, in which stand its last slot and, in the
    ring, its latest token ids. Slots are kept from the first `append` on (a simulation, which only advances,
    never asks for them). Token ids stay in the ring until it is full or somebody reads the member's history; then
    they are *settled*, written to the history. Of who is released before, nobody ever writes them.
    """

    def __init__(
        self,
        tokens_per_block: int,
        live: Container[KVSequence],
        shared: dict[int, int],
        log: EventLog | None = None,
        *,
        windowed: bool = False,
    ) -> None:
        self.live = live
        self.shared = shared  # blocks with more than one holder
        self.windowed = windowed  # members can join with blocks that they need no more
        self.tick = 0
        self.log = log
        self.number = NOBODY if log is None else log.new_batch()
        self.tokens_per_block = tokens_per_block
        self.ring = TokenRing(tokens_per_block)
        self.unready: dict[KVSequence, None] = {}  # to be looked at before the next write: may have to copy
        self.nameless = 0  # members whose content cannot name tokens one by one
        self.members: dict[KVSequence, int] = {}  # and the row of each
        self.buckets: dict[int, Bucket] = {}
        self._residues: list[int] = []  # of the buckets, rising
        self._in_order: list[Bucket] = []  # the buckets by residue
        self._free_rows: list[int] = []
        self._num_rows = 0  # given out so far, free ones included
        # Of whom the ring holds less than its latest steps: the tick from which on its ids are to be settled, and
        # whose last block began before.
        self._since: dict[KVSequence, int] = {}
        self._late: dict[KVSequence, None] = {}
        self.order: Rows | None = None  # the members' rows; None if they have changed since
        self._pack = Struct("").pack  # packs a step's ids
        self.slots: LastSlots | None = None  # None until somebody asks for them
        self.coasted = False  # whether members may have to catch up
        self.coasted_at = 0  # the manager's time of the last coast
        self.catch_up: Callable[[KVSequence], None] = _nothing  # see Coasting

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[KVSequence]:
        return iter(self.members)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self.members

    @overload
    def __getitem__(self, index: int) -> KVSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[KVSequence]: ...
    def __getitem__(self, index: int | slice) -> KVSequence | list[KVSequence]:
        return list(self.members)[index]

    # -------------------------------------------------------- who takes part

    def add(self, sequence: KVSequence) -> None:
        """Let a sequence take part from the next step on.

        Raises ValueError if it is in a batch already, not among the manager's live ones, or short of its prompt.
        """
        if sequence.batch is not None:
            raise ValueError(f"{sequence} must leave its batch before it joins another")
        if sequence not in self.live:
            state = "have been released already" if sequence.released else "be another manager's"
            if sequence.host is not None:
                state = "be swapped out"
            raise ValueError(f"{sequence} must not {state}")
        tokens = sequence.base_tokens
        if tokens < sequence.num_prompt_tokens:
            raise ValueError(f"{sequence} must have its prompt of {sequence.num_prompt_tokens} complete")
        if self._free_rows:
            row = self._free_rows.pop()
        else:
            row = self._num_rows
            self._num_rows += 1
        sequence.batch = self
        sequence.base_tokens = tokens - self.tick
        residue = (self.tick - tokens) % self.tokens_per_block
        self.members[sequence] = row
        self.order = None
        bucket = self.buckets.get(residue)
        if bucket is None:
            bucket = self.buckets[residue] = Bucket()
            place = bisect_left(self._residues, residue)
            self._residues.insert(place, residue)
            self._in_order.insert(place, bucket)
        bucket[sequence] = bucket.eager[sequence] = row
        if not sequence.settled_history.nameable:
            self.nameless += 1
        if self.windowed:
            self.unready[sequence] = None
        if self.ring.named:
            self._since[sequence] = self.tick
        if tokens % self.tokens_per_block:
            if self.shared or sequence.anchor.end == sequence.left + len(sequence.table):
                self.unready[sequence] = None
            if self.ring.named:
                self._late[sequence] = None
            if self.slots is not None:
                self.place(sequence)
        if self.log is not None:
            self.log.add(JOINED, sequence.number, self.number)

    def remove(self, sequence: KVSequence) -> None:
        """Take a sequence out. Raises ValueError if it is not in this batch."""
        if sequence.batch is not self:
            raise ValueError(f"{sequence} must be in the batch to leave it")
        self.settle(sequence)
        self.discard(sequence)

    def discard(self, sequence: KVSequence) -> Bucket:
        """Take a member out whose history nobody is going to read; return the bucket that it was in."""
        residue = -sequence.base_tokens % self.tokens_per_block
        sequence.batch = None
        sequence.base_tokens += self.tick
        self._free_rows.append(self.members.pop(sequence))
        self.order = None
        bucket = self.buckets[residue]
        del bucket[sequence]
        bucket.eager.pop(sequence, None)
        if not bucket:
            del self.buckets[residue]
            place = bisect_left(self._residues, residue)
            del self._residues[place], self._in_order[place]
        if not sequence.settled_history.nameable:
            self.nameless -= 1
        if self.unready:
            self.unready.pop(sequence, None)
        if self._since:
            self._since.pop(sequence, None)
            self._late.pop(sequence, None)
        if not self.members:  # so that rows are handed out in order again
            self._free_rows.clear()
            self._num_rows = 0
            self.coasted = False
        if self.log is not None:
            self.log.add(LEFT, sequence.number, self.number)
        return bucket

    def arrange(self) -> None:
        """Note the members' rows in the order of addition, if they have changed, and make room for them."""
        if self.order is None:
            members = len(self.members)
            rows = list(self.members.values())
            in_order = rows == list(range(members))
            self.order = slice(0, members) if in_order else np.array(rows, dtype=np.intp)
            self._pack = Struct(f"<{members}I").pack
            self.ring.reserve(self._num_rows)
            if self.slots is not None:
                self.slots.reserve(self._num_rows)

    # -------------------------------------------------------- one tick

    def starting(self) -> Bucket:
        """Return who starts a block at the next tick; after a tick, that is who has just filled one."""
        return self.buckets.get(self.tick % self.tokens_per_block, _NONE)

    def start_blocks(self, starting: Bucket, blocks: array[int]) -> None:
        """Give each member that starts a block at the next tick its block."""
        if self.slots is None:
            for sequence, block in zip(starting, blocks, strict=True):
                sequence.table.append(block)
            return
        size, last_slots = self.tokens_per_block, self.slots.by_row
        for (sequence, row), block in zip(starting.items(), blocks, strict=True):
            sequence.table.append(block)
            last_slots[row] = block * size - 1  # the one before the slot that it is about to get

    def step(self, ids: NDArray[np.int32] | None) -> None:
        """Go on by a tick, in which the members' token ids (None if unknown) are written, in arranged rows."""
        if ids is None:
            self.settle_all()
        else:
            rows, ring = self.order, self.ring
            assert rows is not None
            if not ring.left:
                self.rewind()
            ring.write(rows, ids)
        self.tick += 1
        if self.slots is not None:
            self.slots.advance()

    # -------------------------------------------------------- slots

    def keep_slots(self) -> None:
        """Know the members' last slots from now on."""
        self.slots = LastSlots()
        self.slots.reserve(self._num_rows)
        for sequence in self.members:
            self.place(sequence)

    def place(self, sequence: KVSequence) -> None:
        """Note where a member's last token lies, if slots are kept: it has come in or changed its last block."""
        if self.slots is not None:
            size, row = self.tokens_per_block, self.members[sequence]
            self.slots.reserve(row + 1)
            tokens = sequence.base_tokens + self.tick
            self.slots.by_row[row] = sequence.table[-1] * size + (tokens - 1) % size

    def last_slots(self) -> NDArray[np.int64]:
        """Return the slots of all members' last tokens, int64 [len(self)], if they are kept and arranged."""
        rows, slots = self.order, self.slots
        assert rows is not None
        assert slots is not None
        return slots.of(rows)

    # -------------------------------------------------------- token ids

    def packed(self, tokens: Sequence[Sequence[int]] | Sequence[int]) -> NDArray[np.int32] | None:
        """Return one id a member as int32 [len(self)], or None if `tokens` is not simply that."""
        if self.order is None:
            self.arrange()
        try:
            packed: bytes = self._pack(*tokens)
        except StructError:
            return None
        return np.frombuffer(packed, np.int32) if are_token_ids(packed) else None

    def catch_up_all(self) -> None:
        """Let every member catch up, and forget when their blocks were filled."""
        for sequence in self.members:
            self.catch_up(sequence)
        for bucket in self.buckets.values():
            del bucket.dates[:]
        self.coasted = False

    def bucket_of(self, sequence: KVSequence) -> Bucket:
        """Return the bucket of a member."""
        return self.buckets[-sequence.base_tokens % self.tokens_per_block]

    def settle(self, sequence: KVSequence) -> None:
        """Let history and index have all of a member's tokens and full blocks."""
        self.settle_ids(sequence)
        if self.coasted or sequence.anchor.grower is not None:
            self.catch_up(sequence)

    def settle_ids(self, sequence: KVSequence) -> None:
        """Write a member's token ids that are still in the ring to its history."""
        if self.ring.named:
            count = min(self.ring.named, self.tick - self._since.get(sequence, 0))
            if count:
                latest = self.ring.latest(self.members[sequence], count)
                first = sequence.base_tokens + self.tick - count
                sequence.settled_history.record_packed(first, latest)
            self._since[sequence] = self.tick

    def settle_all(self) -> None:
        """Settle every member, as tokens without names are about to follow."""
        if self.ring.named:
            for sequence in self.members:
                self.settle(sequence)
            self._since.clear()
            self._late.clear()
            self.ring.named = 0

    def rewind(self) -> None:
        """Have room in the ring again: it is full of ids."""
        for sequence in self.members:
            self.settle_ids(sequence)
        self.ring.rewind()

    def keys_of_filled(self, filled: dict[KVSequence, int]) -> list[bytes]:
        """Return the keys of the blocks that members, given with their rows, have just filled."""
        ring, late = self.ring, self._late
        if ring.named >= self.tokens_per_block and (not late or late.keys().isdisjoint(filled)):  # as a rule
            return ring.blocks(filled.values())
        keys = []
        for sequence in filled:
            self.settle_ids(sequence)
            late.pop(sequence, None)
            last = sequence.left + len(sequence.table) - 1
            keys.append(sequence.settled_history.keys(last, last + 1))
        return keys

    def pending_keys(self, sequence: KVSequence, first: int, last: int) -> bytes:
        """Return the keys of blocks first … last − 1 of a member, which it has filled one after the other till now."""
        ring, tokens = self.ring, sequence.base_tokens + self.tick
        count = tokens - first * self.tokens_per_block
        if count <= ring.named and count <= self.tick - self._since.get(sequence, 0):
            return ring.latest(self.members[sequence], count)[: (last - first) * self.tokens_per_block * 4]
        self.settle_ids(sequence)
        return sequence.settled_history.keys(first, last)

    def replace_history(self, sequence: KVSequence, history: History) -> None:
        """Note that a member is about to go on with another history, up to the same length."""
        self.settle(sequence)
        if self.ring.named:
            self._late[sequence] = None
        self.nameless += sequence.settled_history.nameable - history.nameable

    # -------------------------------------------------------- many ticks

    def starting_in(self, ticks: int) -> Bucket:
        """Return the members that start a block at the tick that is `ticks` after the next, or before it."""
        return self.buckets.get((self.tick + ticks) % self.tokens_per_block, _NONE)

    def growth(self, num_tokens: int) -> int:
        """Return how many blocks the next `num_tokens` ticks take, copies apart."""
        if num_tokens == 1:
            return len(self.starting())
        cycles, rest = divmod(num_tokens, self.tokens_per_block)
        return cycles * len(self.members) + sum(map(len, self._starting_within(rest)))

    def growing(self, num_tokens: int) -> Iterator[tuple[Bucket, int]]:
        """Yield the buckets that start blocks in the next `num_tokens` ticks, and how many each member does."""
        for residue, bucket in self.buckets.items():
            offset = (residue - self.tick) % self.tokens_per_block
            if offset < num_tokens:
                yield bucket, 1 + (num_tokens - 1 - offset) // self.tokens_per_block

    def fills(self, num_tokens: int) -> int:
        """Return how many blocks become full in the next `num_tokens` ticks."""
        # a member fills a block one tick before it starts the next
        return self.growth(num_tokens + 1) - self.growth(1)

    def ticks_until_fill(self) -> int:
        """Return after how many ticks a member next fills a block (0 for an empty batch)."""
        size, tick = self.tokens_per_block, self.tick
        return min(((residue - tick - 1) % size + 1 for residue in self.buckets), default=0)

    def starts(self, num_tokens: int) -> tuple[list[Bucket], int, int]:
        """Return the buckets that start blocks in the next ticks, in the order in which they first do, and how many
        blocks that are: altogether, and at the first tick.
        """
        size = self.tokens_per_block
        now = self.buckets.get(self.tick % size)
        first = 0 if now is None else len(now)
        if num_tokens == 1:
            return [] if now is None else [now], first, first
        if num_tokens > size:  # a member that starts one does so again after every tokens_per_block ticks
            return self._starting_within(size), self.growth(num_tokens), first
        found = self._starting_within(num_tokens)
        return found, sum(map(len, found)), first

    def _starting_within(self, ticks: int) -> list[Bucket]:
        """Return the buckets that start blocks in the next ticks, at most tokens_per_block, in the order of time."""
        residues, in_order = self._residues, self._in_order
        turn = self.tick % self.tokens_per_block
        first, end = bisect_left(residues, turn), turn + ticks
        if end <= self.tokens_per_block:
            return in_order[first : bisect_left(residues, end)]
        return in_order[first:] + in_order[: bisect_left(residues, end - self.tokens_per_block)]

    def events(self, num_tokens: int) -> Iterator[tuple[int, Bucket, bool]]:
        """Yield, in order of time, the buckets that start (True) or fill (False) a block in the next ticks, after how
        many ticks each.
        """
        size, tick = self.tokens_per_block, self.tick
        order = sorted(((residue - tick) % size, bucket) for residue, bucket in self.buckets.items())
        for cycle in range(0, num_tokens + 1, size):
            for offset, bucket in order:
                when = cycle + offset
                if 0 < when <= num_tokens:
                    yield when, bucket, False
                if when < num_tokens:
                    yield when, bucket, True
