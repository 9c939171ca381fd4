"""Cluster: replicas that share a trace and a clock, and the router in front of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any

from allocator.config import BuildConfig, CacheConfig
from sim.arrivals import NEVER, Arrivals
from sim.cluster.config import ClusterConfig
from sim.cluster.disaggregation import (
    DecodeReplica,
    DecodeScheduler,
    PrefillReplica,
    PrefillScheduler,
    check_supported,
    decode_cache,
)
from sim.cluster.link import TransferCost
from sim.cluster.placement import Placement
from sim.cluster.replica import ClusterReplica
from sim.cluster.results import merge
from sim.cluster.routing import Router
from sim.cost import StepCost
from sim.engine import make_manager, run_clock
from sim.recorder import Recorder
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.job import Job
from sim.scheduler.retention import RetentionOptions, make_wishes
from sim.scheduler.scheduler import Scheduler


def simulate_cluster(
    requests: Collection[Request],
    build: BuildConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    cluster: ClusterConfig,
    *,
    num_blocks: int,
    cost: StepCost,
    transfer: TransferCost | None = None,
    num_host_blocks: int = 0,
    retention: RetentionOptions | None = None,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> RunResult:
    """Replay requests through several replicas of one engine and return all that happened.

    The arguments are those of `sim.engine.simulate`; num_blocks and num_host_blocks are of each replica, and
    `transfer` says how long the KV cache of a prompt takes to another one, which is needed where prefill and decode
    are apart. Block maps and event logs are those of each replica's result.

    Raises ValueError if the configuration cannot work, the requests are not in order, or a routing policy chooses
    what it was not offered.
    """
    running = Cluster(
        requests,
        build,
        cache,
        engine,
        cluster,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        cost=cost,
        transfer=transfer,
        retention=retention,
        progress=progress,
        folder=folder,
    )
    wall_s = run_clock(lambda environment: running.run(environment.timeout))
    return running.result(wall_s)


class Cluster:
    """All replicas as one SimPy process, so that what happens at one moment has an order:

    1.  steps end, in the order of the replicas;
    2.  transfers end, in the order of the replicas that receive;
    3.  prompts that have just been completed are handed over to decode replicas, in the order of completion;
    4.  requests arrive, also those that follow what has just finished, in trace order, and are routed;
    5.  replicas begin their next steps, and transfers with them, in the order of the replicas.
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
        transfer: TransferCost | None,
        retention: RetentionOptions | None,
        progress: Callable[[int], None] | None,
        folder: Path | None = None,
    ) -> None:
        apart = cluster.prefill_replicas
        if apart:
            check_supported(build, cache, retention)
            if transfer is None:
                raise ValueError(f"prefill_replicas ({apart}) needs a TransferCost")
        self._progress = progress
        self._folder = folder
        self._done = 0
        self._arrivals = Arrivals(requests, self._reject_turn)
        self._placement = Placement(len(requests), apart)
        self.replicas: list[ClusterReplica] = []
        self._recorders: list[Recorder] = []
        self._prefilling: list[PrefillReplica] = []
        self._decoding: list[DecodeReplica] = []
        self._sent: dict[Job, tuple[PrefillReplica, Job]] = {}
        causes = [""]
        wishes = make_wishes(retention, build, cache, requests, has_host=num_host_blocks > 0)
        for number in range(cluster.num_replicas):
            own = decode_cache(cache) if apart and number >= apart else cache
            manager = make_manager(build, own, num_blocks, num_host_blocks, engine)
            recorder = Recorder(
                requests,
                manager,
                engine.block_map_samples,
                folder and folder / f"replica-{number}",
                recorders=cluster.num_replicas,
                causes=causes,
            )
            self._recorders.append(recorder)
            kind = Scheduler if not apart else PrefillScheduler if number < apart else DecodeScheduler
            scheduler = kind(manager, build, engine, cost, wishes)
            rest = (recorder, cost, engine.event_skipping, self._arrivals, self._count_done)
            if isinstance(scheduler, DecodeScheduler):
                assert transfer is not None
                receives = DecodeReplica(
                    number, scheduler, *rest, transfer=transfer, received=self._placement.received
                )
                self.replicas.append(receives)
                self._decoding.append(receives)
            elif isinstance(scheduler, PrefillScheduler):
                sends = PrefillReplica(number, scheduler, *rest)
                self.replicas.append(sends)
                self._prefilling.append(sends)
            else:
                self.replicas.append(ClusterReplica(number, scheduler, *rest))
        if wishes is not None:
            wishes.ended_ps = self._arrivals.ended_ps  # of whatever replica
        self._front = Router(cluster.routing, self.replicas[:apart] if apart else self.replicas)
        self._back = Router(cluster.routing, self._decoding)

    def run(self, timeout: Callable[[int], Any]) -> Generator[Any, Any, None]:
        """Let time pass until every request is finished or rejected; yield a `timeout` up to each moment."""
        replicas, arrivals = self.replicas, self._arrivals
        now = 0
        while True:
            for replica in replicas:
                if replica.end_ps == now:
                    replica.end(now)
            if self._prefilling:
                self._end_transfers(now)
                self._hand_over(now)
            while arrivals.next_ps <= now:
                self._route(*arrivals.pop())
            for replica in replicas:
                if replica.end_ps == now or replica.end_ps == NEVER:
                    replica.go_on(now)
            next_ps = min(arrivals.next_ps, min(replica.next_ps for replica in replicas))
            if next_ps == NEVER:
                arrivals.close()
                for replica in replicas:
                    replica.check_done()
                return
            yield timeout(next_ps - now)
            now = next_ps

    # ---------------------------------------------------------------- where requests go

    def _route(self, arrival_ps: int, request: Request) -> None:
        """Give a request that arrives now to a replica."""
        replica, content = self._front.route(request, None, arrival_ps)
        self._placement.arrived(request, replica.number)
        replica.deliver(request, arrival_ps, content)

    def _hand_over(self, now_ps: int) -> None:
        """Give each request whose prompt has just been computed to a replica that decodes."""
        for sender in self._prefilling:
            while sender.complete:
                job = sender.complete.popleft()
                replica, content = self._back.route(job.request, job.content, now_ps)
                assert content is not None
                self._placement.handed_over(job, replica.number)
                self._sent[replica.hand_over(job, content, now_ps)] = sender, job

    def _end_transfers(self, now_ps: int) -> None:
        for receiver in self._decoding:
            while receiver.link.next_ps == now_ps:
                job = receiver.end_transfer(now_ps)
                self._placement.transferred(job, now_ps)
                sender, prefilled = self._sent.pop(job)
                sender.let_go(prefilled, now_ps)

    def _reject_turn(self, turn: Request) -> None:
        self._recorders[0].rejected(turn, turn.arrival_ps, "follows_rejected")
        self._count_done()
        self._arrivals.rejected(turn)

    # ---------------------------------------------------------------- what comes of it

    def _count_done(self) -> None:
        self._done += 1
        if not self._done & 63:
            for recorder in self._recorders:
                recorder.pack()
            if self._progress is not None:
                self._progress(self._done)

    def result(self, wall_s: float) -> RunResult:
        """Return everything, once it has run."""
        merged = merge([recorder.result(0.0) for recorder in self._recorders], wall_s, self._folder)
        return self._placement.completed(merged)
