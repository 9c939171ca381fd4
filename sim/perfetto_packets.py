"""PerfettoWriter: the packets of a Perfetto trace, written one after the other.

A trace is a protobuf message `Trace` whose packets are messages `TracePacket`; each of ours describes a track or is an
event on one. Field numbers are those of trace_packet.proto, track_event.proto, track_descriptor.proto,
counter_descriptor.proto, process_descriptor.proto and debug_annotation.proto at https://github.com/google/perfetto,
protos/perfetto/trace. They are part of the format and never change, so a schema compiler is not needed for a dozen.
"""

from __future__ import annotations

from typing import BinaryIO

_SLICE_BEGIN, _SLICE_END, _INSTANT, _COUNTER = 1, 2, 3, 4
_EXPLICIT = 3
"""The order of a track's children is that of their ranks."""
_PS_PER_NS = 1000


def varint(value: int) -> bytes:
    """Return an integer, of −2⁶³ to 2⁶⁴ − 1, in protobuf's base-128 encoding."""
    if 0 <= value < 128:
        return _SHORT[value]
    if value < 0:
        value += 1 << 64
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


_SHORT = [bytes((value,)) for value in range(128)]
_NUMBER_TAGS = [varint(field << 3) for field in range(64)]
_BYTES_TAGS = [varint(field << 3 | 2) for field in range(64)]


def _number(field: int, value: int) -> bytes:
    return _NUMBER_TAGS[field] + (_SHORT[value] if 0 <= value < 128 else varint(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _BYTES_TAGS[field] + varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


_SEQUENCE = _number(10, 1)  # trusted_packet_sequence_id: one writer, one sequence


class PerfettoWriter:
    """Writes to a binary file. Times are picoseconds, and rounded down to the format's nanoseconds.

    Tracks are told apart by a number of the caller's, `uuid`, and described before their first event. Slices on a
    track nest: the last that began ends first. Tracks of one name below one parent are drawn as one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._write = file.write

    def _packet(self, body: bytes) -> None:
        self._write(_bytes(1, body))

    def _descriptor(self, body: bytes) -> None:
        self._packet(_SEQUENCE + _bytes(60, body))

    def process(self, uuid: int, pid: int, name: str) -> None:
        """Describe a group of tracks, `pid` being its place among the groups, from 1."""
        process = _number(1, pid) + _text(6, name)
        self._descriptor(_number(1, uuid) + _bytes(3, process) + _number(11, _EXPLICIT))

    def track(self, uuid: int, parent: int, name: str, rank: int) -> None:
        """Describe a track for slices and instants; `rank` is its place among the parent's."""
        body = _number(1, uuid) + _text(2, name) + _number(5, parent) + _number(12, rank)
        self._descriptor(body)

    def counter(self, uuid: int, parent: int, name: str, unit: str, rank: int) -> None:
        """Describe a track for a number that changes over time."""
        body = _number(1, uuid) + _text(2, name) + _number(5, parent) + _bytes(8, _text(6, unit))
        self._descriptor(body + _number(12, rank))

    def _event(self, time_ps: int, body: bytes) -> None:
        self._packet(_number(8, time_ps // _PS_PER_NS) + _SEQUENCE + _bytes(11, body))

    def begin(self, track: int, time_ps: int, name: str, **numbers: int) -> None:
        """Begin a slice; `numbers` are shown with it."""
        self._named(_SLICE_BEGIN, track, time_ps, name, numbers)

    def end(self, track: int, time_ps: int) -> None:
        """End the slice that began last on a track."""
        self._event(time_ps, _number(9, _SLICE_END) + _number(11, track))

    def instant(self, track: int, time_ps: int, name: str, **numbers: int) -> None:
        """Mark a moment; `numbers` are shown with it."""
        self._named(_INSTANT, track, time_ps, name, numbers)

    def _named(self, kind: int, track: int, time_ps: int, name: str, numbers: dict[str, int]) -> None:
        notes = b"".join(_bytes(4, _number(4, value) + _text(10, key)) for key, value in numbers.items())
        self._event(time_ps, notes + _number(9, kind) + _number(11, track) + _text(23, name))

    def count(self, track: int, time_ps: int, value: int) -> None:
        """Say what a counter is from now on."""
        self._event(time_ps, _number(9, _COUNTER) + _number(11, track) + _number(30, value))
