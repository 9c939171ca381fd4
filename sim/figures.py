"""Figures of a run: the pool and the queue over time, and the distributions of latency.

Titles state what the run showed; the line below says what is drawn. The block map has a module of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from sim import style as look
from sim.binning import binned
from sim.block_map import block_map, has_block_map
from sim.cluster.figures import replica_utilization
from sim.distributions import Ints
from sim.metrics import Latencies, int_column, latency_figures
from sim.quantities import rough_percent_text, seconds_text
from sim.records import RunResult
from sim.request import PS_PER_S
from sim.scheduler.config import EngineConfig

Floats = NDArray[np.float64]

_BINS = 600
_CURVE_POINTS = 2000
_ITL_POINTS = 1_000_000


def write_figures(result: RunResult, engine: EngineConfig, folder: Path) -> list[Path]:
    """Draw every figure that the run has data for, as PNG and SVG in `folder`, and return the paths."""
    drawn: dict[str, Figure] = {}
    with look.styled():
        if result.timeline["steps"].size:
            drawn["utilization"] = replica_utilization(result) if result.replicas else utilization(result)
        if (result.requests["status"] == "finished").any():
            drawn["latency"] = latency(result, engine)
        if has_block_map(result):
            drawn["block_map"] = block_map(result)
    return [path for name, figure in drawn.items() for path in look.save(figure, folder / name)]


# ---------------------------------------------------------------------------- the pool and the queue over time


def utilization(result: RunResult) -> Figure:
    """Draw how the pool divides over time, and below it the running and the waiting sequences."""
    rows, num_blocks = result.timeline, result.cache.num_blocks
    end = float(int_column(rows, "end_ps").max())
    edges = np.linspace(0.0, end, _BINS + 1)
    middle = (edges[1:] + edges[:-1]) / 2 / PS_PER_S
    first, last, evictable = (
        int_column(rows, name).astype(np.float64)
        for name in ("referenced_blocks_first", "referenced_blocks", "evictable_blocks")
    )
    # Between rows nothing runs, so nothing is referenced. How much is cached then is not recorded; it is at
    # least what the rows beside the gap have.
    beside = np.maximum(evictable, np.concatenate(([0.0], evictable[:-1])))
    referenced = binned(rows, (first + last) / 2, 0.0, edges) / num_blocks
    cached = binned(rows, evictable, beside, edges) / num_blocks
    running, waiting = (
        binned(rows, int_column(rows, name).astype(np.float64), 0.0, edges) for name in ("running", "waiting")
    )

    figure = look.slide(_utilization_title(result, float(referenced.mean())), _utilization_subtitle(result))
    pool, queue = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    pool.fill_between(middle, 0, referenced, color=look.BLUE, linewidth=0, label="referenced by a sequence")
    pool.fill_between(
        middle,
        referenced,
        referenced + cached,
        color=look.SKY,
        alpha=0.45,
        linewidth=0,
        label="cached, evictable",
    )
    pool.axhline(1.0, color=look.MUTED, linewidth=0.8)
    pool.fill_between([], [], [], facecolor="white", edgecolor=look.MUTED, linewidth=0.8, label="free")
    pool.set_ylim(0, 1)
    pool.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    pool.set_ylabel("share of the pool's blocks")
    _mark_preemptions(pool, result, end)
    _legend_above(pool)

    queue.plot(middle, running, color=look.GREEN, label="running")
    queue.plot(middle, waiting, color=look.ORANGE, label="waiting")
    queue.set_ylim(bottom=0)
    queue.set_ylabel("sequences")
    queue.set_xlabel("simulated time (s)")
    queue.set_xlim(0, end / PS_PER_S)
    _legend_above(queue)
    return figure


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.03), ncols=4, borderaxespad=0.2, handlelength=1.4)


def _mark_preemptions(axes: Axes, result: RunResult, end_ps: float) -> None:
    """Mark, above the pool, the moments at which a sequence lost its blocks."""
    rows = result.timeline
    moments = int_column(rows, "start_ps")[int_column(rows, "preemptions") > 0]
    if moments.size:
        seen = np.unique(
            (moments / end_ps * _BINS).astype(np.int64)
        )  # one mark a bin is all that can be seen
        axes.plot(
            (seen + 0.5) / _BINS * end_ps / PS_PER_S,
            np.full(seen.size, 1.025),
            linestyle="none",
            marker="v",
            markersize=5,
            color=look.VERMILLION,
            clip_on=False,
            label="preemption",
        )


def _utilization_title(result: RunResult, mean: float) -> str:
    """Say how full the pool was, `mean` of it on average over time, and what that led to."""
    peak = int(int_column(result.timeline, "referenced_blocks").max()) / result.cache.num_blocks
    preemptions = int(int_column(result.timeline, "preemptions").sum())
    queue = int(int_column(result.timeline, "waiting").max())
    if mean > 0.9:
        full = "Sequences fill the pool"
    else:
        at_most = "all of it at times" if peak > 0.995 else f"{rough_percent_text(peak)} at most"
        full = f"Sequences hold {rough_percent_text(mean)} of the pool on average, {at_most}"
    if preemptions:
        return f"{full}: {preemptions:,} preemption{'s' if preemptions > 1 else ''}"
    if queue:
        return f"{full}; up to {queue:,} wait{'s' if queue == 1 else ''}"
    return f"{full}; none waits"


def _utilization_subtitle(result: RunResult) -> str:
    cache = result.cache
    hit = (
        f", {rough_percent_text(cache.hit_tokens / cache.query_tokens)} of prompt tokens hit"
        if cache.hit_tokens
        else ""
    )
    return (
        f"{cache.num_blocks:,} blocks of {cache.tokens_per_block} tokens"
        f"{hit}, {cache.evicted_blocks:,} blocks evicted"
    )


# ---------------------------------------------------------------------------------------------------- latency


def _share_curve(values: Floats, weights: Floats | None = None) -> tuple[Floats, Floats] | None:
    """Return x and the share of values ≤ x, thinned to what a screen can show; None without values."""
    if not values.size:
        return None
    order = np.argsort(values, kind="stable")
    x = values[order]
    share = np.cumsum(np.ones(x.size) if weights is None else weights[order])
    share /= share[-1]
    if x.size > _CURVE_POINTS:
        wanted = np.searchsorted(share, np.linspace(0, 1, _CURVE_POINTS))
        keep = np.unique(np.concatenate(([0], np.minimum(wanted, x.size - 1), [x.size - 1])))
        x, share = x[keep], share[keep]
    return np.concatenate((x[:1], x)), np.concatenate(([0.0], share))


def _gap_points(result: RunResult) -> tuple[Floats, Floats]:
    """Return inter-token gaps (s) and weights: stretches by a few points each, since each spans little."""
    rows = result.timeline
    first, increment, steps, tokens = (
        int_column(rows, name) for name in ("first_step_ps", "step_increment_ps", "steps", "itl_tokens")
    )
    points = max(1, min(16, _ITL_POINTS // max(1, steps.size)))
    at = (np.arange(points) + 0.5) / points * (steps[:, None] - 1)
    values = (first[:, None] + at * increment[:, None]) / PS_PER_S
    weights = np.repeat((tokens * steps / points)[:, None], points, axis=1)
    gaps: Ints = result.gaps_ps
    all_values: Floats = np.concatenate((values.ravel(), gaps / PS_PER_S))
    all_weights: Floats = np.concatenate((weights.ravel(), np.ones(gaps.size)))
    kept = all_weights > 0
    return all_values[kept], all_weights[kept]


def latency(result: RunResult, engine: EngineConfig) -> Figure:
    """Draw the cumulative distributions of TTFT, TPOT, ITL and end-to-end latency, percentiles marked.

    The percentiles are the exact ones of the summary; only the curves are thinned.
    """
    times, figures = Latencies.of(result), latency_figures(result)
    gaps, weights = _gap_points(result)
    tpot = times.tpot_s()
    curves = [
        ("ITL", "inter-token latency", look.ORANGE, _share_curve(gaps, weights)),
        ("TPOT", "time per output token", look.GREEN, _share_curve(tpot)),
        ("TTFT", "time to first token", look.BLUE, _share_curve(times.ttft / PS_PER_S)),
        ("E2E", "arrival to last token", look.PURPLE, _share_curve(times.e2e / PS_PER_S)),
    ]
    first = figures["ttft_s"]
    figure = look.slide(
        f"Half of the requests have their first token within {seconds_text(first['p50'])}, "
        f"99% within {seconds_text(first['p99'])}",
        f"{times.ttft.size:,} finished requests; circles mark p50, p90 and p99, dotted lines the service level",
    )
    axes, table = figure.subplots(1, 2, width_ratios=(2.9, 1), gridspec_kw={"wspace": 0.06})
    table.set_axis_off()
    table.set(xlim=(0, 1), ylim=(0, 1))
    columns = (0.46, 0.76, 1.06)
    for right, head in zip(columns, ("p50", "p90", "p99"), strict=True):
        table.text(right, 0.98, head, ha="right", va="top", color=look.MUTED)
    lowest = min(float(curve[0][0]) for *_, curve in curves if curve is not None)
    highest = max(float(curve[0][-1]) for *_, curve in curves if curve is not None)
    for number, (short, long, colour, curve) in enumerate(curves):
        top = 0.9 - 0.14 * number
        table.text(-0.04, top, short, color=colour, fontweight="bold", fontsize=13, va="top")
        table.text(-0.04, top - 0.05, long, color=look.MUTED, fontsize=11, va="top")
        if curve is None:
            table.text(columns[-1], top, "none", ha="right", va="top")
            continue
        x, share = curve
        axes.step(x, share, where="post", color=colour)
        levels = [figures[f"{short.lower()}_s"][name] for name in ("p50", "p90", "p99")]
        axes.plot(
            levels,
            (0.5, 0.9, 0.99),
            linestyle="none",
            marker="o",
            markersize=7,
            markerfacecolor="white",
            markeredgecolor=colour,
            markeredgewidth=2,
        )
        for right, level in zip(columns, levels, strict=True):
            table.text(right, top, seconds_text(level), ha="right", va="top")
    for limit, colour, name in (
        (engine.slo_ttft_s, look.BLUE, "TTFT"),
        (engine.slo_tpot_s, look.GREEN, "TPOT"),
    ):
        if lowest / 4 <= limit <= highest * 4:
            axes.axvline(limit, color=colour, linestyle=":", linewidth=1.6)
            axes.text(
                limit,
                1.01,
                f"{name} ≤ {seconds_text(limit)}",
                transform=axes.get_xaxis_transform(),
                color=colour,
                fontsize=11,
                ha="center",
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("latency (log scale)")
    axes.set_ylabel("share that took at most this long")
    return figure
