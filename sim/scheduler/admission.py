"""Admission: whether a waiting job may start, by how much room the running ones will still need.

The rules are TensorRT-LLM's capacity scheduler policies (GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from allocator.manager import KVCacheManager, PrefixMatch
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job


class AdmissionRule(ABC):
    """Decide on one job, given what the running ones have been promised.

    promises_the_end  whether that is all blocks until they finish; else until their prompts are computed
    """

    promises_the_end: ClassVar[bool] = True

    def __init__(self, manager: KVCacheManager, watermark: float) -> None:
        self._manager = manager
        self.watermark = int(watermark * manager.num_blocks)
        """Blocks that admission leaves available while something is running."""

    @abstractmethod
    def least_blocks(self, job: Job) -> int:
        """Return the smallest pool in which the job, alone, would finish."""

    @abstractmethod
    def blocks_for(self, job: Job, match: PrefixMatch) -> int:
        """Return by how many blocks starting this job lessens what others can be promised."""

    @abstractmethod
    def blocks_at_return(self, job: Job, held: int, needed: int) -> int:
        """Return the same for a job that comes back from host memory.

        held  blocks of its table;  needed  those that have to be taken for it now
        """


class GuaranteedNoEvict(AdmissionRule):
    """Admit only what can finish together with everything that runs, so that nobody need be preempted.

    One thing can still upset the count, and then somebody is: a sequence that generates, block for block, what
    the cache holds already keeps those cached blocks from being evicted beside its own.
    """

    def least_blocks(self, job: Job) -> int:
        return job.final_blocks

    def blocks_for(self, job: Job, match: PrefixMatch) -> int:
        needed = job.final_blocks
        if match.path or match.repeated is not None or match.partial is not None:
            needed += match.evictable_blocks - match.hit_blocks + match.host_blocks
            if match.repeated is not None:
                needed += match.repeated_blocks
            if match.partial is not None and match.copied_blocks:
                # For the time being, the source is kept as well.
                needed = max(needed, self._manager.blocks_needed(match, job.target - match.hit_tokens))
        return needed

    def blocks_at_return(self, job: Job, held: int, needed: int) -> int:
        return job.final_blocks - held + needed


class MaxUtilization(AdmissionRule):
    """Admit whatever prompt fits now; when decoding runs out of blocks, somebody is preempted."""

    promises_the_end = False

    def least_blocks(self, job: Job) -> int:
        return -(-job.final_tokens // self._manager.tokens_per_block)

    def blocks_for(self, job: Job, match: PrefixMatch) -> int:
        return self._manager.blocks_needed(match, job.target - match.hit_tokens)

    def blocks_at_return(self, job: Job, held: int, needed: int) -> int:
        target = job.request.prompt_tokens + job.generated
        return -(-target // self._manager.tokens_per_block) - held + needed


class StaticBatch(GuaranteedNoEvict):
    """Admit what can finish together, and nobody else before all of it has: batching as it was before requests
    came and went by the step. The batch is closed once the first of its prompts is computed.
    """


_RULES: dict[str, type[AdmissionRule]] = {
    "guaranteed_no_evict": GuaranteedNoEvict,
    "max_utilization": MaxUtilization,
    "static_batch": StaticBatch,
}


def make_admission(config: EngineConfig, manager: KVCacheManager) -> AdmissionRule:
    """Return the rule that `config.admission` names."""
    return _RULES[config.admission](manager, config.watermark)
