"""Preemption in the naive engine: who has to go when blocks run out, and what becomes of it."""

from __future__ import annotations

from naive_cache import Job, NaiveCache

from sim.scheduler.config import EngineConfig


class NaivePreemption:
    """The part of the naive engine that takes running jobs' blocks away."""

    engine: EngineConfig
    cache: NaiveCache
    waiting: list[Job]
    running: list[Job]
    prefilling: list[Job]
    decoding: list[Job]
    rows: list[dict[str, object]]
    """What happened to each request."""
    _preempted = 0  # in this step

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
            return max(latest_first, key=lambda job: job.request.request_id)
        if self.engine.victim == "least_progress":
            return min(latest_first, key=lambda job: (job.generated, -job.request.prompt_tokens))

        def price(job: Job) -> float:
            others = {block for other in self.running if other is not job for block in self.cache.held(other)}
            freed = self.cache.held(job) - others
            return job.tokens / len(freed) if freed else float("inf")

        return min(latest_first, key=price)

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
        job.written = job.tokens
        job.target = job.request.prompt_tokens + job.generated
        row = self.rows[job.request.request_id]
        has_sampled = job.generated or (job.samples > 1 and row["first_token_ps"] != -1)
        if has_sampled and job.last_token_ps is None:
            job.last_token_ps = now
        (self.decoding if job in self.decoding else self.prefilling).remove(job)
        self.cache.release(job)
        job.table, job.path = [], []
        self.waiting.insert(0, job)
