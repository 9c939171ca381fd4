"""EngineConfig: how the engine batches, admits and preempts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from allocator.checks import require_choice, require_int
from allocator.field_docs import with_field_docs

Admission = Literal["guaranteed_no_evict", "max_utilization", "static_batch"]
QueueOrder = Literal["fcfs", "priority", "shortest", "longest_prefix"]
Preemption = Literal["recompute", "swap", "cheaper"]
Victim = Literal["last_started", "last_arrived", "least_progress", "cheapest"]

_MOST_SLO_S = 1e6
"""Longest service level, eleven days: to be held by any request that is served at all."""


@with_field_docs
@dataclass(frozen=True)
class EngineConfig:
    """Scheduling of one engine replica. Raises ValueError on a broken rule."""

    admission: Admission = "guaranteed_no_evict"
    """guaranteed_no_evict admits a request only if it and all running ones can finish;
    max_utilization admits while blocks last and preempts when they run out;
    static_batch admits as guaranteed_no_evict, but nobody after the first has been prefilled, until all are done."""
    queue_order: QueueOrder = "fcfs"
    """Who is admitted first: fcfs, as they arrive; priority, the highest of the trace's; shortest, the fewest tokens
    of prompt and output; longest_prefix, most tokens found in the cache, of the 128 that wait longest. The first that
    does not fit stops admission, and who was preempted goes before all others."""
    mixed_steps: bool = True
    """Compute prompts in the steps that decode; else prompts go first, in steps of their own, and decoding waits."""
    victim: Victim = "last_started"
    """Who is preempted when decoding runs out of blocks: last_started; last_arrived; least_progress, the fewest tokens
    sampled, then the longest prompt; cheapest, the fewest tokens to compute again for each block that it frees."""
    enable_chunked_prefill: bool = True
    """Split a prompt over steps when it exceeds what is left of max_num_tokens."""
    preemption: Preemption = "recompute"
    """What becomes of who is preempted while it decodes: recompute, its blocks are given up; swap, they move to host
    memory (--host-cache-bytes) while that has room; cheaper, whichever takes less time by the cost model."""
    watermark: float = 0.0
    """Share of the pool that admission leaves free while something is running."""
    protect_waiting_hits: bool = False
    """Evict what the first 16 waiting requests would find in the cache only when nothing else can be evicted."""
    slo_ttft_s: float = 2.0
    """Service level: time to first token, seconds."""
    slo_tpot_s: float = 0.1
    """Service level: mean time per output token after the first, seconds."""
    warm_up_s: float = 0.0
    """Warm-up: requests that arrive within so many seconds are served, but not counted in the summary."""
    warm_up_requests: int = 0
    """Warm-up: the first so many requests are served, but not counted in the summary."""
    event_skipping: bool = True
    """Take runs of identical decode steps as one. The result is the same either way, only slower without; but
    events.parquet has one `advanced` event for steps taken as one."""
    block_map_samples: int = 160
    """How many moments of the pool's state to keep for the block map figure; 0 keeps none."""

    events: bool = False
    """Write events.parquet: all that happened to every block, from which its state at any moment can be had."""

    def __post_init__(self) -> None:
        require_choice("admission", self.admission, get_args(Admission))
        require_choice("queue_order", self.queue_order, get_args(QueueOrder))
        require_choice("preemption", self.preemption, get_args(Preemption))
        require_choice("victim", self.victim, get_args(Victim))
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark ({self.watermark}) must be in [0, 1)")
        for name in ("slo_ttft_s", "slo_tpot_s"):
            if not 0 < getattr(self, name) <= _MOST_SLO_S:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be above 0 and at most {_MOST_SLO_S:g}"
                )
        if not 0 <= self.warm_up_s <= _MOST_SLO_S:
            raise ValueError(f"warm_up_s ({self.warm_up_s}) must be in [0, {_MOST_SLO_S:g}]")
        require_int("warm_up_requests", self.warm_up_requests, 0)
        require_int("block_map_samples", self.block_map_samples, 0)
