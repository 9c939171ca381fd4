"""How fast is the simulator? Wall time per request and per step, on synthetic and on public traces.

The clock covers the engine's loop: scheduling, allocation, the cost model, SimPy and the records kept in memory. It
does not cover making or reading the trace, the pool's sizing, metrics, figures and files. Every workload runs in a
process of its own, several times over; the median counts, the extremes are shown. Peak memory is that process's
largest resident set, interpreter and imports included.

Because machines differ, a yardstick is timed in the same process: a plain loop of dictionary inserts and look-ups.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import answer_interrupts

    answer_interrupts()

import json
import multiprocessing
import resource
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from allocator.config import BuildConfig, CacheConfig, MemoryBudget, load_model
from experiments.bench._yardstick import median_yardstick
from sim.command_line import parse_dataclass, require_writable, run_command
from sim.cost import RooflineCost
from sim.engine import simulate
from sim.hardware import GPUSpec
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.traces import read_trace
from sim.workload import WorkloadConfig, generate


@dataclass(frozen=True)
class Config:
    """Time the simulator on this machine."""

    num_requests: int = 5000
    """Requests of each synthetic workload."""
    runs: int = 5
    """Runs of each workload."""
    trace: Path | None = None
    """A trace to time as well, served by llama-3-8b on h100-80gb."""
    json: Path | None = None
    """File for the figures, as a list of objects."""


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    workload: str
    requests_per_s: float = 0.0
    output_tokens: int = 128
    tokens_per_block: int = 16
    skipping: bool = True
    trace: Path | None = None


@dataclass(frozen=True)
class Timing:
    """What one workload took; wall times in seconds."""

    workload: str
    requests: int
    wall_s: float
    wall_s_min: float
    wall_s_max: float
    ms_per_request: float
    steps: int
    us_per_step: float
    peak_mib: float
    skipping: bool
    yardstick_s: float


def cases(config: Config) -> list[Case]:
    """Return the workloads: 512 prompt tokens, Poisson arrivals, and the trace if there is one."""
    synthetic = [Case(f"{rate} requests/s, 128 output tokens", requests_per_s=rate) for rate in (5, 12, 20)]
    slow = [
        Case("1 request/s, 1024 output tokens", 1, output_tokens=1024, skipping=skipping)
        for skipping in (True, False)
    ]
    traced = [
        Case(f"{config.trace.name}, blocks of {size}", tokens_per_block=size, trace=config.trace)
        for size in (512, 16)
        if config.trace is not None
    ]
    return synthetic + slow + traced


def _requests(case: Case, count: int) -> Sequence[Request]:
    if case.trace is not None:
        return list(read_trace(case.trace))
    fixed = {"user_tokens_sigma": 0.0, "output_tokens_sigma": 0.0}
    return list(
        generate(
            WorkloadConfig(
                num_requests=count,
                requests_per_s=case.requests_per_s,
                user_tokens_mean=512,
                output_tokens_mean=case.output_tokens,
                **fixed,
            )
        )
    )


def time_case(case: Case, count: int, runs: int) -> Timing:
    """Run one case several times; call it in a fresh process for an honest peak."""
    requests = _requests(case, count)
    if case.trace is None:
        model, gpu = load_model("llama-2-7b"), GPUSpec.preset("a100-80gb")
        build = BuildConfig(tokens_per_block=case.tokens_per_block)
        num_blocks = 27_000
    else:
        model, gpu = load_model("llama-3-8b"), GPUSpec.preset("h100-80gb")
        longest = max(request.prompt_tokens + request.output_tokens for request in requests)
        build = BuildConfig(max_seq_len=longest, tokens_per_block=case.tokens_per_block)
        num_blocks = MemoryBudget.compute(
            model, build, CacheConfig(), gpu_memory_bytes=gpu.memory_bytes
        ).num_blocks
    engine = EngineConfig(event_skipping=case.skipping, block_map_samples=0)
    walls = []
    for _ in range(runs):
        result = simulate(
            requests, build, CacheConfig(), engine, num_blocks=num_blocks, cost=RooflineCost(model, gpu)
        )
        walls.append(result.wall_s)
    wall_s, steps = statistics.median(walls), int(result.timeline["steps"].sum())
    return Timing(
        case.workload,
        len(requests),
        wall_s,
        min(walls),
        max(walls),
        wall_s / len(requests) * 1e3,
        steps,
        wall_s / steps * 1e6,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        case.skipping,
        median_yardstick(),
    )


def run(config: Config, console: Console) -> list[Timing]:
    """Time every case in a process of its own, print the table, and write the figures if asked to."""
    for name in ("requests", "runs"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1")
    if config.json is not None:
        require_writable("json", config.json)
    timings = []
    context = multiprocessing.get_context("spawn")
    for case in track(cases(config), "timing", console=Console(stderr=True), transient=True):
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: this process alone answers Ctrl-C
        try:
            pool = context.Pool(1)
        finally:
            signal.signal(signal.SIGINT, answer)
        with pool:
            timings.append(pool.apply(time_case, (case, config.num_requests, config.runs)))
    if config.json is not None:
        text = json.dumps([asdict(timing) for timing in timings], indent=2) + "\n"
        try:
            config.json.write_text(text)
        except OSError as error:
            raise ValueError(f"json ({config.json}) cannot be written: {error.strerror}") from None
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("workload", "skipping", "wall", "ms a request", "steps", "µs a step", "peak"):
        table.add_column(heading, justify="left" if heading in ("workload", "skipping") else "right")
    for timing in timings:
        table.add_row(
            timing.workload,
            "on" if timing.skipping else "off",
            f"{timing.wall_s:.3f} s ({timing.wall_s_min:.3f} to {timing.wall_s_max:.3f})",
            f"{timing.ms_per_request:.4f}",
            f"{timing.steps:,}",
            f"{timing.us_per_step:.2f}",
            f"{timing.peak_mib:.0f} MiB",
        )
    console.print(table)
    spread = [timing.yardstick_s for timing in timings]
    console.print(
        f"Median of {config.runs} runs (extremes); engine loop only, records in memory. Yardstick, a million dict "
        f"inserts and look-ups: {min(spread):.3f} to {max(spread):.3f} s."
    )
    return timings


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(
        lambda: run(parse_dataclass(Config, "python -m experiments.bench.simulator", given), Console())
    )


if __name__ == "__main__":
    sys.exit(main())
