"""How much KV memory does paging save over contiguous reservation?

First an example small enough to check by hand: 100 sequences of 512 tokens, where up to 2048 were possible, held
by a contiguous allocator and by the paged one.

Then a workload. Requests are served from memories of equal size, of which one pages and the others reserve a
contiguous range per request: its maximum length, its output rounded up to a power of two, or exactly what it will
need, as only an oracle knows (placed by a buddy system, as the baselines of the PagedAttention paper are, or by
best fit). Where the slots go is averaged over the time in which requests wait, all having arrived at once; the
number of requests batched together, also under the workload's own arrivals. Time passes in engine steps, which
last what the roofline of the model on the GPU says; see experiments/_serving.py for how requests come and go.

By default the workloads have the mean lengths of ShareGPT and Alpaca in the PagedAttention paper (SOSP'23, section
6.1 of arXiv 2309.06180), and the memory is that of its OPT-13B: 15.7 K slots of 800 KB. Only means are published.
Lengths are drawn lognormal, with a spread fitted to the batches that the paper reports for exact reservation; its
other figures are not fitted. Give a trace file to see your own.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from allocator.checks import require_int
from allocator.config import MODEL_PRESETS, CacheConfig, load_model
from allocator.content import UniqueContent
from allocator.manager import KVCacheManager
from allocator.reservation import ReservationPool
from experiments._memories import ContiguousMemory, Memory, PagedMemory
from experiments._memory_figures import draw_batched, draw_over_time
from experiments._serving import SHARES, Recording, serve
from experiments._workloads import Workload, from_trace, published_workloads
from sim import style
from sim.command_line import parse_dataclass, run_command
from sim.cost import RooflineCost, StepCost
from sim.export import ResultFolder, write_json
from sim.hardware import GPU_PRESETS, GPUSpec
from sim.traces import read_trace


@dataclass(frozen=True)
class Config:
    """How much KV memory does paging save over contiguous reservation?

    First 100 sequences of 512 tokens, where up to 2048 were possible, in a contiguous and a paged allocator. Then
    a workload, served from memories of equal size: a contiguous range a request, as long as its maximum, its
    output rounded up to a power of two, or exactly what it will need; or blocks as it grows. By default lengths
    are like those of ShareGPT and Alpaca in the PagedAttention paper, and the memory is that of its OPT-13B.
    """

    trace: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[TRACE]")] = None
    """Request trace to serve, in any format that sim.traces reads; two synthetic workloads if left out."""
    format: str | None = None
    """Format of the trace, where its content does not tell."""
    columns: str | None = None
    """Columns of a CSV trace: arrival=NAME,prompt=NAME,output=NAME."""
    num_requests: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 2000
    """Requests of a workload, or the first so many of a trace."""
    seed: int = 0
    """Seed of the synthetic workloads."""
    num_slots: int = 15_700
    """Token slots of the KV memory."""
    max_seq_len: int = 2048
    """Most tokens of a request: what the maximum rule reserves. Longer requests of a trace are left out."""
    tokens_per_block: int = 16
    """Block size of the paged memory; 16 is the paper's."""
    max_batch_size: int = 1024
    """Most requests that run at once; so high that only memory limits the batch."""
    model: Annotated[
        str,
        tyro.conf.arg(
            help=f"Model whose step times are used: {', '.join(MODEL_PRESETS)}, or the path of a "
            "Hugging Face config.json."
        ),
    ] = "opt-13b"
    gpu: Annotated[str, tyro.conf.arg(help=f"GPU whose step times are used: {', '.join(GPU_PRESETS)}.")] = (
        "a100-80gb"
    )
    out: Path = Path("results/memory_savings")
    """Folder for figures and figures' numbers (summary.json)."""
    figures: bool = True
    """Draw the figures as PNG and SVG."""

    def check(self) -> None:
        """Raise ValueError on a broken rule. Not on construction, where tyro would wrap the message."""
        for name in ("num_requests", "num_slots", "max_seq_len", "tokens_per_block", "max_batch_size"):
            require_int(name, getattr(self, name), 1)
        require_int("seed", self.seed, 0)
        for name in ("max_seq_len", "tokens_per_block"):
            if getattr(self, name) > self.num_slots:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must not exceed num_slots ({self.num_slots})"
                )


# ---------------------------------------------------------------- the example


def example(
    num_sequences: int = 100, max_seq_len: int = 2048, length: int = 512, tokens_per_block: int = 64
) -> tuple[int, int]:
    """Hold `num_sequences` of `length` tokens in either allocator; return the slots taken, contiguous and paged."""
    contiguous = ReservationPool(num_sequences * max_seq_len, "maximum", "best_fit")
    for _ in range(num_sequences):
        contiguous.allocate(length, length, max_seq_len)
    blocks = num_sequences * max_seq_len // tokens_per_block
    paged = KVCacheManager(blocks, tokens_per_block, CacheConfig(enable_block_reuse=False))
    for _ in range(num_sequences):
        paged.admit(UniqueContent(length), length)
    return contiguous.taken_slots, paged.stats().referenced_blocks * tokens_per_block


# ---------------------------------------------------------------- workloads and memories


def workloads(config: Config) -> list[Workload]:
    """Return what is to be served. Raises ValueError for a trace that cannot be read, or has nothing that fits."""
    if config.trace is None:
        return published_workloads(config.num_requests, config.seed, config.max_seq_len)
    trace = read_trace(
        config.trace, format=config.format, columns=config.columns, num_requests=config.num_requests
    )
    return [from_trace(trace, config.max_seq_len)]


def memories(config: Config) -> list[Callable[[], Memory]]:
    """Return a maker of each memory that is compared, all of the same size."""

    def contiguous(name: str, rule: str, placement: str = "buddy") -> Callable[[], Memory]:
        return lambda: ContiguousMemory(name, config.num_slots, rule, placement, config.max_seq_len)

    return [
        contiguous("maximum", "maximum"),
        contiguous("power of two", "power_of_two"),
        contiguous("exact", "exact"),
        contiguous("exact, best fit", "exact", "best_fit"),
        lambda: PagedMemory("paged", config.num_slots, config.tokens_per_block),
    ]


@dataclass(frozen=True)
class Comparison:
    """One workload under every memory, in the order of `memories`."""

    workload: Workload
    at_once: list[Recording]
    """All requests there from the start, until the last has left."""
    by_arrival: list[Recording]
    """Requests at their own times, until the last has come."""


def compare(workload: Workload, config: Config, cost: StepCost, advance: Callable[[], None]) -> Comparison:
    """Serve a workload from each memory twice; `advance` is called after each time."""

    def run(make: Callable[[], Memory], *, all_at_once: bool) -> Recording:
        recording = serve(
            workload.lifetimes(all_at_once=all_at_once),
            make(),
            cost,
            max_batch_size=config.max_batch_size,
            until_ps=None if all_at_once else workload.last_arrival_ps or None,
        )
        advance()
        return recording

    makers = memories(config)
    return Comparison(
        workload,
        [run(make, all_at_once=True) for make in makers],
        [run(make, all_at_once=False) for make in makers],
    )


# ---------------------------------------------------------------- what is shown


def shares_table(comparison: Comparison) -> Table:
    """Return where the slots went, beside the paper's figure 2."""
    published = comparison.workload.published
    paper = published.shares if published else {}
    source = "(paper: figure 2)" if paper else ""
    table = _table(f"{comparison.workload.name}: where the memory goes while requests wait, % {source}")
    for heading in ("tokens", "reserved", "internal", "external"):
        table.add_column(heading, justify="right")
    if paper:
        table.add_column("paper", style="dim")
    for recording in comparison.at_once:
        cells = [f"{100 * recording.share(name):.1f}" for name in SHARES]
        if paper:
            cells.append("/".join(f"{value:.1f}" for value in paper.get(recording.name, ())))
        table.add_row(recording.name, *(cell if cell != "nan" else "–" for cell in cells))
    return table


def batched_table(comparison: Comparison) -> Table:
    """Return how many requests ran together, beside the paper's figure 13."""
    published = comparison.workload.published
    rate = f"at {published.requests_per_s:g}/s" if published else "own times"
    source = f"(paper: figure 13, {rate})" if published else ""
    table = _table(f"{comparison.workload.name}: requests batched together {source}")
    for heading in ("at once", rate, "served/s", "preempted"):
        table.add_column(heading, justify="right")
    if published:
        table.add_column("paper", style="dim", justify="right")
    for at_once, by_arrival in zip(comparison.at_once, comparison.by_arrival, strict=True):
        cells = [
            _number(batched(at_once)),
            _number(by_arrival.mean("running")),
            _number(at_once.requests_per_s),
            f"{at_once.preemptions:,}",
        ]
        if published:
            paper = published.batched.get(at_once.name)
            cells.append("" if paper is None else f"{paper:.2f}")
        table.add_row(at_once.name, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
    )
    table.add_column("memory")
    return table


def batched(recording: Recording) -> float:
    """Return the mean number of requests in the batch while memory is short; over all time if it never is."""
    waiting = recording.mean("running", while_waiting=True)
    return waiting if np.isfinite(waiting) else recording.mean("running")


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def summary(config: Config, slots: tuple[int, int], comparisons: list[Comparison]) -> dict[str, object]:
    """Return every number that is shown, ready for JSON."""

    def numbers(recording: Recording) -> dict[str, object]:
        shares = {name: _finite(recording.share(name)) for name in SHARES}
        return {
            "share_while_waiting": shares,
            "batched_while_waiting": _finite(recording.mean("running", while_waiting=True)),
            "batched": _finite(recording.mean("running")),
            "finished": recording.finished,
            "finished_per_s": recording.requests_per_s,
            "preemptions": recording.preemptions,
        }

    settings = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    for name in ("out", "figures"):  # what is counted does not depend on these
        del settings[name]
    return {
        "config": settings,
        "example": {"contiguous_tokens": slots[0], "paged_tokens": slots[1], "ratio": slots[0] / slots[1]},
        "workloads": {
            c.workload.name: {
                "requests": len(c.workload.requests),
                "left_out": c.workload.left_out,
                "mean_prompt_tokens": c.workload.mean_tokens[0],
                "mean_output_tokens": c.workload.mean_tokens[1],
                "all_at_once": {r.name: numbers(r) for r in c.at_once},
                "by_arrival": {r.name: numbers(r) for r in c.by_arrival},
            }
            for c in comparisons
        },
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def print_example(console: Console) -> None:
    """Print the tokens that the example's 100 sequences take in both allocators, and their ratio."""
    contiguous, paged = example()
    console.print("100 sequences of 512 tokens each, where up to 2048 are possible:")
    console.print(f"  contiguous, maximum length  {contiguous:>7} tokens", highlight=False)
    console.print(f"  paged, blocks of 64 tokens  {paged:>7} tokens", highlight=False)
    console.print(f"  ratio                       {contiguous / paged:>7.1f}", highlight=False)


_OVER_TIME, _BATCHED, _SUMMARY = "memory_over_time", "batched_requests", "summary.json"
_FILES = (*(f"{stem}.{ending}" for stem in (_OVER_TIME, _BATCHED) for ending in ("png", "svg")), _SUMMARY)


def run(config: Config, console: Console) -> None:
    """Answer the question: print the tables, write figures and numbers. Raises ValueError for bad input."""
    config.check()
    cost = RooflineCost(load_model(config.model), GPUSpec.preset(config.gpu))
    makers = memories(config)
    for make in makers:
        make()  # so that sizes that make no memory are refused before anything is shown
    served = workloads(config)

    print_example(console)
    console.print()

    with ResultFolder(config.out, _FILES) as folder:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("serving", total=2 * len(makers) * len(served))
            comparisons = [compare(w, config, cost, lambda: progress.advance(bar)) for w in served]
        for comparison in comparisons:
            prompt, output = comparison.workload.mean_tokens
            console.print(
                f"{comparison.workload.name}: {len(comparison.workload.requests):,} requests, on average "
                f"{prompt:.2f} tokens in and {output:.2f} out",
                highlight=False,
            )
            if comparison.workload.left_out:
                console.print(f"  {comparison.workload.left_out:,} longer than max_seq_len are left out")
            for table in (shares_table(comparison), batched_table(comparison)):
                console.print("", table)
            console.print()
        if config.figures:
            with style.styled():
                style.save(draw_over_time(comparisons[0]), folder.staging / _OVER_TIME)
                style.save(draw_batched(comparisons), folder.staging / _BATCHED)
        write_json(summary(config, example(), comparisons), folder.staging / _SUMMARY)
        written = folder.publish()
    console.print("\n".join(f"wrote {path}" for path in written), highlight=False)


def main(arguments: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    prog = "python -m experiments.memory_savings"
    return run_command(lambda: run(parse_dataclass(Config, prog, arguments), Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
