"""How fast is the simulator? Wall time per request and per step, and peak memory.

Synthetic workloads have prompts of 512 tokens that share nothing, Poisson arrivals, and run on Llama-2-7B on an
A100-80GB with 27,000 blocks of 16 tokens, 256 sequences and 8,192 tokens a step; traces on one worker of Llama-3-8B on
an H100-80GB with a pool of 3 million tokens, at the trace's rate and at a quarter of it.

In the clock: the engine's loop, with scheduling, allocation, the cost model, SimPy, and all records of requests, steps
and blocks. Not in the clock: making or reading the trace (but see below), sizing the pool, turning the records into
columns when the run has ended, metrics, figures and files. Above 100,000 requests the requests are made, or read from
a native file, while they are replayed, and the records go to disk: both are in the clock then.

Every workload runs with the inner loops compiled, as commands run them once they have been (see
experiments.tools.compiled; this one compiles them if need be), and from the sources as they are, interpreted; each time
in a process of its own, several times over (once above 100,000 requests); the median counts, the extremes are shown.
Peak memory is that process's largest resident set, interpreter and imports included.

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
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from allocator.config import BuildConfig, CacheConfig, load_model
from experiments.bench._yardstick import median_yardstick
from sim.build_info import is_compiled
from sim.command_line import parse_dataclass, require_writable, run_command
from sim.compiled.build import compiled_packages
from sim.compiled.packages import sources
from sim.cost import RooflineCost
from sim.engine import simulate
from sim.hardware import GPUSpec
from sim.metrics import summarise
from sim.records import RunResult
from sim.request import PS_PER_S, Request
from sim.scheduler.config import EngineConfig
from sim.stream import RequestStream
from sim.traces import read_trace, write_trace

_PROMPT_TOKENS = 512
_TRACE_POOL_TOKENS = 3_000_000
_KEPT = 100_000
"""Requests that are made before the clock starts, whose records stay in memory, and runs of which are repeated."""
_SEED = 0


@dataclass(frozen=True)
class Config:
    """Time the simulator on this machine."""

    num_requests: int = 5000
    """Requests of each synthetic workload."""
    runs: int = 5
    """Runs of each workload."""
    modes: Literal["both", "compiled", "interpreted"] = "both"
    """How to run them."""
    trace: Path | None = None
    """A trace to time as well, served by llama-3-8b on h100-80gb."""
    scaling: bool = False
    """Scale as well: 1,000 to 1,000,000 requests; batches of 16 to 1024; 1 to 512 tokens a block. A few minutes."""
    streamed: int = 0
    """Requests to replay from a native file with the records on disk, as well; 0 for none. Ten million take some
    twenty minutes, and 4 GB in the temporary folder."""
    json: Path | None = None
    """File for the figures, as a list of objects."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    time_scale  factor on the times of a trace
    streamed    whether the requests come from a native file, and the records go to disk, however few they are
    """

    workload: str
    requests: int = 0
    requests_per_s: float = 0.0
    output_tokens: int = 128
    tokens_per_block: int = 16
    max_batch_size: int = 256
    skipping: bool = True
    trace: Path | None = None
    time_scale: float = 1.0
    streamed: bool = False


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
    compiled: bool


def cases(config: Config) -> list[Case]:
    """Return the workloads that the configuration asks for."""
    found = [Case(f"{rate} requests/s", config.num_requests, rate) for rate in (5, 12, 20)]
    found += [
        Case("1/s, 1024 tokens out", config.num_requests, 1, output_tokens=1024, skipping=skipping)
        for skipping in (True, False)
    ]
    if config.trace is not None:
        name = config.trace.stem
        for scale, rate in ((1.0, ""), (4.0, ", rate / 4")):
            for size in (512, 16):
                text = f"{name}{rate}, blocks of {size}"
                found.append(Case(text, tokens_per_block=size, trace=config.trace, time_scale=scale))
    if config.scaling:
        found += _scaling(config)
    if config.streamed:
        text = "20 requests/s, from a file, records on disk"
        found.append(Case(text, config.streamed, 20, streamed=True))
    return found


def _scaling(config: Config) -> list[Case]:
    counts = (1_000, 10_000, 100_000, 1_000_000)
    found = [Case(f"20 requests/s, {count:,} requests", count, 20) for count in counts]
    for batch in (16, 64, 256, 1024):
        found.append(
            Case(f"20 requests/s, batches of {batch}", config.num_requests, 20, max_batch_size=batch)
        )
    for size in (1, 4, 16, 64, 256, 512):
        found.append(Case(f"12 requests/s, blocks of {size}", config.num_requests, 12, tokens_per_block=size))
    return found


def _poisson(case: Case) -> Iterator[Request]:
    """Yield the requests of a synthetic workload; the same ones whenever they are asked for."""
    random = np.random.default_rng(_SEED)
    arrival_ps = 0
    for first in range(0, case.requests, 4096):
        gaps = random.exponential(PS_PER_S / case.requests_per_s, 4096).astype(np.int64).tolist()
        for row in range(first, min(first + 4096, case.requests)):
            arrival_ps += gaps[row - first]
            yield Request(row, arrival_ps, _PROMPT_TOKENS, case.output_tokens)


def _requests(case: Case, folder: Path) -> Collection[Request]:
    if case.trace is not None:
        return list(read_trace(case.trace, time_scale=case.time_scale))
    if case.streamed:
        path = folder / "trace.parquet"
        write_trace(_poisson(case), path)
        return read_trace(path).requests
    if case.requests > _KEPT:
        span_ps = round(case.requests / case.requests_per_s * PS_PER_S)
        return RequestStream(lambda: _poisson(case), case.requests, span_ps, named=False)
    return list(_poisson(case))


def _simulate(case: Case, requests: Collection[Request], folder: Path) -> RunResult:
    size = case.tokens_per_block
    if case.trace is None:
        model, gpu = load_model("llama-2-7b"), GPUSpec.preset("a100-80gb")
        tokens = max(8192, case.max_batch_size)
        build = BuildConfig(case.max_batch_size, tokens, tokens_per_block=size)
        num_blocks = 27_000 * 16 // size
    else:
        model, gpu = load_model("llama-3-8b"), GPUSpec.preset("h100-80gb")
        longest = max(request.prompt_tokens + request.output_tokens for request in requests)
        build = BuildConfig(max_seq_len=longest, tokens_per_block=size)
        num_blocks = _TRACE_POOL_TOKENS // size
    return simulate(
        requests,
        build,
        CacheConfig(),
        EngineConfig(event_skipping=case.skipping, block_map_samples=0),
        num_blocks=num_blocks,
        cost=RooflineCost(model, gpu),
        folder=folder / "records" if len(requests) > _KEPT or case.streamed else None,
    )


def time_case(case: Case, runs: int) -> Timing:
    """Run one case several times; call it in a fresh process for an honest peak."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        requests = _requests(case, folder)
        if len(requests) > _KEPT:
            runs = 1
        walls = []
        for _ in range(runs):
            result = _simulate(case, requests, folder)
            walls.append(result.wall_s)
        if len(requests) > _KEPT or case.streamed:
            summarise(result, EngineConfig())  # its memory counts
        steps = int(np.sum(result.timeline["steps"]))
    wall_s = statistics.median(walls)
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
        is_compiled(),
    )


def _folders(config: Config, console: Console) -> list[Path]:
    """Return where the packages are that are to be timed, the compiled ones first."""
    folders = []
    if config.modes != "interpreted":
        try:
            folders.append(compiled_packages(sources(), console))
        except ValueError as error:
            if config.modes == "compiled":
                raise
            console.print(f"compiled: not timed, as {error}", highlight=False)
    return folders + [sources()] * (config.modes != "compiled")


@contextmanager
def _found_first(folder: Path) -> Iterator[None]:
    """Let processes that are started meanwhile import their packages from a folder."""
    before = sys.path[:]
    sys.path.insert(0, str(folder))
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: this process alone answers Ctrl-C
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)
        sys.path[:] = before


def run(config: Config, console: Console) -> list[Timing]:
    """Time every case in processes of their own, print the tables, and write the figures if asked to."""
    for name in ("num_requests", "runs"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1")
    if config.streamed < 0:
        raise ValueError(f"streamed ({config.streamed}) must be at least 0")
    if config.json is not None:
        require_writable("json", config.json)
    if config.trace is not None:
        read_trace(config.trace, stream=True)  # checked now, not after the workloads that come before it
    folders = _folders(config, Console(stderr=True))
    timings = []
    context = multiprocessing.get_context("spawn")
    for case in track(cases(config), "timing", console=Console(stderr=True), transient=True):
        for folder in folders:
            with _found_first(folder):
                pool = context.Pool(1)
            with pool:
                timings.append(pool.apply(time_case, (case, config.runs)))
    if config.json is not None:
        text = json.dumps([asdict(timing) for timing in timings], indent=2) + "\n"
        try:
            config.json.write_text(text)
        except OSError as error:
            raise ValueError(f"json ({config.json}) cannot be written: {error.strerror}") from None
    for compiled in (True, False):
        chosen = [timing for timing in timings if timing.compiled == compiled]
        if chosen:
            console.print(_table(chosen, "compiled" if compiled else "interpreted"))
    spread = [timing.yardstick_s for timing in timings]
    console.print(
        "Prompts of 512 tokens, 128 tokens of output unless said otherwise. "
        f"Medians of {config.runs} runs, and the extremes; one run above {_KEPT:,} requests.\n"
        "In the clock: scheduling, allocation, the cost model, SimPy, and all records; above "
        f"{_KEPT:,} requests, making or reading them, and writing the records to disk.\n"
        "Not in the clock: making or reading fewer requests, sizing the pool, columns, metrics, figures, files.\n"
        f"Yardstick, a million dict inserts and look-ups: {min(spread):.3f} to {max(spread):.3f} s."
    )
    if ratios := _ratios(timings):
        console.print(f"Compiled takes {min(ratios):.2f} to {max(ratios):.2f} of the interpreted time.")
    return timings


def _ratios(timings: list[Timing]) -> list[float]:
    """Return compiled time over interpreted time, of each case that ran both ways."""
    walls: dict[tuple[str, bool], dict[bool, float]] = {}
    for timing in timings:
        walls.setdefault((timing.workload, timing.skipping), {})[timing.compiled] = timing.wall_s
    return [found[True] / found[False] for found in walls.values() if len(found) == 2]


def _table(timings: list[Timing], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("workload", overflow="fold")
    for heading in ("wall, s", "least, most", "ms a\nrequest", "steps", "µs a\nstep", "peak,\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in timings:
        table.add_row(
            timing.workload if timing.skipping else f"{timing.workload}, step by step",
            f"{timing.wall_s:.3f}",
            f"{timing.wall_s_min:.3f}, {timing.wall_s_max:.3f}",
            f"{timing.ms_per_request:.4f}",
            f"{timing.steps:,}",
            f"{timing.us_per_step:.2f}",
            f"{timing.peak_mib:.0f}",
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(
        lambda: run(parse_dataclass(Config, "python -m experiments.bench.simulator", given), Console())
    )


if __name__ == "__main__":
    sys.exit(main())
