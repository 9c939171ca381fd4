"""The queue of jobs that wait to start, in the order in which they are to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush, nsmallest
from itertools import chain, islice
from operator import itemgetter
from typing import Protocol

from sim.scheduler.backlog import Backlog, is_fresh
from sim.scheduler.job import Job

UNPACKED = 1 << 14
"""Jobs that a queue of first come, first served holds as such; those behind them are packed."""

CONSIDERED = 128
"""Jobs among which the longest cached prefix is looked for: SGLang gives up the search in longer queues, too."""


class Waiting(Protocol):
    """What the scheduler asks of a queue."""

    arrivals_may_lead: bool
    """Whether a job that arrives can go before those that wait."""
    order_follows_cache: bool
    """Whether the order changes with what is cached."""
    packed: int
    """How many jobs wait beside those that `len` counts, behind all of them."""

    def __len__(self) -> int: ...

    @property
    def first(self) -> Job:
        """Return the job that is to start next. The queue must not be empty."""
        ...

    def first_few(self, count: int) -> list[Job]:
        """Return the first `count` jobs in their order; where that follows the cache, those that waited longest."""
        ...

    def append(self, job: Job) -> None:
        """Take in a job that arrives."""
        ...

    def put_back(self, job: Job) -> None:
        """Take in a job that was preempted: it goes before all others."""
        ...

    def pop_first(self) -> Job:
        """Take out the job that starts."""
        ...


class FirstCome(deque[Job]):
    """First come, first served. Each call is O(1), averaged over calls.

    The deque holds UNPACKED jobs, and those that were put back; if there are more, they are in a backlog.
    """

    __slots__ = ("_backlog", "packed")

    arrivals_may_lead = False
    order_follows_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.packed = 0
        self._backlog = Backlog()

    _take_in = deque.append  # a job to those that are held as such
    first = property(itemgetter(0))  # asked in every step: there is no Python function to call

    def first_few(self, count: int) -> list[Job]:
        return list(islice(self, count))

    def append(self, job: Job) -> None:
        if not self.packed and len(self) < UNPACKED:
            self._take_in(job)
        elif is_fresh(job):
            self._backlog.append(job)
            self.packed += 1
        else:  # it cannot be packed, nor go before those that are
            while self.packed:
                self._unpack()
            self._take_in(job)

    def put_back(self, job: Job) -> None:
        self.appendleft(job)

    def pop_first(self) -> Job:
        job = self.popleft()
        if self.packed and len(self) <= UNPACKED // 2:
            self._unpack()
        return job

    def _unpack(self) -> None:
        jobs = self._backlog.take()
        self.extend(jobs)
        self.packed -= len(jobs)


class Least:
    """The job with the least key first; of equals, the one that arrived first. Each call is O(log jobs)."""

    arrivals_may_lead = True
    order_follows_cache = False
    packed = 0

    def __init__(self, key: Callable[[Job], int]) -> None:
        self._key = key
        self._heap: list[tuple[int, int, Job]] = []
        self._preempted: deque[Job] = deque()
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._heap) + len(self._preempted)

    @property
    def first(self) -> Job:
        return self._preempted[0] if self._preempted else self._heap[0][2]

    def first_few(self, count: int) -> list[Job]:
        few = list(islice(self._preempted, count))
        return few + [job for _, _, job in nsmallest(count - len(few), self._heap)]

    def append(self, job: Job) -> None:
        self._arrived += 1
        heappush(self._heap, (self._key(job), self._arrived, job))

    def put_back(self, job: Job) -> None:
        self._preempted.appendleft(job)

    def pop_first(self) -> Job:
        return self._preempted.popleft() if self._preempted else heappop(self._heap)[2]


class LongestPrefix:
    """The job of which most tokens are in the cache first, of the CONSIDERED that arrived first; of equals, the
    earliest. Prompts are looked up again when the cache has changed.
    """

    arrivals_may_lead = True
    order_follows_cache = True
    packed = 0

    def __init__(self, hit_tokens: Callable[[Job], int]) -> None:
        self._hit_tokens = hit_tokens
        self._jobs: dict[Job, None] = {}
        self._preempted: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs) + len(self._preempted)

    @property
    def first(self) -> Job:
        return (
            self._preempted[0]
            if self._preempted
            else max(islice(self._jobs, CONSIDERED), key=self._hit_tokens)
        )

    def first_few(self, count: int) -> list[Job]:
        return list(islice(chain(self._preempted, self._jobs), count))

    def append(self, job: Job) -> None:
        self._jobs[job] = None

    def put_back(self, job: Job) -> None:
        self._preempted.appendleft(job)

    def pop_first(self) -> Job:
        if self._preempted:
            return self._preempted.popleft()
        job = self.first
        del self._jobs[job]
        return job


def make_waiting(order: str, hit_tokens: Callable[[Job], int]) -> Waiting:
    """Return an empty queue with the order that `EngineConfig.queue_order` names.

    hit_tokens  how many tokens of a waiting job's prompt are in the cache now
    """
    if order == "fcfs":
        return FirstCome()
    if order == "longest_prefix":
        return LongestPrefix(hit_tokens)
    if order == "priority":
        return Least(lambda job: -job.request.priority)
    return Least(lambda job: job.request.prompt_tokens + job.request.output_tokens)
