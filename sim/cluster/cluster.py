"""Cluster: replicas that share a trace and a clock, and the router in front of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Generator
from typing import Any

from allocator.config import BuildConfig, CacheConfig
from sim.arrivals import NEVER, Arrivals
from sim.cluster.config import ClusterConfig
from sim.cluster.replica import ClusterReplica
from sim.cluster.results import merge
from sim.cluster.routing import ReplicaView, make_routing
from sim.cost import StepCost
from sim.engine import make_manager, run_clock
from sim.recorder import Recorder
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.scheduler import Scheduler

NOWHERE = -1
"""The replica of a turn that never arrives, as its predecessor was rejected."""


def simulate_cluster(
    requests: Collection[Request],
    build: BuildConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    cluster: ClusterConfig,
    *,
    num_blocks: int,
    cost: StepCost,
    num_host_blocks: int = 0,
    progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Replay requests through several replicas of one engine and return all that happened.

    The arguments are those of `sim.engine.simulate`; num_blocks and num_host_blocks are of each replica. The records
    of the replicas are kept in memory, and neither block maps nor event logs are.

    Raises ValueError if the configuration cannot work, the requests are not in order, or a routing policy chooses
    what it was not offered.
    """
    if engine.events:
        raise ValueError(
            f"events ({engine.events}) must be False with several replicas ({cluster.num_replicas})"
        )
    running = Cluster(
        requests,
        build,
        cache,
        engine,
        cluster,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        cost=cost,
        progress=progress,
    )
    wall_s = run_clock(lambda environment: running.run(environment.timeout))
    return running.result(wall_s)


class Cluster:
    """All replicas as one SimPy process, so that what happens at one moment has an order: first, steps end, in the
    order of the replicas; then requests arrive, also those that follow what has just finished, in trace order, and
    are routed; then replicas begin their next steps.
    """

    def __init__(
        self,
        requests: Collection[Request],
        build: BuildConfig,
        cache: CacheConfig,
        engine: EngineConfig,
        cluster: ClusterConfig,
        *,
        num_blocks: int,
        num_host_blocks: int,
        cost: StepCost,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._progress = progress
        self._done = 0
        self._placed = array("i", [NOWHERE]) * len(requests)
        self._recorders: list[Recorder] = []
        self._router = make_routing(cluster.routing)
        self._arrivals = Arrivals(requests, self._reject_turn)
        self.replicas: list[ClusterReplica] = []
        for number in range(cluster.num_replicas):
            manager = make_manager(build, cache, num_blocks, num_host_blocks, events=False)
            recorder = Recorder(requests, manager, 0)
            scheduler = Scheduler(manager, build, engine, cost)
            self._recorders.append(recorder)
            self.replicas.append(
                ClusterReplica(
                    number, scheduler, recorder, cost, engine.event_skipping, self._arrivals, self._count_done
                )
            )
        self._unseen = [ReplicaView.unseen(replica.number) for replica in self.replicas]

    def run(self, timeout: Callable[[int], Any]) -> Generator[Any, Any, None]:
        """Let time pass until every request is finished or rejected; yield a `timeout` up to each moment."""
        replicas, arrivals = self.replicas, self._arrivals
        now = 0
        while True:
            for replica in replicas:
                if replica.end_ps == now:
                    replica.end(now)
            while arrivals.next_ps <= now:
                self._route(*arrivals.pop())
            next_ps = arrivals.next_ps
            for replica in replicas:
                if replica.end_ps == now or replica.end_ps == NEVER:
                    replica.go_on(now)
                next_ps = min(next_ps, replica.end_ps)
            if next_ps == NEVER:
                arrivals.close()
                return
            yield timeout(next_ps - now)
            now = next_ps

    def _route(self, arrival_ps: int, request: Request) -> None:
        """Give a request that arrives now to a replica."""
        replicas, router = self.replicas, self._router
        number, content = 0, None
        if len(replicas) > 1:
            views = self._unseen
            if router.looks:
                content = request.content()
                for replica in replicas:
                    replica.settle(arrival_ps)
                views = [replica.view(request, content) for replica in replicas]
            chosen = router.choose(request, views)
            if chosen not in views:
                raise ValueError(f"routing must choose one of the replicas, not {chosen!r}")
            number = chosen.number
        self._placed[request.request_id] = number
        replicas[number].deliver(request, arrival_ps, content)

    def _reject_turn(self, turn: Request) -> None:
        self._recorders[0].rejected(turn, turn.arrival_ps, "follows_rejected")
        self._count_done()
        self._arrivals.rejected(turn)

    def _count_done(self) -> None:
        self._done += 1
        if not self._done & 63:
            for recorder in self._recorders:
                recorder.pack()
            if self._progress is not None:
                self._progress(self._done)

    def result(self, wall_s: float) -> RunResult:
        """Return everything, once it has run."""
        return merge([recorder.result(0.0) for recorder in self._recorders], self._placed, wall_s)
