"""Arrivals: the requests of a trace in the order in which they arrive, read when they are due."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Final, NoReturn

from sim.request import Request

NEVER: Final = 1 << 80
"""Later than any time."""

_ALIVE, _REJECTED = -1, -2


class Arrivals:
    """Requests as they arrive; the turns of a session once their predecessors are done.

    The trace is read one request ahead, so that one larger than memory can be replayed: what is held are turns
    whose predecessor is not done yet, and eight bytes for each request read, when it was.

    next_ps  when the next request arrives, as far as is known; NEVER if none does
    """

    def __init__(self, requests: Iterable[Request], orphaned: Callable[[Request], None]) -> None:
        """Take the requests, and whom to tell about a turn whose predecessor was rejected: it does not arrive."""
        self.next_ps = NEVER
        self._orphaned = orphaned
        self._requests: Iterator[Request] = iter(requests)
        self._next: Request | None = None  # the one read last, if it is still to arrive and follows no other
        self._due: list[
            tuple[int, int, Request]
        ] = []  # heap: time, place in the trace; turns that may arrive
        self._turns: dict[int, list[Request]] = {}
        self._ends = array("q")  # of each request read: when it finished
        self._read_ps = 0  # arrival of the request that was read last: those to come are not before it
        self._read()

    def pop(self) -> tuple[int, Request]:
        """Return when the next request arrives, and the request. There must be one.

        Raises ValueError if the requests are not numbered and sorted.
        """
        request, due = self._next, self._due
        if request is None or (due and due[0] < (request.arrival_ps, request.request_id, request)):
            arrival_ps, _, turn = heappop(due)
            if request is None and not (due and due[0][0] <= self._read_ps):
                self._read()
            else:
                self.next_ps = self._soonest()
            return arrival_ps, turn
        arrival_ps = self._read_ps
        self._read()
        return arrival_ps, request

    def close(self) -> None:
        """Forget when requests ended: nothing arrives any more."""
        del self._ends[:]

    def finished(self, request: Request, now_ps: int) -> None:
        """Let the turns that follow a finished request arrive in their time."""
        self._ends[request.request_id] = now_ps
        if self._turns:
            for turn in self._turns.pop(request.request_id, ()):
                heappush(self._due, (max(turn.arrival_ps, now_ps + turn.think_ps), turn.request_id, turn))
            self.next_ps = self._soonest()

    def ended_ps(self, request_id: int) -> int:
        """Return when a request finished, which has."""
        return self._ends[request_id]

    def rejected(self, request: Request) -> None:
        """Note that a request will not run, nor will the turns that follow it."""
        self._ends[request.request_id] = _REJECTED
        for turn in self._turns.pop(request.request_id, ()):
            self._orphaned(turn)

    def _read(self) -> None:
        """Read on until what arrives next is known: nothing unread comes before it."""
        ends, due = self._ends, self._due
        for request in self._requests:
            row, arrival_ps, parent = request.request_id, request.arrival_ps, request.parent
            if row != len(ends) or arrival_ps < self._read_ps:
                self._refuse(request)
            self._read_ps = arrival_ps
            ends.append(_ALIVE)
            if parent < 0:
                self._next = request
                self.next_ps = due[0][0] if due and due[0][0] < arrival_ps else arrival_ps
                return
            if ends[parent] == _ALIVE:
                self._turns.setdefault(parent, []).append(request)
            elif ends[parent] == _REJECTED:
                self._orphaned(request)
            else:
                heappush(due, (max(arrival_ps, ends[parent] + request.think_ps), row, request))
            if due and due[0][0] <= arrival_ps:
                break
        self._next = None
        self.next_ps = self._soonest()

    def _soonest(self) -> int:
        """Return when the next request arrives, of those that have been read."""
        due_ps = self._due[0][0] if self._due else NEVER
        return due_ps if self._next is None else min(due_ps, self._next.arrival_ps)

    def _refuse(self, request: Request) -> NoReturn:
        row = len(self._ends)
        if request.request_id != row:
            raise ValueError(
                f"request_id ({request.request_id}) must be the request's place in the trace ({row})"
            )
        raise ValueError(
            f"arrival_ps ({request.arrival_ps}) of request {row} must not be before its predecessor's "
            f"({self._read_ps})"
        )
