"""RequestStream: requests too many to be kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from sim.request import Request


class RequestStream(Collection[Request]):
    """Requests that are not kept but made anew, one after the other, each time they are walked through.

    The count is known beforehand, so that a stream has a length like a list; but it has no places, and requests
    are compared by identity, so nothing that was made before is in it.

    span_ps  about when the last request arrives
    named    whether any request may have content ids
    """

    def __init__(self, start: Callable[[], Iterator[Request]], count: int, span_ps: int, named: bool) -> None:
        """Take a function that starts a new walk, and what is known of the requests that each walk yields."""
        self.span_ps = span_ps
        self.named = named
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return self._start()

    def __contains__(self, item: object) -> bool:
        return False
