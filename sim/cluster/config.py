"""ClusterConfig: how many replicas serve a trace, and who gets which request."""

from __future__ import annotations

from dataclasses import dataclass

from allocator.checks import require_int
from allocator.field_docs import with_field_docs
from sim.cluster.routing import check_routing

MAX_REPLICAS = 1024
"""Most replicas of a cluster: each has records of its own, and a router that looks at all of them asks each."""


@with_field_docs
@dataclass(frozen=True)
class ClusterConfig:
    """Replicas behind a router. Raises ValueError on a broken rule."""

    num_replicas: int = 1
    """Engines that serve the trace together, alike in all, each with a GPU, a pool and a cache of its own."""
    routing: str = "round_robin"
    """Which replica an arriving request goes to: round_robin, each in turn; least_loaded, the one with the fewest
    sequences waiting and running; longest_prefix, the one whose cache has most of the prompt, unless that is little or
    the replicas are out of balance: then the least loaded; or package.module:Class (see sim.cluster.routing)."""
    prefill_replicas: int = 0
    """Of the replicas, how many only compute prompts; the others only decode, and receive the KV cache of each prompt
    over a link (sim.cluster.disaggregation says how). 0: each does both."""
    kv_link_gb_s: float | None = None
    """Peak bandwidth of the link over which a GPU of a decoding replica receives, GB/s, of which link_efficiency is
    reached; None for that of the GPU's link to the host."""
    kv_link_latency_us: float = 10.0
    """Time that a transfer takes beside that for its bytes, microseconds."""

    def __post_init__(self) -> None:
        require_int("num_replicas", self.num_replicas, 1)
        if self.num_replicas > MAX_REPLICAS:
            raise ValueError(f"num_replicas ({self.num_replicas}) must be at most {MAX_REPLICAS}")
        require_int("prefill_replicas", self.prefill_replicas, 0)
        if self.prefill_replicas >= self.num_replicas and self.prefill_replicas:
            raise ValueError(
                f"prefill_replicas ({self.prefill_replicas}) must be fewer than num_replicas ({self.num_replicas})"
            )
        if self.kv_link_gb_s is not None and not 1e-3 <= self.kv_link_gb_s <= 1e6:
            raise ValueError(f"kv_link_gb_s ({self.kv_link_gb_s}) must be in [0.001, 1e+06]")
        if not 0 <= self.kv_link_latency_us <= 1e9:
            raise ValueError(f"kv_link_latency_us ({self.kv_link_latency_us}) must be in [0, 1e+09]")
        check_routing(self.routing)
