"""Run a RunSpec: read or make the trace, size the pool, simulate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from allocator.config import MemoryBudget
from allocator.eviction import EvictionPolicy, make_policy
from sim.bounds import CacheBound, infinite_cache
from sim.cluster.cluster import simulate_cluster
from sim.cluster.link import TransferCost
from sim.cluster.routing import make_routing
from sim.cost import StepCost
from sim.engine import simulate
from sim.manifest import RunSpec, TraceSource
from sim.records import RunResult, finished_mask
from sim.request import PS_PER_S
from sim.sizing import memory_budget
from sim.stream import RequestStream
from sim.timing import Setting
from sim.traces import Trace, read_trace
from sim.user_code import blaming, require_methods
from sim.window import Window
from sim.workload import generate

MOST_IN_MEMORY = 500_000
"""Requests whose records are kept in memory: they take up to a kilobyte each, with those of their steps."""


def load_trace(source: TraceSource) -> Trace:
    """Read the trace file, or generate the workload. Raises ValueError (TraceError for a malformed file)."""
    if source.workload is not None:
        return generate(source.workload)
    return read_trace(source.path, **asdict(source.reading))


def check_classes(spec: RunSpec) -> None:
    """Raise ValueError, in one line, for an eviction or routing policy that cannot be made, or not be asked."""
    policy = make_policy(spec.cache.policy)
    if ":" in spec.cache.policy:
        require_methods("policy", spec.cache.policy, policy, EvictionPolicy)
    make_routing(spec.cluster.routing)


@dataclass(frozen=True)
class Run:
    """A finished run with what it was made from."""

    spec: RunSpec
    trace: Trace
    budget: MemoryBudget
    result: RunResult


def run(
    spec: RunSpec,
    trace: Trace | None = None,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> Run:
    """Simulate `spec` on its trace, or on `trace` where it is loaded already.

    `progress` is called now and then with the number of requests that are done. Of more than MOST_IN_MEMORY
    requests, the records are kept in files of `folder`, if given.

    Raises ValueError for what cannot work, and where the warm-up leaves no request to be counted; UserCodeError where
    a user's eviction policy, routing policy or cost fails.
    """
    budget = memory_budget(spec)
    check_classes(spec)
    loaded = load_trace(spec.trace) if trace is None else trace
    if spec.engine.warm_up_requests >= len(loaded):
        raise ValueError(
            f"warm_up_requests ({spec.engine.warm_up_requests}) must leave some of {len(loaded)} requests"
        )
    cost = spec.timing.make(
        Setting(
            spec.model.narrowed(spec.cache.window),
            spec.gpu,
            spec.build,
            budget,
            spec.cache.tensor_parallel_size,
        )
    )
    with blaming(policy=spec.cache.policy, routing=spec.cluster.routing):
        result = _simulate(spec, loaded, budget, cost, progress, folder)
    if not Window.of(result, spec.engine).counted.any():  # when later turns arrive is not known before
        last_s = int(result.requests["arrival_ps"].astype(np.int64).max()) / PS_PER_S
        raise ValueError(
            f"warm_up_s ({spec.engine.warm_up_s}) must leave some requests: the last arrives at {last_s:.6g} s"
        )
    return Run(spec, loaded, budget, result)


def _simulate(
    spec: RunSpec,
    trace: Trace,
    budget: MemoryBudget,
    cost: StepCost,
    progress: Callable[[int], None] | None,
    folder: Path | None,
) -> RunResult:
    kept = folder if len(trace) > MOST_IN_MEMORY else None
    if spec.cluster.num_replicas > 1:
        return simulate_cluster(
            trace.requests,
            spec.build,
            spec.cache,
            spec.engine,
            spec.cluster,
            num_blocks=budget.num_blocks,
            num_host_blocks=budget.num_host_blocks,
            retention=spec.retention,
            cost=cost,
            transfer=_transfer_cost(spec, budget),
            progress=progress,
            folder=kept,
        )
    return simulate(
        trace.requests,
        spec.build,
        spec.cache,
        spec.engine,
        num_blocks=budget.num_blocks,
        num_host_blocks=budget.num_host_blocks,
        retention=spec.retention,
        cost=cost,
        progress=progress,
        folder=kept,
    )


def _transfer_cost(spec: RunSpec, budget: MemoryBudget) -> TransferCost:
    """Return how long the KV cache takes from one replica to another."""
    gpu, cluster = spec.gpu, spec.cluster
    if cluster.kv_link_gb_s is not None:
        gpu = replace(gpu, link_gb_s=cluster.kv_link_gb_s)
    return TransferCost(gpu.transfer_ps(budget.block_bytes), round(cluster.kv_link_latency_us * 1e6))


def cache_bound(finished: Run) -> CacheBound | None:
    """Return what an infinite cache would have hit, of the same requests, blocks and warm-up."""
    spec, result, requests = finished.spec, finished.result, finished.trace.requests
    window = Window.of(result, spec.engine)
    if isinstance(requests, RequestStream) and not requests.named:
        looked_up = window.cut(result).cache  # no content, no hit: nothing to walk through the trace for
        return CacheBound(looked_up.query_tokens, looked_up.query_blocks, 0, 0)
    ran = finished_mask(result).tolist()
    counted = window.counted.tolist()
    return infinite_cache(
        requests,
        spec.build.tokens_per_block,
        partial_reuse=spec.cache.enable_partial_reuse,
        stored=lambda request: ran[request.request_id],
        counted=lambda request: counted[request.request_id],
    )
