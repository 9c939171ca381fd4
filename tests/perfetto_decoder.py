"""What a Perfetto trace says, decoded from its bytes as the trace processor reads them; it shares no code with sim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Slice(NamedTuple):
    group: str
    track: str
    path: tuple[str, ...]
    """Its name, after those of the slices that it lies in."""
    begin_ns: int
    end_ns: int
    notes: dict[str, int]


class Instant(NamedTuple):
    group: str
    track: str
    time_ns: int
    name: str
    notes: dict[str, int]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value): int for wire type 0, bytes for wire type 2."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: Any
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            assert key & 7 == 2, f"wire type {key & 7}"
            length, at = _varint(data, at)
            value = data[at : at + length]
            assert len(value) == length
            at += length
        yield key >> 3, value


def _message(data: bytes, *repeated: int) -> dict[int, Any]:
    """Return a message's fields; those named in `repeated` as lists."""
    found: dict[int, Any] = {number: [] for number in repeated}
    for number, value in _fields(data):
        if number in repeated:
            found[number].append(value)
        else:
            assert number not in found, f"field {number} comes twice"
            found[number] = value
    return found


class Decoded:
    """The tracks of a trace, and what lies on them; events in the order of time, those of one time as in the file."""

    def __init__(self, data: bytes) -> None:
        self.groups: dict[int, str] = {}
        self.tracks: dict[int, tuple[int, str]] = {}
        self.units: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.slices: list[Slice] = []
        self.instants: list[Instant] = []
        self.counters: dict[tuple[str, str], list[tuple[int, int]]] = {}
        events = []
        for number, packet in _fields(data):
            assert number == 1
            fields = _message(packet)
            assert fields[10] == 1, "every packet names its sequence"
            if 60 in fields:
                assert fields.keys() == {10, 60}
                self._track(_message(fields[60]))
            else:
                assert fields.keys() == {8, 10, 11}
                event = _message(fields[11], 4)
                assert event[11] in self.tracks, "a track is described before its first event"
                events.append((fields[8], event))
        events.sort(key=lambda event: event[0])
        self._open: dict[int, list[tuple[str, int, dict[str, int]]]] = {}
        for time, event in events:
            self._event(time, event)
        assert not any(self._open.values()), "every slice ends"

    def _track(self, fields: dict[int, Any]) -> None:
        assert fields[1] not in self.tracks
        assert fields[1] not in self.groups
        if 3 in fields:
            process = _message(fields[3])
            assert process[1] > 0, "pid 0 is the idle process"
            self.groups[fields[1]] = process[6].decode()
            assert fields[11] == 3
            return
        name = fields[2].decode()
        self.tracks[fields[1]] = (fields[5], name)
        assert fields[5] in self.groups
        assert self.ranks.setdefault(name, fields[12]) == fields[12]
        if 8 in fields:
            self.units[name] = _message(fields[8])[6].decode()

    def _event(self, time: int, event: dict[int, Any]) -> None:
        uuid, kind = event[11], event[9]
        parent, track = self.tracks[uuid]
        group = self.groups[parent]
        if kind == 4:
            assert track in self.units
            self.counters.setdefault((group, track), []).append((time, event[30]))
            return
        assert track not in self.units
        pairs = [_message(note) for note in event[4]]
        notes = {pair[10].decode(): pair[4] for pair in pairs}
        stack = self._open.setdefault(uuid, [])
        if kind == 1:
            stack.append((event[23].decode(), time, notes))
        elif kind == 2:
            path = tuple(name for name, *_ in stack)
            _, begin, begun_with = stack.pop()
            self.slices.append(Slice(group, track, path, begin, time, begun_with))
        else:
            assert kind == 3
            self.instants.append(Instant(group, track, time, event[23].decode(), notes))
