"""Links: how long the KV cache of a prompt is on its way from one replica to another."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from allocator.field_docs import with_field_docs
from sim.arrivals import NEVER
from sim.scheduler.job import Job


@with_field_docs
@dataclass(frozen=True)
class TransferCost:
    """A transfer of n blocks takes n · block_ps + latency_ps; its bytes keep the link busy, its latency does not."""

    block_ps: int
    """Picoseconds that the bytes of one block take on one GPU's link, those of a tensor-parallel group at once."""
    latency_ps: int


class Link:
    """What one replica receives: one transfer after the other, in the order in which they are begun.

    So a block that is in a transfer is there before any transfer that counts on it is over.

    next_ps  when the next transfer is over; NEVER if none is under way
    """

    def __init__(self, cost: TransferCost) -> None:
        self.next_ps = NEVER
        self._cost = cost
        self._free_ps = 0
        self._jobs: deque[tuple[int, Job]] = deque()

    def begin(self, job: Job, num_blocks: int, now_ps: int) -> None:
        """Queue the transfer of a job's blocks."""
        self._free_ps = max(self._free_ps, now_ps) + num_blocks * self._cost.block_ps
        self._jobs.append((self._free_ps + self._cost.latency_ps, job))
        self.next_ps = self._jobs[0][0]

    def take(self) -> Job:
        """Return the job whose transfer is over first. There must be one."""
        _, job = self._jobs.popleft()
        self.next_ps = self._jobs[0][0] if self._jobs else NEVER
        return job
