"""What a replay shows on the terminal: progress while it runs, and the figures one looks for first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sim.build_info import is_compiled
from sim.metrics import int_column
from sim.quantities import NONE, percent_text, seconds_text

if TYPE_CHECKING:
    from sim.runner import Run


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """Show a bar on stderr while the requests get done; None, and no bar, where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("replaying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("replaying", total=total)
        yield lambda done: bar.update(task, completed=done)


def _spread(figures: dict[str, float | None]) -> str:
    """Write the median and the tails of a distribution of seconds."""
    return "  ".join(f"{name} {seconds_text(figures[name])}" for name in ("p50", "p90", "p99", "max"))


def _pool(run: Run) -> str:
    budget, cache = run.budget, run.spec.cache
    size = f"{budget.num_blocks:,} blocks of {budget.tokens_per_block} tokens = {budget.num_tokens:,} tokens"
    gib = 2**30
    if cache.num_blocks is not None:
        return f"{size}, as --num-blocks says ({budget.pool_bytes / gib:.2f} GiB)"
    memory = 0 if budget.gpu_memory_bytes is None else budget.gpu_memory_bytes
    fraction = run.spec.build.kv_cache_free_gpu_mem_fraction
    origin = (
        f"{budget.pool_bytes / gib:.2f} GiB = {fraction:g} × ({memory / gib:.2f} memory "
        f"− {budget.weights_bytes / gib:.2f} weights − {budget.reserve_bytes / gib:.2f} reserve)"
    )
    capped = cache.max_tokens is not None and budget.num_blocks * budget.block_bytes < budget.pool_bytes
    return f"{size}\n{origin}" + (f", capped by max_tokens {cache.max_tokens:,}" if capped else "")


def _requests(run: Run, summary: dict[str, Any]) -> str:
    text = f"{summary['finished']:,} of {summary['requests']:,} finished"
    for cause, count in summary["rejected"].items():
        text += f"\n{count:,} rejected: {cause}"
        if cause == "exceeds_max_seq_len":
            prompt, output = (
                int_column(run.result.requests, f"{kind}_tokens") for kind in ("prompt", "output")
            )
            longest = int((prompt + output).max())
            text += f" of {run.spec.build.max_seq_len:,}; the longest has {longest:,} tokens"
    return text


def _bound(summary: dict[str, Any]) -> str:
    tokens, blocks = (summary[f"infinite_cache_hit_rate_{unit}"] for unit in ("tokens", "blocks"))
    if tokens is None or blocks is None:
        return ""
    return f"\nof an infinite cache: {percent_text(tokens)} and {percent_text(blocks)}"


def _warm_up(summary: dict[str, Any]) -> str:
    left_out = summary["warm_up"]
    if not left_out["requests"] and not left_out["s"]:
        return ""
    return f"; not counted: the first {seconds_text(left_out['s'])}, {left_out['requests']:,} requests"


def _replicas(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what tells several replicas apart: the least and the most of each, by role where they have one."""
    replicas = summary.get("replicas")
    if not replicas:
        return []
    routing, apart = run.spec.cluster.routing, run.spec.cluster.prefill_replicas
    if not apart:
        return [("replicas", f"{len(replicas)}, {routing}\n{_spans(replicas)}")]
    moved = summary["transfers"]
    roles = ("prefill", "decode")
    return [
        ("replicas", f"{len(replicas)}, {apart} of them for prompts alone, {routing}"),
        *((f"  {role}", _spans([each for each in replicas if each["role"] == role])) for role in roles),
        (
            "transfers",
            f"{moved['requests']:,} of {moved['blocks']:,} blocks, {moved['hit_blocks']:,} more were there\n"
            f"wait   {_spread(moved['wait_s'])}\ntake   {_spread(moved['transfer_s'])}",
        ),
    ]


def _spans(replicas: list[dict[str, Any]]) -> str:
    """Write the least and the most of what some replicas did; of a hit rate, only where something was looked up."""

    def span(text: Callable[[Any], str], *names: str) -> str:
        values: list[Any] = replicas
        for name in names:
            values = [value[name] for value in values]
        known = [value for value in values if value is not None]
        if len(known) < 2:
            return text(known[0]) if known else NONE
        return f"{text(min(known))} to {text(max(known))}"

    rates = span(percent_text, "hit_rate_tokens")
    return (
        f"requests {span('{:,}'.format, 'requests')}; busy {span(percent_text, 'busy')}\n"
        f"of blocks in use, mean {span(percent_text, 'kv_utilization', 'mean')}"
        + ("" if rates == NONE else f"; hit rate {rates} of tokens")
    )


def _overload(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    return [
        (
            "overloaded",
            f"{found['arrivals_per_s']:,.3g} requests/s arrive, {found['finished_per_s']:,.3g} finish; "
            f"{found['waiting']:,} wait\nat the last arrival: latencies grow with the length of the run",
        )
    ]


def _host(host: dict[str, int] | None, hit_blocks: int) -> list[tuple[str, str]]:
    if host is None:
        return []
    text = (
        f"{host['num_blocks']:,} blocks: {host['hit_blocks']:,} of {hit_blocks:,} hit blocks came from there\n"
        f"{host['offloaded_blocks']:,} moved there when evicted, {host['onboarded_blocks']:,} moved back, "
        f"{host['evicted_blocks']:,} given up"
    )
    if host["swapped_out_blocks"]:
        text += (
            f"\n{host['swapped_out_blocks']:,} more swapped out by preemptions, "
            f"{host['swapped_in_blocks']:,} swapped in"
        )
    return [("host memory", text)]


def report_rows(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the summary as (label, value) pairs, what a serving engineer asks first on top."""
    use, waste = summary["kv_utilization"], summary["internal_fragmentation"]
    slo, goodput = summary["slo"], summary["goodput"]
    rate = summary["throughput_tokens_per_s"]
    skipped = f", {run.trace.skipped:,} malformed rows skipped" if run.trace.skipped else ""
    return [
        ("trace", f"{run.trace.name} ({run.trace.format}{skipped})"),
        ("model, GPU", f"{run.spec.model.name}, {run.spec.gpu.gpu_name}"),
        ("KV pool", _pool(run)),
        ("requests", _requests(run, summary)),
        *_overload(summary["overload"]),
        (
            "simulated time",
            f"{seconds_text(summary['simulated_s'])} in {summary['steps']:,} steps{_warm_up(summary)}",
        ),
        ("throughput", NONE if rate is None else f"{rate:,.1f} output tokens/s"),
        ("TTFT", _spread(summary["ttft_s"])),
        ("TPOT", _spread(summary["tpot_s"])),
        ("ITL", _spread(summary["itl_s"])),
        ("end to end", _spread(summary["e2e_s"])),
        (
            "goodput",
            f"{percent_text(goodput['share'])} meet TTFT ≤ {slo['ttft_s']:g} s and TPOT ≤ {slo['tpot_s']:g} s",
        ),
        (
            "hit rate",
            f"{percent_text(summary['hit_rate_tokens'])} of prompt tokens, "
            f"{percent_text(summary['hit_rate_blocks'])} of blocks{_bound(summary)}",
        ),
        (
            "KV utilization",
            f"mean {percent_text(use['block']['mean'])}, max {percent_text(use['block']['max'])} of blocks; "
            f"mean {percent_text(use['token']['mean'])} of token slots",
        ),
        (
            "internal fragmentation",
            f"mean {percent_text(waste['mean'])}, {percent_text(waste['final'])} at final lengths",
        ),
        (
            "preemptions",
            f"{summary['preemptions']:,}, {summary['recomputed_tokens']:,} tokens recomputed",
        ),
        ("evicted blocks", f"{summary['evicted_blocks']:,}"),
        *_host(summary["host"], run.result.cache.hit_blocks),
        *_replicas(run, summary),
        (
            "wall time",
            f"{summary['wall_s']:.2f} s simulating{' (compiled)' * is_compiled()}, "
            f"{summary['total_wall_s']:.2f} s in all",
        ),
    ]


def print_report(rows: list[tuple[str, str]], paths: list[Path]) -> None:
    """Print the summary table, of `report_rows`, and where the results are, on stdout."""
    console = Console(file=sys.stdout, highlight=False, markup=False)  # names may hold brackets
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    console.print(table)
    folder = paths[-1].parent
    names = ", ".join(sorted({str(path.relative_to(folder)) for path in paths}))
    console.print(f"\nwritten to {folder}: {names}", soft_wrap=True)
