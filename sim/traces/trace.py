"""Trace: the requests that a simulation replays, and the error that a malformed file raises."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from allocator.field_docs import with_field_docs
from sim.request import Request
from sim.stream import RequestStream


class TraceError(ValueError):
    """A trace that cannot be read. One line: file, line (or row), field, value and the rule it breaks."""

    def __init__(self, message: str) -> None:
        """Take the message; line ends that a file's name or its header brought into it become spaces."""
        super().__init__(" ".join(message.splitlines()))


@with_field_docs
@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival, and where they come from. Walk through it as often as needed."""

    name: str
    """File name without its suffix, or the workload's name."""
    format: str
    """Name of the format it was read as, or "synthetic"."""
    sha256: str
    """Hex digest of the file's bytes, or of the workload's configuration."""
    requests: Collection[Request]
    """A list, or a RequestStream where there are too many to be kept in memory. The i-th, from 0, has request_id i;
    arrivals never decrease."""
    skipped: int = 0
    """Malformed rows that were left out, where that was asked for."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @property
    def last_arrival_ps(self) -> int:
        """Picoseconds at which the last request arrives, turns of sessions as if nobody had to wait for an answer; of a
        RequestStream, about then.
        """
        if isinstance(self.requests, RequestStream):
            return self.requests.span_ps
        return max((request.arrival_ps for request in self.requests), default=0)

    @property
    def duration_ps(self) -> int:
        """Picoseconds from the first arrival to the last. Walks through all requests."""
        first = last = None
        for last in self.requests:
            first = first or last
        return last.arrival_ps - first.arrival_ps if first and last else 0
