"""Trace: the requests that a simulation replays, and the error that a malformed file raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sim.request import Request


class TraceError(ValueError):
    """A trace that cannot be read. One line: file, line (or row), field, value and the rule it breaks."""

    def __init__(self, message: str) -> None:
        """Take the message; line ends that a file's name or its header brought into it become spaces."""
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival, and where they come from."""

    name: str
    """File name without its suffix, or the workload's name."""
    format: str
    """Name of the format it was read as, or "synthetic"."""
    sha256: str
    """Hex digest of the file's bytes, or of the workload's configuration."""
    requests: list[Request]
    """Row i has request_id i; arrivals never decrease."""
    skipped: int = 0
    """Malformed rows that were left out, where that was asked for."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @property
    def duration_ps(self) -> int:
        """Picoseconds from the first arrival to the last."""
        return self.requests[-1].arrival_ps - self.requests[0].arrival_ps if self.requests else 0
