"""The engine: a replica's life as a SimPy process. The only module that knows SimPy, and the one clock.

The process takes one step after the other, or one stretch of steps that are alike, and times out up to their end.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from time import perf_counter
from typing import Any

import simpy

from allocator.config import BuildConfig, CacheConfig
from allocator.eviction import make_policy
from allocator.eviction.protecting import protecting
from allocator.manager import KVCacheManager
from sim.cost import StepCost
from sim.recorder import Recorder
from sim.records import RunResult
from sim.replica import Replica
from sim.request import MAX_TIME_PS, PS_PER_S, Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.retention import RetentionOptions, make_wishes
from sim.scheduler.scheduler import Scheduler

_TOO_LONG = (
    f"the run must end within {MAX_TIME_PS // (86400 * PS_PER_S)} days of simulated time, where the simulator's clock "
    "ends: its steps take too long, or its requests come too late"
)


def simulate(
    requests: Collection[Request],
    build: BuildConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    *,
    num_blocks: int,
    cost: StepCost,
    num_host_blocks: int = 0,
    retention: RetentionOptions | None = None,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> RunResult:
    """Replay requests through one engine replica and return all that happened.

    requests    sorted by arrival; request i has request_id i
    num_blocks  blocks of the KV pool (see MemoryBudget); without paging, their tokens are cut into pieces of
                max_seq_len
    cost        how long a step takes
    num_host_blocks
                blocks of host memory behind the pool
    retention   how requests want their blocks kept; None if they do not
    progress    called now and then with the number of requests that are done with
    folder      where to keep the records of requests and steps, should they not fit in memory; the result reads
                from there. Requests that are made as they are walked through (a RequestStream) are held only
                while they wait or run.

    Raises ValueError if the configuration cannot work or the requests are not in order. A request that can never
    run is rejected, by cause, and the run goes on.
    """
    manager = make_manager(build, cache, num_blocks, num_host_blocks, engine)
    recorder = Recorder(requests, manager, engine.block_map_samples, folder)
    wishes = make_wishes(retention, build, cache, requests, has_host=num_host_blocks > 0)
    scheduler = Scheduler(manager, build, engine, cost, wishes)
    replica = Replica(requests, scheduler, recorder, cost, engine.event_skipping, progress)
    wall_s = run_clock(lambda environment: replica.run(environment.timeout))
    if replica.done != len(requests):
        raise RuntimeError(
            f"the run ended with {replica.done} of {len(requests)} requests finished or rejected"
        )
    return recorder.result(wall_s)


def run_clock(process: Callable[[simpy.Environment], Generator[simpy.Event, Any, None]]) -> float:
    """Let a SimPy process run until nothing happens any more; return the real seconds that it took.

    Raises ValueError if it goes on for longer than 64-bit integers can tell, and whatever the process raises.
    """
    environment = simpy.Environment()
    running = environment.process(process(environment))
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic garbage before the run ends, and scanning it all takes a third of the time
    start = perf_counter()
    failure: Exception | None = None
    try:
        environment.run()
    except Exception as error:
        # SimPy raises an error anew from its args, which does not suit every one: this is the one that was raised.
        failure = running.value if running.triggered and not running.ok else error
    finally:
        wall_s = perf_counter() - start  # before the collector takes its turn, in one go
        if collecting:
            gc.enable()
    if isinstance(
        failure, OverflowError
    ):  # the records, all int64, are what finds it out: no step looks at the time
        raise ValueError(_TOO_LONG) from failure
    if failure is not None:
        raise failure
    if environment.now > MAX_TIME_PS:
        raise ValueError(_TOO_LONG)
    return wall_s


def make_manager(
    build: BuildConfig, cache: CacheConfig, num_blocks: int, num_host_blocks: int, engine: EngineConfig
) -> KVCacheManager:
    """Return the cache of one replica. Raises ValueError if the configuration cannot work."""
    if build.enable_paged_kv_cache:
        policy = None
        if engine.protect_waiting_hits:
            policy = protecting(make_policy(cache.policy), windowed=cache.window is not None)
        return KVCacheManager(
            num_blocks,
            build.tokens_per_block,
            cache,
            num_host_blocks=num_host_blocks,
            policy=policy,
            lifetimes=True,
            events=engine.events,
        )
    if num_host_blocks:
        raise ValueError(f"num_host_blocks ({num_host_blocks}) must be 0 when paging is off")
    whole = num_blocks * build.tokens_per_block // build.max_seq_len
    if whole < 1:
        raise ValueError(
            f"num_blocks ({num_blocks}) of {build.tokens_per_block} tokens must hold one sequence of max_seq_len "
            f"({build.max_seq_len}) when paging is off"
        )
    return KVCacheManager.contiguous(whole, build.max_seq_len, events=engine.events)
