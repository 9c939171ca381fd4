"""ClusterConfig: how many replicas serve a trace, and who gets which request."""

from __future__ import annotations

from dataclasses import dataclass

from allocator.checks import require_int
from sim.cluster.routing import check_routing


@dataclass(frozen=True)
class ClusterConfig:
    """Replicas behind a router. Raises ValueError on a broken rule."""

    num_replicas: int = 1
    """Engines that serve the trace together, alike in all, each with a GPU, a pool and a cache of its own."""
    routing: str = "round_robin"
    """Which replica an arriving request goes to: round_robin, each in turn; least_loaded, the one with the fewest
    sequences waiting and running; longest_prefix, the one whose cache has most of the prompt, unless that is little or
    the replicas are out of balance: then the least loaded; or package.module:Class (see sim.cluster.routing)."""

    def __post_init__(self) -> None:
        require_int("num_replicas", self.num_replicas, 1)
        check_routing(self.routing)
