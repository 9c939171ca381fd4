"""Preemption in the naive engine: who has to go when blocks run out, and what becomes of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from naive_cache import Job

from sim.cost import StepBatch, StepCost
from sim.scheduler.config import EngineConfig


@dataclass
class NaiveRun:
    """What happened: a dict for each request and each step, and the inter-token gaps around preemptions.

    Of each preemption, when it was over: the request, which sample, and from when to when it paused.
    """

    requests: list[dict[str, object]]
    steps: list[dict[str, int]] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    pauses: list[tuple[int, int, int, int]] = field(default_factory=list)
    misses: dict[str, int] = field(default_factory=dict)
    evicted: int = 0
    host: dict[str, int] = field(default_factory=dict)
    """What the host, if there is one, has seen in the end."""


class NaivePreemption:
    """The part of the naive engine that takes running jobs' blocks away."""

    engine: EngineConfig
    cost: StepCost
    cache: Any  # naive_cache.NaiveCache, or one of those made from it
    run: NaiveRun
    reserved: int
    waiting: list[Job]
    running: list[Job]
    prefilling: list[Job]
    decoding: list[Job]
    rows: list[dict[str, object]]
    """What happened to each request."""
    promises_the_end: bool
    _preempted = 0  # in this step

    @abstractmethod
    def _final_blocks(self, job: Job) -> int: ...

    @abstractmethod
    def _outstanding(self) -> int: ...

    @abstractmethod
    def _unfinished(self) -> int: ...

    def _victim(self) -> Job:
        """Return whom to preempt; of equals, the one that started last."""
        latest_first = self.running[::-1]
        others = [
            job
            for job in latest_first
            if job.request.beam_width == 1 or not (job.group or [job])[0].preemptions
        ]
        if not others:
            return latest_first[0]
        latest_first = others
        if self.engine.victim == "last_started":
            return latest_first[0]
        if self.engine.victim == "last_arrived":
            return max(latest_first, key=self._arrived)
        if self.engine.victim == "least_progress":
            return min(latest_first, key=lambda job: (job.generated, -job.request.prompt_tokens))

        def price(job: Job) -> float:
            others = {block for other in self.running if other is not job for block in self.cache.held(other)}
            freed = self.cache.held(job) - others
            return job.tokens / len(freed) if freed else float("inf")

        return min(latest_first, key=price)

    def _arrived(self, job: Job) -> tuple[int, int]:
        arrival_ps = self.rows[job.request.request_id]["arrival_ps"]
        assert isinstance(arrival_ps, int)
        return arrival_ps, job.request.request_id

    def _preempt_beams(self, beams: list[Job], now: int) -> None:
        """Forget all that a search has generated."""
        first = beams[0]
        for job in reversed(beams):
            self.running.remove(job)
            self.decoding.remove(job)
            self.cache.release(job)
            first.recomputed += job.tokens - job.request.prompt_tokens
            if job is not first:
                first.copies += job.copies
        self._preempted += 1
        first.preemptions += 1
        first.paused_ps = now
        first.samples, first.generated = len(beams), 0
        first.target = first.written = first.request.prompt_tokens
        first.last_token_ps = now if first.last_token_ps is None else first.last_token_ps
        first.table, first.path, first.said, first.group = [], [], [], []
        self.waiting.insert(0, first)

    def _preempt(self, job: Job, now: int) -> None:
        if job.group:
            self._preempt_beams(job.group, now)
            return
        self.running.remove(job)
        self._preempted += 1
        job.preemptions += 1
        job.paused_ps = now
        row = self.rows[job.request.request_id]
        has_sampled = job.generated or (job.samples > 1 and row["first_token_ps"] != -1)
        if has_sampled and job.last_token_ps is None:
            job.last_token_ps = now
        self.waiting.insert(0, job)
        if job in self.decoding:
            self.decoding.remove(job)
            if self._is_worth_swapping(job):
                job.swapped = True
                self.cache.swap_out(job)
                return
        else:
            self.prefilling.remove(job)
        self._forget_computed(job)
        self.cache.release(job)
        job.table, job.path = [], []

    @staticmethod
    def _forget_computed(job: Job) -> None:
        """Let all that a job has be computed again, apart from what it will find in the cache."""
        job.written = job.tokens
        job.target = job.request.prompt_tokens + job.generated

    # ------------------------------------------------------------ host memory

    def _is_worth_swapping(self, job: Job) -> bool:
        """Return whether a job that was just running is to wait in host memory: not if none runs beside it."""
        cache = self.cache
        if self.engine.preemption == "recompute" or not self.running:
            return False
        blocks = cache.blocks_to_swap_out(job)
        if blocks > cache.host_available:
            return False
        if self.engine.preemption == "swap":
            return True
        again = job.request.prompt_tokens + job.generated
        swapped = StepBatch(0, 0, swapped_tokens=(blocks + len(job.table)) * cache.size)
        return self.cost.step(swapped) < self.cost.step(StepBatch(0, 0, [(again, again)]))

    def _swap_in(self, job: Job, now: int) -> bool:
        """Let a job come back from host memory, if there is room, and decode from the next time on that anybody does.

        If there is none for it even alone, because it has blocks beside cached ones that say the same, it gives up
        what it has there. Return whether either was done.
        """
        cache = self.cache
        needed = sum(cache.blocks_to_swap_in(job))
        held = len(job.names) + job.own_blocks
        if self.running:
            if self.promises_the_end:
                least, promised = self._final_blocks(job), self._outstanding()
            else:
                least = cache.blocks_of(job.request.prompt_tokens + job.generated)
                promised = self._unfinished()
            if least - held + needed > cache.available - promised - self.reserved:
                return False
        elif needed + int(job.tokens % cache.size == 0) > cache.available:
            self._forget_computed(job)
            job.swapped = False
            cache.forget_swapped(job)
            return True
        self.waiting.remove(job)
        cache.swap_in(job)
        job.swapped = False
        self.running.append(job)
        self.decoding.append(job)
        self.run.pauses.append((job.request.request_id, job.sample, job.paused_ps, now))
        return True
