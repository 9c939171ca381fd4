"""Which of several replicas should get a request? Three routings of a workload with shared prefixes.

Chat sessions that begin with one of more system prompts than a replica's cache can hold are served by a few replicas.
Round robin spreads every prompt over all caches; the longest cached prefix lets each cache keep some, and sessions
return to where their last turn was. Each run is a file in OUT/points, so that an interrupted experiment goes on where
it was.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from rich.console import Console
from rich.progress import track

from allocator.checks import require_int
from allocator.config import BuildConfig, CacheConfig, ModelSpec
from experiments.tools.sweep import POINTS, Point, read_point, run_point
from sim import style as look
from sim.cluster.config import ClusterConfig
from sim.cluster.routing import ROUTING
from sim.command_line import parse_dataclass, run_command
from sim.export import check_replaceable
from sim.hardware import GPUSpec
from sim.manifest import SYNTHETIC, RunSpec, TraceSource
from sim.quantities import percent_text, rough_percent_text, seconds_text
from sim.scheduler.config import EngineConfig
from sim.workload import WorkloadConfig

POOL_TOKENS = 65_536
PROMPTS, PROMPT_TOKENS = 64, 2_000
MAX_SEQ_LEN = 8192
LABELS = {"round_robin": "round robin", "least_loaded": "least loaded", "longest_prefix": "longest prefix"}
COLOURS = {"round_robin": look.ORANGE, "least_loaded": look.GREEN, "longest_prefix": look.BLUE}

Summaries = dict[str, list[Mapping[str, Any]]]
"""Of each routing, a summary for each load."""


@dataclass(frozen=True)
class Config:
    """Replay one workload with each routing, at several loads, and compare."""

    out: Path = Path("results/routing")
    """Folder for the results; runs that are there already are not run again."""
    replicas: int = 4
    """Replicas that share the load."""
    requests: int = 1200
    """Requests of each run."""
    loads: tuple[float, ...] = (5.0, 10.0, 20.0, 30.0, 45.0, 60.0)
    """Requests a second, of all replicas together."""
    figures: bool = True
    """Draw the comparison as PNG and SVG."""

    def __post_init__(self) -> None:
        require_int("replicas", self.replicas, 2)
        require_int("requests", self.requests, 1)
        if not self.loads or min(self.loads) <= 0:
            raise ValueError(f"loads ({self.loads}) must be one or more, all above 0")


def spec_for(routing: str, load: float, config: Config) -> RunSpec:
    """Return the run with that routing at so many requests a second."""
    workload = WorkloadConfig(
        num_requests=config.requests,
        requests_per_s=load,
        user_tokens_mean=160.0,
        user_tokens_max=1024,
        output_tokens_mean=160.0,
        output_tokens_max=1024,
        system_prompts=PROMPTS,
        system_prompt_tokens=PROMPT_TOKENS,
        turns_mean=3.0,
        session_tokens_max=MAX_SEQ_LEN,
        think_s_mean=8.0,
    )
    return RunSpec(
        trace=TraceSource(SYNTHETIC, workload=workload),
        model=ModelSpec.preset("llama-3-8b"),
        gpu=GPUSpec.preset("a100-80gb"),
        build=BuildConfig(max_seq_len=MAX_SEQ_LEN, max_num_tokens=2048, tokens_per_block=16),
        cache=CacheConfig(max_tokens=POOL_TOKENS),
        engine=EngineConfig(admission="max_utilization", block_map_samples=0),
        cluster=ClusterConfig(config.replicas, routing),
    )


def compare(config: Config) -> Summaries:
    """Run what is missing; return the summaries of all."""
    folder = config.out / POINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out ({config.out}) cannot be written: {error.strerror}") from None
    check_replaceable(config.out, ("routing.png", "routing.svg"))
    points = {
        (routing, load): Point(
            (("routing", routing), ("load", str(load))), 0, spec_for(routing, load, config)
        )
        for load in config.loads
        for routing in ROUTING
    }
    missing = [point for point in points.values() if not (folder / f"{point.key}.json").exists()]
    for point in track(missing, "running", console=Console(stderr=True), transient=True):
        run_point(point, folder)
    return {
        routing: [
            read_point(folder / f"{points[routing, load].key}.json")["summary"] for load in config.loads
        ]
        for routing in ROUTING
    }


def report(summaries: Summaries, config: Config) -> str:
    """Return the table as plain text; the same on every machine."""
    rows = [("requests/s", "routing", "hit rate", "TTFT p50", "TTFT p99", "busiest and idlest replica")]
    for at, load in enumerate(config.loads):
        for routing in ROUTING:
            summary = summaries[routing][at]
            busy = [replica["busy"] for replica in summary["replicas"]]
            rows.append(
                (
                    f"{load:g}",
                    LABELS[routing],
                    percent_text(summary["hit_rate_tokens"]),
                    seconds_text(summary["ttft_s"]["p50"]),
                    seconds_text(summary["ttft_s"]["p99"]),
                    f"{percent_text(max(busy))}, {percent_text(min(busy))}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    intro = (
        f"{config.requests:,} chat requests, {PROMPTS} shared system prompts of {PROMPT_TOKENS:,} tokens, 3 turns a "
        f"session;\nllama-3-8b on {config.replicas} simulated a100-80gb, each with a KV pool of {POOL_TOKENS:,} tokens."
    )
    return "\n".join((intro, "", *lines))


def comparison(summaries: Summaries, config: Config) -> Figure:
    """Draw hit rate and TTFT over the load, a line a routing."""
    near, spread = (summaries[routing][-1] for routing in ("longest_prefix", "round_robin"))
    hit = [rough_percent_text(summary["hit_rate_tokens"] or 0.0) for summary in (near, spread)]
    wait = [seconds_text(summary["ttft_s"]["p99"]) for summary in (near, spread)]
    figure = look.slide(
        f"At {config.loads[-1]:g}/s, the longest prefix hits {hit[0]} of prompt tokens, round robin {hit[1]}; "
        f"p99 of TTFT: {wait[0]}, {wait[1]}",
        f"{config.requests:,} requests to {config.replicas} replicas, {PROMPTS} system prompts of {PROMPT_TOKENS:,} "
        f"tokens; each replica's pool holds {POOL_TOKENS:,} tokens",
    )
    hits, waits = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22})
    bound = [summary["infinite_cache_hit_rate_tokens"] for summary in summaries["round_robin"]]
    hits.plot(config.loads, bound, color=look.MUTED, linestyle=":", label="one infinite cache")
    _lines(hits, config.loads, summaries, ("hit_rate_tokens",))
    hits.set_ylim(0, 1)
    hits.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    hits.set_ylabel("prompt tokens hit")
    _lines(waits, config.loads, summaries, ("ttft_s", "p99"))
    waits.set_yscale("log")
    waits.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    waits.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
    waits.yaxis.set_minor_formatter(NullFormatter())
    waits.set_ylabel("time to first token, p99 (log scale)")
    for axes in (hits, waits):
        axes.set_xlabel("requests a second, of all replicas")
        axes.set_xlim(0, max(config.loads) * 1.03)
    handles, labels = hits.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.98, 0.875), ncols=4, handlelength=1.6)
    return figure


def _lines(axes: Axes, loads: Sequence[float], summaries: Summaries, names: Sequence[str]) -> None:
    for routing, found in summaries.items():
        values = []
        for summary in found:
            value: Any = summary
            for name in names:
                value = value[name]
            values.append(value)
        axes.plot(loads, values, color=COLOURS[routing], marker="o", markersize=6, label=LABELS[routing])


def routing(arguments: list[str]) -> None:
    """Run the experiment and print what came out. Raises ValueError if `out` cannot be written."""
    config = parse_dataclass(Config, "python -m experiments.routing", arguments)
    summaries = compare(config)
    print(report(summaries, config))
    if config.figures:
        try:
            with look.styled():
                paths = look.save(comparison(summaries, config), config.out / "routing")
        except OSError as error:
            raise ValueError(f"out ({config.out}) cannot be written: {error.strerror}") from None
        print(f"\ndrawn in {paths[0]}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: routing(sys.argv[1:])))
