"""Run a RunSpec: read or make the trace, size the pool, simulate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from allocator.config import MAX_BLOCKS, MemoryBudget
from sim.bounds import CacheBound, infinite_cache
from sim.cluster.cluster import simulate_cluster
from sim.cluster.link import TransferCost
from sim.engine import simulate
from sim.manifest import RunSpec, TraceSource
from sim.metrics import finished_mask
from sim.records import RunResult
from sim.request import PS_PER_S
from sim.stream import RequestStream
from sim.timing import Setting
from sim.traces import Trace, read_trace
from sim.window import Window
from sim.workload import generate

MOST_IN_MEMORY = 500_000
"""Requests whose records are kept in memory: they take up to a kilobyte each, with those of their steps."""


def load_trace(source: TraceSource) -> Trace:
    """Read the trace file, or generate the workload. Raises ValueError (TraceError for a malformed file)."""
    if source.workload is not None:
        return generate(source.workload)
    return read_trace(source.path, **asdict(source.reading))


def memory_budget(spec: RunSpec) -> MemoryBudget:
    """Size the pool.

    Raises ValueError, with the numbers, when it cannot hold one sequence of max_seq_len, or when the two limits that
    may be given for it contradict each other.
    """
    blocks, size, most = spec.cache.num_blocks, spec.build.tokens_per_block, spec.cache.max_tokens
    if blocks is not None and most is not None and blocks * size > most:
        raise ValueError(
            f"num_blocks ({blocks}) of {size} tokens must hold at most max_tokens ({most}), or one of them be left out"
        )
    budget = MemoryBudget.compute(spec.model, spec.build, spec.cache, gpu_memory_bytes=spec.gpu.memory_bytes)
    host = spec.cache.host_cache_bytes
    if budget.num_host_blocks and not budget.paged:
        raise ValueError(f"host_cache_bytes ({host}) must be 0 when paging is off")
    if budget.num_host_blocks > MAX_BLOCKS:
        raise ValueError(
            f"host_cache_bytes ({host}) must be at most {MAX_BLOCKS} blocks of {budget.block_bytes} bytes"
        )
    return budget


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
    requests, the records are kept in files of `folder`, if given and there is one replica.

    Raises ValueError for what cannot work, and where the warm-up leaves no request to be counted.
    """
    budget = memory_budget(spec)
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
    if spec.cluster.num_replicas > 1:
        result = simulate_cluster(
            loaded.requests,
            spec.build,
            spec.cache,
            spec.engine,
            spec.cluster,
            num_blocks=budget.num_blocks,
            num_host_blocks=budget.num_host_blocks,
            cost=cost,
            transfer=_transfer_cost(spec, budget),
            progress=progress,
        )
    else:
        result = simulate(
            loaded.requests,
            spec.build,
            spec.cache,
            spec.engine,
            num_blocks=budget.num_blocks,
            num_host_blocks=budget.num_host_blocks,
            cost=cost,
            progress=progress,
            folder=folder if len(loaded) > MOST_IN_MEMORY else None,
        )
    if not Window.of(result, spec.engine).counted.any():  # when later turns arrive is not known before
        last_s = int(result.requests["arrival_ps"].astype(np.int64).max()) / PS_PER_S
        raise ValueError(
            f"warm_up_s ({spec.engine.warm_up_s}) must leave some requests: the last arrives at {last_s:.6g} s"
        )
    return Run(spec, loaded, budget, result)


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
