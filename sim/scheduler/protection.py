"""Protection: blocks that waiting jobs will hit are taken last."""

from __future__ import annotations

from collections.abc import Callable

from allocator.eviction.protecting import Protecting
from allocator.manager import KVCacheManager, PrefixMatch
from allocator.prefix import Extent
from sim.scheduler.job import Job
from sim.scheduler.waiting import Waiting

PROTECTED = 16
"""Jobs, the first of the queue, whose hits are protected: to look everybody up in a long queue would take its time."""


class Protection:
    """The hits of the first PROTECTED waiting jobs, kept up to date at the beginning of each step.

    What runs counts on the blocks all the same. When nothing else can be taken any more, all are given up, those of
    the last job in the queue first, until the next step begins.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        policy: Protecting,
        waiting: Waiting,
        look_up: Callable[[Job], PrefixMatch],
    ) -> None:
        self._manager = manager
        self._policy = policy
        self._waiting = waiting
        self._look_up = look_up
        self._held: dict[Job, PrefixMatch | None] = {}  # with the hits that are protected

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_blocks(self) -> int:
        """Return how many of the evictable blocks are protected."""
        return self._policy.num_protected

    @property
    def takes_arrivals(self) -> bool:
        """Return whether a job that arrives now would be protected."""
        return len(self._waiting) < PROTECTED or self._waiting.arrivals_may_lead

    def is_settled(self) -> bool:
        """Return whether the first of those who wait are protected, as far as they hit anything when last looked up.

        Whoever looked them up: admission may have, after the step filled a block.
        """
        protects = self._policy.protects
        return self._waiting.first_few(PROTECTED) == list(self._held) and all(
            job.swapped or (match is job.match and protects(job)) for job, match in self._held.items()
        )

    def is_current(self) -> bool:
        """Return whether `update` would change nothing."""
        is_current = self._manager.is_current
        return self.is_settled() and all(
            job.swapped or (job.match is not None and is_current(job.match)) for job in self._held
        )

    def update(self) -> None:
        """Protect what the first of those who wait would hit now, in the order of the queue, and nothing else."""
        if self.is_current():
            return
        first = self._waiting.first_few(PROTECTED)
        staying = set(first)
        for job in [job for job in self._held if job not in staying]:
            self.release(job)
        self._held = dict.fromkeys(first)
        for job in first:
            if not job.swapped:
                self._held[job] = match = self._look_up(job)
                self._policy.protect(job, self._cut(match))

    def release(self, job: Job) -> None:
        """Let go of what is protected for a job that starts, or is not among the first any more."""
        self._held.pop(job, None)
        self._policy.unprotect(job)

    def _cut(self, match: PrefixMatch) -> list[Extent]:
        """Return the extents on the GPU that hold a match's hits and nothing else."""
        path = []
        for extent, blocks in match.path:
            if not extent.ids:
                continue  # in host memory; so is all below, if there are no windows
            if blocks * extent.width < len(extent.keys):
                extent = self._manager.pool.split(extent, blocks)
            path.append(extent)
        return path
