"""How fast is the allocator? Tokens a second through admit, append and release, beside vLLM's KVCacheManager.

Requests arrive as lists of token ids, and are served by a loop without a scheduler: admit in order while fewer run
than may, give each running one a token, free the finished. On the clock is all of that, from a prompt's conversion on;
`append` returns the slots. When the clock has stopped, a shadow pool is written and read by the slots and tables that
came out, and must hold each request's tokens. Every manager serves the workload several times, the garbage collector
running but blind to the workload's own lists; the median counts, the extremes are shown.

Beside it, blocks a second without reuse: one long prompt, in chunks of 1 and of 64 blocks a call, then released.

vLLM takes part where it can be imported. Its manager needs no GPU: CPU torch, the vllm wheel without its dependencies,
and the light ones it asks for when imported:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps vllm==0.33.0

`_managers.VLLM` says how it is called. Because machines differ, a yardstick is timed in the same process: a plain loop
of dictionary inserts and look-ups.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.bench._managers import VLLM, Ours, our_blocks_per_s, vllm_blocks_per_s
from experiments.bench._serving import OUTPUT_TOKENS, PROMPTS_SHA256, Run, Workload, make_workload, serve
from experiments.bench._yardstick import median_yardstick
from sim.build_info import is_compiled, what_runs
from sim.command_line import parse_dataclass, require_writable, run_command

REQUESTS = 2000
_CHUNKS = (1, 64)


@dataclass(frozen=True)
class Config:
    """Time the allocator on this machine."""

    hard: bool = False
    """Serve the workload in which eviction decides: 300 prefixes by rank, 6,000 blocks, 32 running."""
    seed: int = 0
    """Seed of the workload."""
    num_requests: int = REQUESTS
    """Requests of the workload."""
    runs: int = 5
    """Times that each manager serves it."""
    json: Path | None = None
    """File for the figures, as a list of objects."""


@dataclass(frozen=True)
class Timing:
    """What a manager took: medians, and the extremes of the whole; hit_rate is of prompt tokens."""

    name: str
    workload: str
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    admit_us: float
    append_us: float
    free_us: float
    hit_rate: float
    hits_per_request: list[int]
    blocks_per_s: dict[str, float]
    yardstick_s: float
    compiled: bool


def check_workload(workload: Workload, config: Config) -> None:
    """Raise AssertionError if the default workload is not the one that published figures are about."""
    if config.seed == 0 and config.num_requests == REQUESTS:
        found, expected = workload.sha256(), PROMPTS_SHA256[workload.name]
        assert found.startswith(expected), f"the prompts' SHA-256 begins {found[:16]}, not {expected}"


def time_manager(
    make: type[Ours] | type[VLLM],
    blocks_per_s: Callable[[int], float],
    workload: Workload,
    runs: int,
) -> Timing:
    """Let a manager serve the workload several times, verify what it said, and return the figures."""
    done: list[Run] = []
    for _ in range(runs):
        server = make(workload.num_blocks)
        gc.collect()
        gc.freeze()  # the workload's lists are not the manager's: they need not be traversed on the clock
        try:
            run = serve(server, workload)
        finally:
            gc.unfreeze()
        server.verify(workload, run)
        assert not done or run.hits == done[0].hits, "equal runs hit differently"
        done.append(run)
    requests = len(workload.prompts)
    rates = [workload.tokens / run.total_s for run in done]
    return Timing(
        make.name,
        workload.name,
        median(rates),
        min(rates),
        max(rates),
        median(run.admit_s for run in done) / requests * 1e6,
        median(run.append_s for run in done) / (requests * OUTPUT_TOKENS) * 1e6,
        median(run.free_s for run in done) / requests * 1e6,
        sum(done[0].hits) / workload.prompt_tokens,
        done[0].hits,
        {str(chunk): median(blocks_per_s(chunk) for _ in range(runs)) for chunk in _CHUNKS},
        median_yardstick(),
        is_compiled(),
    )


def run(config: Config, console: Console) -> list[Timing]:
    """Time every manager there is, print the table, and write the figures if asked to."""
    for name in ("num_requests", "runs"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1")
    if config.seed < 0:
        raise ValueError(f"seed ({config.seed}) must be at least 0")
    if config.json is not None:
        require_writable("json", config.json)
    workload = make_workload(config.hard, config.seed, config.num_requests)
    check_workload(workload, config)
    timings = [time_manager(Ours, our_blocks_per_s, workload, config.runs)]
    try:
        VLLM(workload.num_blocks)
    except ImportError as error:
        missing = f"vLLM does not take part: {error}."
    else:
        missing = ""
        timings.append(time_manager(VLLM, vllm_blocks_per_s, workload, config.runs))
    if config.json is not None:
        text = json.dumps([asdict(timing) for timing in timings], indent=2) + "\n"
        try:
            config.json.write_text(text)
        except OSError as error:
            raise ValueError(f"json ({config.json}) cannot be written: {error.strerror}") from None
    _show(timings, workload, config, missing, console)
    return timings


def _show(timings: list[Timing], workload: Workload, config: Config, missing: str, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("manager", "M tokens/s", "extremes", "admit", "append a token", "free", "hits"):
        table.add_column(heading, justify="left" if heading == "manager" else "right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.tokens_per_s / 1e6:.2f}",
            f"{timing.tokens_per_s_min / 1e6:.2f} to {timing.tokens_per_s_max / 1e6:.2f}",
            f"{timing.admit_us:.1f} µs",
            f"{timing.append_us:.3f} µs",
            f"{timing.free_us:.1f} µs",
            f"{timing.hit_rate:.4f}",
        )
    console.print(table)
    for timing in timings:
        rates = ", ".join(f"{rate / 1e6:.2f} by {chunk}" for chunk, rate in timing.blocks_per_s.items())
        console.print(f"{timing.name} without reuse: M blocks/s taken and given back, {rates} a call.")
    ours = timings[0]
    parts = {"admit": ours.admit_us, "append": ours.append_us * OUTPUT_TOKENS, "free": ours.free_us}
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {part:.0f} µs ({part / whole:.0%})" for name, part in parts.items())
    console.print(
        f"{workload.name} workload, seed {config.seed}: {len(workload.prompts):,} requests, {workload.tokens:,} "
        f"tokens, {workload.num_blocks:,} blocks of 16, {workload.max_running} running. Where our time goes, a "
        f"request: {shares}. Medians of {config.runs} runs (extremes). Yardstick, a million dict inserts and "
        f"look-ups: {min(t.yardstick_s for t in timings):.3f} s. {what_runs()} {missing}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(
        lambda: run(parse_dataclass(Config, "python -m experiments.bench.allocator", given), Console())
    )


if __name__ == "__main__":
    sys.exit(main())
