"""Room in a cache whose blocks leave attention windows: how much a job may take without breaking a promise.

There a job holds most while its prompt is computed: the window and a whole chunk. And what jobs share now they will
not share when it has left their windows, so a promise counts every block of each table.
"""

from __future__ import annotations

from collections.abc import Iterable

from allocator.manager import KVCacheManager, PrefixMatch
from allocator.windows import AttentionWindow
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job


class WindowedRoom:
    """What the scheduler asks about blocks, where they leave windows; `running` are its jobs."""

    def __init__(self, manager: KVCacheManager, window: AttentionWindow, config: EngineConfig) -> None:
        self._manager = manager
        self._window = window
        self._chunked = config.enable_chunked_prefill
        self._promises = config.admission != "max_utilization"
        self._watermark = int(config.watermark * manager.num_blocks)

    def least_blocks(self, job: Job) -> int:
        """Return the smallest pool in which a job, alone, would finish."""
        size = self._manager.tokens_per_block
        least = job.final_blocks if self._promises else self._window.blocks_held(job.final_tokens)
        return least if self._chunked else max(least, -(-job.target // size))

    def unpromised(self, running: Iterable[Job]) -> int:
        """Return the blocks that are promised to nobody.

        Where jobs are promised to finish, each has as many as it will hold while it decodes, or as it holds now if
        that is more; else only those whose prompt is unfinished have any.
        """
        manager = self._manager
        promised = 0
        for job in running:
            assert job.sequence is not None
            held = job.sequence.num_blocks
            if self._promises:
                promised += max(job.final_blocks, held)
            elif job.sequence.num_tokens < job.target:
                promised += max(self._window.blocks_held(job.target) - held, 0)
        return (manager.num_blocks if self._promises else manager.available_blocks) - promised

    def next_chunk(self, job: Job, running: Iterable[Job]) -> int:
        """Return how many more tokens of its prompt a running job may compute now; 0 if there are no blocks."""
        manager, sequence = self._manager, job.sequence
        assert sequence is not None
        room = manager.room(sequence)
        if room > 0 and self._promises:
            spare = self.unpromised(other for other in running if other is not job)
            most = self._window.left(sequence.num_tokens) + max(job.final_blocks, spare)
            room = min(room, most * manager.tokens_per_block - sequence.num_tokens)
        return max(room, 0)

    def first_chunk(self, job: Job, match: PrefixMatch, chunk: int, running: Iterable[Job]) -> int:
        """Return how many of `chunk` tokens a waiting job may start with; 0 if it has to wait."""
        manager = self._manager
        blocks = manager.available_blocks
        # Hits take of what is available, too, and the source of a copy does for the time being.
        idle = match.evictable_blocks + match.host_blocks + match.copied_blocks
        if running:
            spare = self.unpromised(running) - self._watermark
            needed = job.final_blocks
            if not self._promises:
                needed = manager.blocks_needed(match, job.target - match.hit_tokens)
                if self._chunked or job.preemptions:
                    needed = min(needed, self._window.blocks_held(job.target))
            if needed > spare:
                return 0
            # What is hit is in the table, too: a promise counts it, whoever else has it now.
            blocks = min(blocks, spare - len(match.path) + idle if self._promises else spare)
        whole = match.hit_blocks + blocks - idle
        fits = whole * manager.tokens_per_block - match.hit_tokens
        if fits < chunk and not self._chunked and not job.preemptions:
            return 0
        return max(min(chunk, fits), 0)

    def can_return(self, job: Job, held: int, needed: int, running: Iterable[Job]) -> bool:
        """Return whether a job may come back from host memory beside those that run.

        held    blocks of its table
        needed  by how many it lessens what is available
        """
        assert job.sequence is not None
        spare = self.unpromised(running) - self._watermark
        if self._promises:
            return max(job.final_blocks, held) <= spare and needed <= self._manager.available_blocks
        starts_a_block = job.sequence.num_tokens % self._manager.tokens_per_block == 0
        return needed + starts_a_block <= spare
