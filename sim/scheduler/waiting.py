"""The queue of jobs that wait to start."""

from __future__ import annotations

from collections import deque

from sim.scheduler.job import Job


class FirstCome(deque[Job]):
    """First come, first served; who was preempted goes before all others. Each call is O(1)."""

    @property
    def first(self) -> Job:
        """Return the job that is to start next. The queue must not be empty."""
        return self[0]

    def put_back(self, job: Job) -> None:
        """Take in a job that was preempted."""
        self.appendleft(job)

    def pop_first(self) -> Job:
        """Take out the job that starts."""
        return self.popleft()
