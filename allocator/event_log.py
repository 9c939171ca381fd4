"""EventLog: what happened to every block, in the order in which it happened.

A row is an event: of a call, of an extent, of a block that decoding starts or fills; never of a token. It names a
sequence by a number that the log gave it, and the blocks concerned. What follows from rows before is not said
again: a block is free, evictable or referenced because of who holds it, and a length grows with its batch. See
`allocator.events` for how the state at any row is had back.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = -1
"""Stands in for the block before a first block."""
NOBODY = -1
"""Stands in for a sequence or batch where an event has none."""


class Kind(NamedTuple):
    """What the columns `other` and `value` mean for one kind of event; "" where they mean nothing."""

    name: str
    other: str
    value: str
    meaning: str


KINDS = (
    Kind("created", "tokens_per_block", "num_blocks", "a pool, all of it free"),
    Kind("admitted", "", "prompt_tokens", "a sequence starts, with an empty table"),
    Kind("hit", "", "tokens", "cached blocks enter its table, and its prefix leads through them"),
    Kind("taken", "", "tokens", "free blocks enter its table; it has slots for so many tokens more"),
    Kind("stored", "parent", "position", "blocks of its table are cached from now on, below block `parent`"),
    Kind(
        "repeated",
        "",
        "position",
        "it computed what is cached already, and holds those blocks beside its own",
    ),
    Kind("unstored", "", "", "blocks are no longer cached: their only holder writes into them, or lets go"),
    Kind("detached", "", "blocks", "it holds only so many blocks of its prefix, and not those below"),
    Kind("copied", "", "tokens", "its last block, [0], gives way to a copy of its first tokens, [1]"),
    Kind("executed", "", "copies", "the pending copies were handed out, and no longer keep their blocks"),
    Kind("forked", "parent", "", "a sequence starts as sequence `parent` stands"),
    Kind("truncated", "", "tokens", "its table ends with so many tokens"),
    Kind("exchanged", "with", "", "two sequences exchange table and prefix"),
    Kind("freed", "", "", "a sequence ends; nothing is held for it any more"),
    Kind("joined", "batch", "", "it gets a token whenever the batch does"),
    Kind("left", "batch", "", "it no longer does"),
    Kind("advanced", "batch", "tokens", "each member has slots for so many tokens more"),
    Kind("evicted", "", "", "cached blocks lose their content, the last first, and are about to be taken"),
    Kind("branched", "", "tokens", "a copy, [1], of a cached block's first tokens, [0], enters its table"),
    Kind("stolen", "", "tokens", "a block is cached no more, and enters its table for its first tokens"),
    Kind("host", "", "num_blocks", "a host tier, all of it free"),
    Kind("offloaded", "", "", "content goes to the host: blocks, then as many host blocks"),
    Kind("onboarded", "", "", "content that the host holds comes back: host blocks, then as many blocks"),
    Kind(
        "recomputed", "parent", "position", "as stored, of what only the host held: blocks, then host blocks"
    ),
    Kind("forgotten", "", "", "host blocks lose their content, the last first"),
    Kind("host_freed", "", "", "host blocks whose content nobody needs there any more are given back"),
    Kind("let_go", "", "", "no transfer keeps the content up to this host block any more"),
    Kind(
        "swapped_out",
        "",
        "cached",
        "a sequence goes to the host: blocks, then host blocks; cached ones first",
    ),
    Kind("swapped_in", "", "cached", "it comes back: host blocks, then as many blocks; cached ones first"),
    Kind("sent", "", "list", "the pending transfers were handed out"),
    Kind("arrived", "", "list", "they are done, and no longer keep their blocks"),
    Kind(
        "window",
        "sink_blocks",
        "tokens",
        "the cache is windowed: sequences hold the blocks they need, no prefixes",
    ),
    Kind(
        "passed", "sink_blocks", "blocks", "so many blocks of its table, after those of the sinks, leave it"
    ),
    Kind(
        "placed", "parent", "place", "as stored, of a windowed cache, where places in prefixes have numbers"
    ),
)
"""The kinds of events; the column `kind` is an index into them."""

(
    CREATED,
    ADMITTED,
    HIT,
    TAKEN,
    STORED,
    REPEATED,
    UNSTORED,
    DETACHED,
    COPIED,
    EXECUTED,
    FORKED,
    TRUNCATED,
    EXCHANGED,
    FREED,
    JOINED,
    LEFT,
    ADVANCED,
    EVICTED,
    BRANCHED,
    STOLEN,
    HOST,
    OFFLOADED,
    ONBOARDED,
    RECOMPUTED,
    FORGOTTEN,
    HOST_FREED,
    LET_GO,
    SWAPPED_OUT,
    SWAPPED_IN,
    SENT,
    ARRIVED,
    WINDOW,
    PASSED,
    PLACED,
) = range(len(KINDS))

_ROW = Struct("<iiiiB")
_DTYPE = np.dtype(
    [("sequence", "<i4"), ("other", "<i4"), ("value", "<i4"), ("num_blocks", "<i4"), ("kind", "u1")]
)
COLUMNS: dict[str, type[np.integer[Any]]] = {
    "kind": np.uint8,
    "now": np.int64,
    "sequence": np.int32,
    "other": np.int32,
    "value": np.int32,
    "num_blocks": np.int32,
    "blocks": np.int32,
}
"""The columns and their types; `blocks` holds the blocks of all rows, one row's after the other."""


class Event(NamedTuple):
    """One row: `sequence` and what `KINDS` says of `other` and `value` are −1 where there is none."""

    kind: int
    sequence: int
    other: int
    value: int
    blocks: array[int]


class EventLog:
    """An append-only log, 17 bytes an event and 4 a block that it names. The manager writes it.

    Its length is the number of events. `columns` gives it as arrays and `from_columns` takes them back.
    """

    def __init__(self) -> None:
        self._rows = bytearray()
        self._blocks = array("i")
        self._sequences = 0
        self._batches = 0
        # When the caller's time moved: from which row on it was what. Few rows, so not a column while it grows.
        self._moved_at = array("q", (0,))
        self._moved_to = array("q", (0,))
        # Where the reader last was: the blocks that the rows before a row name are not counted from the start again.
        self._read = (0, 0)

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    # -------------------------------------------------------- writing

    def add(self, kind: int, sequence: int = NOBODY, other: int = -1, value: int = -1) -> None:
        """Append an event that names no block."""
        self._rows += _ROW.pack(sequence, other, value, 0, kind)

    def add_block(self, kind: int, sequence: int, other: int, value: int, block: int) -> None:
        """Append an event of one block."""
        self._rows += _ROW.pack(sequence, other, value, 1, kind)
        self._blocks.append(block)

    def add_blocks(self, kind: int, sequence: int, other: int, value: int, blocks: array[int]) -> None:
        """Append an event of some blocks."""
        self._rows += _ROW.pack(sequence, other, value, len(blocks), kind)
        self._blocks.extend(blocks)

    def new_sequence(self) -> int:
        """Return the number of a sequence that starts: they are counted from 0."""
        self._sequences += 1
        return self._sequences - 1

    def new_batch(self) -> int:
        """Return the number of a batch that is made: they are counted from 0."""
        self._batches += 1
        return self._batches - 1

    def move(self, now: int) -> None:
        """Date the events to come, in the caller's time."""
        if now == self._moved_to[-1]:
            return
        if self._moved_at[-1] == len(self):
            self._moved_to[-1] = now
        else:
            self._moved_at.append(len(self))
            self._moved_to.append(now)

    # -------------------------------------------------------- reading

    def events(self, first: int = 0, last: int | None = None) -> Iterator[Event]:
        """Yield the events first … last − 1 (default: all there are now). O(1) to go on where one stopped."""
        end = len(self) if last is None else last
        if not 0 <= first <= end <= len(self):
            raise ValueError(f"events {first} to {end} must lie within the {len(self)} of the log")
        at = self._blocks_before(first)
        rows = bytes(self._rows[first * _ROW.size : end * _ROW.size])
        for sequence, other, value, count, kind in _ROW.iter_unpack(rows):
            yield Event(kind, sequence, other, value, self._blocks[at : at + count])
            at += count
        self._read = (end, at)

    def _blocks_before(self, row: int) -> int:
        known, at = self._read if self._read[0] <= row else (0, 0)
        return at + int(self._table(known, row)["num_blocks"].sum(dtype=np.int64))

    def _table(self, first: int, last: int) -> NDArray[np.void]:
        return np.frombuffer(bytes(self._rows[first * _ROW.size : last * _ROW.size]), _DTYPE)

    def at_time(self, now: int) -> int:
        """Return how many events had happened when the caller's time moved on from `now`; times must not run back."""
        place = bisect_right(self._moved_to, now)
        return self._moved_at[place] if place < len(self._moved_at) else len(self)

    def columns(self) -> dict[str, NDArray[np.integer[Any]]]:
        """Return the log as arrays, copies all of them.

        kind, now, sequence, other, value, num_blocks   [len(self)]          types in COLUMNS
        blocks                                          [sum of num_blocks]  row i's come after those of row i − 1

        `kind` indexes KINDS, which says what the others mean; `now` is the caller's time.
        """
        table = self._table(0, len(self))
        columns: dict[str, NDArray[np.integer[Any]]] = {
            name: np.ascontiguousarray(table[name]) for name in COLUMNS if name not in ("now", "blocks")
        }
        moved = np.array([*self._moved_at, len(self)], dtype=np.int64)
        lengths = moved[1:] - moved[:-1]
        columns["now"] = np.repeat(np.array(self._moved_to, dtype=np.int64), lengths)
        columns["blocks"] = np.array(self._blocks, dtype=np.int32)
        return {name: columns[name] for name in COLUMNS}

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[np.integer[Any]]]) -> EventLog:
        """Return the log that gave these `columns`; it can be read, and gone on with. Raises ValueError if none did."""
        checked = _checked(columns)
        log = cls()
        table = np.zeros(len(checked["kind"]), _DTYPE)
        for name in _DTYPE.names or ():
            table[name] = checked[name]
        log._rows = bytearray(table.tobytes())
        log._blocks = array("i", checked["blocks"].tobytes())
        now = checked["now"].astype(np.int64)
        changes = np.flatnonzero(np.diff(now, prepend=0))
        for row in changes.tolist():
            if row == 0:
                log._moved_to[0] = int(now[0])
            else:
                log._moved_at.append(row)
                log._moved_to.append(int(now[row]))
        starts = np.isin(checked["kind"], (ADMITTED, FORKED))
        log._sequences = 1 + int(checked["sequence"][starts].max(initial=-1))
        batches = np.isin(checked["kind"], (JOINED, ADVANCED))
        log._batches = 1 + int(checked["other"][batches].max(initial=-1))
        return log

    def lines(self, first: int = 0, last: int | None = None) -> Iterator[str]:
        """Yield the events as text, a line each: number, time, kind, and what it says."""
        for row, event in enumerate(self.events(first, last), start=first):
            now = self._moved_to[bisect_right(self._moved_at, row) - 1]
            kind = KINDS[event.kind]
            said = [("sequence", event.sequence), (kind.other, event.other), (kind.value, event.value)]
            words = [
                f"{name} {value}"
                for name, value in said
                if name and (value >= 0 or name in ("parent", "value"))
            ]
            if event.blocks:
                words.append(f"blocks {event.blocks.tolist()}")
            yield f"{row:>6} {now:>6}  {kind.name:<12}{', '.join(words)}".rstrip()

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _checked(columns: Mapping[str, NDArray[np.integer[Any]]]) -> dict[str, NDArray[np.integer[Any]]]:
    """Return the columns as arrays of their types. Raises ValueError for what no log says."""
    checked: dict[str, NDArray[np.integer[Any]]] = {}
    for name, kind in COLUMNS.items():
        if name not in columns:
            raise ValueError(f"columns ({', '.join(columns)}) must have {name}")
        column = np.asarray(columns[name])
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise ValueError(
                f"{name} ({column.dtype}, {column.ndim} dimensions) must be a column of integers"
            )
        limits = np.iinfo(kind)
        if column.size and not limits.min <= int(column.min()) <= int(column.max()) <= limits.max:
            raise ValueError(f"{name} ({column.min()} to {column.max()}) must fit {kind.__name__}")
        checked[name] = column.astype(kind)
    rows = len(checked["kind"])
    for name in COLUMNS:
        if name != "blocks" and len(checked[name]) != rows:
            raise ValueError(f"{name} ({len(checked[name])} rows) must be as long as kind ({rows})")
    if rows and int(checked["kind"].max()) >= len(KINDS):
        raise ValueError(f"kind ({checked['kind'].max()}) must be below {len(KINDS)}")
    if rows and int(checked["num_blocks"].min()) < 0:
        raise ValueError(f"num_blocks ({checked['num_blocks'].min()}) must not be negative")
    if checked["blocks"].size and int(checked["blocks"].min()) < 0:
        raise ValueError(f"blocks ({checked['blocks'].min()}) must not be negative")
    named = int(checked["num_blocks"].sum(dtype=np.int64))
    if named != len(checked["blocks"]):
        raise ValueError(f"blocks ({len(checked['blocks'])}) must be as many as num_blocks says ({named})")
    return checked
