"""Backlog: jobs so far back in a queue that they need not exist yet."""

from __future__ import annotations

import dataclasses
import pickle
from collections import deque
from operator import attrgetter
from typing import Any

from sim.request import Request
from sim.scheduler.job import Job

_PART = 1024
"""Jobs that are packed, and unpacked, at once."""

_FIELDS = attrgetter(*(field.name for field in dataclasses.fields(Request) if field.init))


def is_fresh(job: Job) -> bool:
    """Return whether nothing has come of a job but that it waits, so that its request says all about it."""
    return job.sequence is None and not job.swapped and not job.preemptions and job.first_ps < 0


class Backlog:
    """A queue of fresh jobs, as bytes: a tenth of what they take as objects.

    An engine that cannot keep up with its trace would else hold a good part of it in memory.
    """

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._last: list[Job] = []  # the youngest, not packed yet

    def append(self, job: Job) -> None:
        """Take a fresh job in, as the last."""
        self._last.append(job)
        if len(self._last) >= _PART:
            rows = [(*_FIELDS(each.request), each.arrival_ps, each.final_blocks) for each in self._last]
            self._parts.append(pickle.dumps(rows, pickle.HIGHEST_PROTOCOL))
            self._last.clear()

    def take(self) -> list[Job]:
        """Return the jobs that came first, up to some number, and forget them; none if there are none."""
        if self._parts:
            return [_job(row) for row in pickle.loads(self._parts.popleft())]
        jobs, self._last = self._last, []
        return jobs


def _job(row: tuple[Any, ...]) -> Job:
    *fields, arrival_ps, final_blocks = row
    request = Request(*fields)
    job = Job(request, request.num_sequences)
    job.arrival_ps = arrival_ps
    job.final_blocks = final_blocks
    return job
