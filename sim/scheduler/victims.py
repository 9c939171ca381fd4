"""Victims: whom to preempt when decoding runs out of blocks. Of equals, the one that started last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from allocator.manager import KVCacheManager
from sim.scheduler.job import Job

ChooseVictim = Callable[[dict[Job, None], KVCacheManager], Job]
"""From the running jobs, in the order of starting; there is at least one."""


def last_started(running: dict[Job, None], manager: KVCacheManager) -> Job:
    """Return the job that started last, as TensorRT-LLM and vLLM do."""
    return next(reversed(running))


def last_arrived(running: dict[Job, None], manager: KVCacheManager) -> Job:
    """Return a job of the request that arrived last, of those at one time the last of the trace.

    A turn of a session arrives when its time has come, whatever its place in the trace.
    """
    return _least(running, lambda job: (-(job.origin or job).arrival_ps, -job.request.request_id))


def least_progress(running: dict[Job, None], manager: KVCacheManager) -> Job:
    """Return the job that has sampled the fewest tokens, of equals one with the longest prompt, as SGLang does.

    As who is preempted starts again before anybody else, hardly anyone has sampled less than who started last: it is
    among those of one step that the choice is.
    """
    return _least(running, lambda job: (sampled(job), -job.request.prompt_tokens))


def cheapest(running: dict[Job, None], manager: KVCacheManager) -> Job:
    """Return the job that loses the fewest tokens for each block that its end makes available."""

    def price(job: Job) -> Fraction | float:
        assert job.sequence is not None
        blocks = manager.reclaimable_blocks(job.sequence)
        return Fraction(job.sequence.num_tokens, blocks) if blocks else float("inf")

    return _least(running, price)


def sampled(job: Job) -> int:
    """Return how many tokens a running job has sampled; of one that decodes, each but the last has its KV."""
    assert job.sequence is not None
    tokens = job.sequence.num_tokens
    return (
        job.generated if tokens < job.target else max(job.generated, tokens - job.request.prompt_tokens + 1)
    )


def _least(running: Iterable[Job], key: Callable[[Job], Any]) -> Job:
    return min(reversed(list(running)), key=key)


VICTIMS: dict[str, ChooseVictim] = {
    "last_started": last_started,
    "last_arrived": last_arrived,
    "least_progress": least_progress,
    "cheapest": cheapest,
}
"""By the names of EngineConfig.victim."""
