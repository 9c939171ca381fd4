"""What does the size of a block change? One chat workload, replayed with blocks of 16, 64 and 128 tokens.

Everything is simulated and seeded: the table is the same on every machine. Each run leaves a result folder, as
`python -m sim.replay` would, whose manifest reruns it; the comparison is drawn beside them.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from allocator.config import BuildConfig, CacheConfig, ModelSpec
from experiments import kernel_replay
from sim import style as look
from sim.command_line import parse_dataclass, run_command
from sim.export import ResultFolder, check_replaceable
from sim.hardware import GPUSpec
from sim.manifest import SYNTHETIC, RunSpec, TraceSource
from sim.quantities import percent_text, rough_percent_text, seconds_text
from sim.replay import write_run
from sim.runner import load_trace, run
from sim.scheduler.config import EngineConfig
from sim.workload import WorkloadConfig

BLOCK_SIZES = (16, 64, 128)
POOL_TOKENS = 32_768
MAX_SEQ_LEN = 4096
WORKLOAD = WorkloadConfig(
    num_requests=1000,
    requests_per_s=10.0,
    arrival_cv=2.0,
    user_tokens_mean=160.0,
    user_tokens_max=1024,
    output_tokens_mean=160.0,
    output_tokens_max=1024,
    system_prompts=6,
    system_prompt_tokens=500,
    turns_mean=3.0,
    session_tokens_max=MAX_SEQ_LEN,
    think_s_mean=8.0,
    sampling_share=0.1,
    samples_per_request=4,
)

Summary = dict[str, Any]


def spec_for(tokens_per_block: int, workload: WorkloadConfig = WORKLOAD) -> RunSpec:
    """Return the run with blocks of that many tokens; the pool holds the same tokens whatever their size."""
    return RunSpec(
        trace=TraceSource(SYNTHETIC, workload=workload),
        model=ModelSpec.preset("llama-3-8b"),
        gpu=GPUSpec.preset("a100-80gb"),
        build=BuildConfig(max_seq_len=MAX_SEQ_LEN, max_num_tokens=2048, tokens_per_block=tokens_per_block),
        cache=CacheConfig(max_tokens=POOL_TOKENS),
        engine=EngineConfig(admission="max_utilization", block_map_samples=480),
    )


def replay_all(out: Path, *, draw: bool = True, workload: WorkloadConfig = WORKLOAD) -> dict[int, Summary]:
    """Run every block size, leave a result folder for each in `out`, and return the summaries by block size."""
    summaries = {}
    with ExitStack() as stack:
        # All folders are opened first, so that one that cannot be written is found out before anything is run.
        folders = {size: stack.enter_context(ResultFolder(out / f"block-{size}")) for size in BLOCK_SIZES}
        if draw:
            check_replaceable(out, ("comparison.png", "comparison.svg"))
        trace = load_trace(spec_for(BLOCK_SIZES[0], workload).trace)
        for size, folder in folders.items():
            began = time.perf_counter()
            summaries[size] = write_run(run(spec_for(size, workload), trace), folder, draw=draw, began=began)
            folder.publish()
    if draw:
        try:
            with look.styled():
                look.save(comparison(summaries), out / "comparison")
        except OSError as error:
            raise ValueError(f"out ({out}) cannot be written: {error.strerror}") from None
    return summaries


def report(summaries: dict[int, Summary], workload: WorkloadConfig = WORKLOAD) -> str:
    """Return the table, and a sentence on it, as plain text without anything that varies between machines."""
    head = (
        "tokens_per_block",
        "hit rate",
        "fragmentation",
        "TTFT p50",
        "TTFT p99",
        "tokens/s",
        "preemptions",
    )
    rows = [
        (
            str(size),
            percent_text(summary["hit_rate_tokens"]),
            percent_text(summary["internal_fragmentation"]["mean"]),
            seconds_text(summary["ttft_s"]["p50"]),
            seconds_text(summary["ttft_s"]["p99"]),
            f"{summary['throughput_tokens_per_s']:,.0f}",
            f"{summary['preemptions']:,}",
        )
        for size, summary in summaries.items()
    ]
    spec = spec_for(BLOCK_SIZES[0], workload)
    intro = (
        f"{workload.num_requests:,} chat requests at {workload.requests_per_s:g}/s: {workload.system_prompts} shared "
        f"system prompts, {workload.turns_mean:g} turns a session,\n{workload.sampling_share:.0%} sampled "
        f"{workload.samples_per_request} ways; {spec.model.name} on one simulated {spec.gpu.gpu_name}, "
        f"KV pool of {POOL_TOKENS:,} tokens."
    )
    return "\n".join((intro, "", *_aligned((head, *rows)), "", _finding(summaries)))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _finding(summaries: dict[int, Summary]) -> str:
    small, large = min(summaries), max(summaries)
    least, most = summaries[small], summaries[large]
    return (
        f"From {large} to {small} tokens a block: hit rate {percent_text(most['hit_rate_tokens'])} to "
        f"{percent_text(least['hit_rate_tokens'])}, preemptions {most['preemptions']:,} to {least['preemptions']:,}."
    )


def comparison(summaries: dict[int, Summary]) -> Figure:
    """Draw what block size changes: one panel a measure, one bar a block size."""
    small, large = min(summaries), max(summaries)
    least, most = summaries[small], summaries[large]
    figure = look.slide(
        f"Blocks of {small} tokens hit {rough_percent_text(least['hit_rate_tokens'])} of the prompt, "
        f"blocks of {large} hit {rough_percent_text(most['hit_rate_tokens'])}",
        f"The same {least['requests']:,} requests and the same pool of {POOL_TOKENS:,} tokens, "
        "cut into blocks of 16, 64 and 128 tokens",
    )
    panels: list[tuple[str, list[float], list[str], str]] = []

    def panel(title: str, values: list[float], texts: list[str], colour: str) -> None:
        panels.append((title, values, texts, colour))

    runs = list(summaries.values())
    hit = [each["hit_rate_tokens"] for each in runs]
    panel("hit rate\nof prompt tokens", hit, [percent_text(value) for value in hit], look.BLUE)
    waste = [each["internal_fragmentation"]["mean"] for each in runs]
    panel("internal fragmentation\nof held blocks", waste, [percent_text(value) for value in waste], look.SKY)
    for name in ("p50", "p99"):
        ttft = [each["ttft_s"][name] for each in runs]
        panel(f"time to first token\n{name}", ttft, [seconds_text(value) for value in ttft], look.ORANGE)
    preemptions = [each["preemptions"] for each in runs]
    panel("preemptions\n", preemptions, [f"{value:,}" for value in preemptions], look.VERMILLION)

    for axes, (title, values, texts, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar([str(size) for size in summaries], values, color=colour, width=0.68)
        axes.bar_label(bars, texts, padding=4, fontsize=12, color=look.INK)
        axes.set_title(title, fontsize=12.5, loc="left", pad=14)
        axes.set_ylim(0, max(max(values) * 1.08, 1e-9))
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", length=0)
    figure.supxlabel("tokens per block", fontsize=12, x=0.53, y=0.03, color=look.INK)
    figure.subplots_adjust(left=0.04, right=0.975, top=0.74, bottom=0.12, wspace=0.28)
    return figure


@dataclass(frozen=True)
class Demo:
    """Replay one seeded chat workload with blocks of 16, 64 and 128 tokens, and compare."""

    out: Path = Path("results/demo")
    """Folder for the results; earlier ones there are replaced."""
    figures: bool = True
    """Draw the figures as PNG and SVG."""


def demo(arguments: list[str]) -> None:
    """Run the demo and print what came out. Raises ValueError if `out` cannot be written."""
    options = parse_dataclass(Demo, "python -m experiments.demo", arguments)
    began = time.perf_counter()
    summaries = replay_all(options.out, draw=options.figures)
    print(report(summaries))
    wall_s = time.perf_counter() - began
    drawn = "comparison.png, and " if options.figures else ""
    print(f"\n{wall_s:.1f} s in all. Results in {options.out}: {drawn}a folder for each block size.")
    print(kernel_line())


def kernel_line() -> str:
    """Execute a small schedule with the CUDA kernels, on a GPU or the CPU, and return the verdict in one line.

    Raises WrongOutputError if an attention output is wrong.
    """
    try:
        return kernel_replay.run(kernel_replay.Config()).last_line
    except RuntimeError as error:  # no compiler, or no CUDA headers: everything above works without
        return f"kernels: not checked: {error}"


if __name__ == "__main__":
    sys.exit(run_command(lambda: demo(sys.argv[1:])))
