"""The pools and queues of several replicas over time."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from sim import style as look
from sim.binning import binned
from sim.metrics import int_column
from sim.quantities import rough_percent_text
from sim.records import Columns, RunResult
from sim.request import PS_PER_S

Floats = NDArray[np.float64]

_BINS = 480


def replica_utilization(result: RunResult) -> Figure:
    """Draw, over time, what share of each replica's pool its sequences hold, and how many run and wait in all.

    Where prefill and decode are apart, the axis and the headline say which is which. Needs `result.replicas`, of
    which one or more took a step.
    """
    parts = result.replicas
    end = float(int_column(result.timeline, "end_ps").max())
    edges = np.linspace(0.0, end, _BINS + 1)
    shares = np.stack([_referenced(part, edges) for part in parts])
    running, waiting = (
        sum((_binned(part.timeline, name, edges) for part in parts), np.zeros(_BINS))
        for name in ("running", "waiting")
    )

    figure = look.slide(_title(result, shares.mean(axis=1)), _subtitle(result))
    pools, queue = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    seconds = end / PS_PER_S
    image = pools.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        origin="upper",
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, seconds, len(parts) - 0.5, -0.5),
    )
    pools.grid(False)
    pools.yaxis.set_major_locator(MaxNLocator(integer=True))
    if result.prefill_replicas:
        pools.yaxis.set_major_formatter(FuncFormatter(lambda number, _: _name(result, number)))
        pools.tick_params(axis="y", labelsize=11)
        pools.axhline(result.prefill_replicas - 0.5, color=look.INK, linewidth=1.2)
    else:
        pools.set_ylabel("replica")
    scale = pools.inset_axes((0.7, 1.05, 0.3, 0.035))
    figure.colorbar(image, cax=scale, orientation="horizontal", format=PercentFormatter(1.0, decimals=0))
    scale.xaxis.set_ticks_position("top")
    pools.text(
        0.69,
        1.068,
        "share of its blocks in use",
        transform=pools.transAxes,
        ha="right",
        va="center",
        fontsize=11,
    )

    middle = (edges[1:] + edges[:-1]) / 2 / PS_PER_S
    queue.plot(middle, running, color=look.GREEN, label="running")
    queue.plot(middle, waiting, color=look.ORANGE, label="waiting")
    queue.set_ylim(bottom=0)
    queue.set_ylabel("sequences, of all")
    queue.set_xlabel("simulated time (s)")
    queue.set_xlim(0, seconds)
    queue.legend(loc="lower right", bbox_to_anchor=(1.0, 1.03), ncols=2, borderaxespad=0.2, handlelength=1.4)
    return figure


def _binned(rows: Columns, name: str, edges: Floats) -> Floats:
    return binned(rows, int_column(rows, name).astype(np.float64), 0.0, edges)


def _referenced(part: RunResult, edges: Floats) -> Floats:
    """Return the mean share of a replica's blocks that sequences hold, in each bin."""
    first, last = (
        int_column(part.timeline, name).astype(np.float64)
        for name in ("referenced_blocks_first", "referenced_blocks")
    )
    return binned(part.timeline, (first + last) / 2, 0.0, edges) / part.cache.num_blocks


def _name(result: RunResult, number: float) -> str:
    """Return what the axis calls a replica whose role is known; beyond the replicas, nothing."""
    if not 0 <= number < len(result.replicas):
        return ""
    return f"{'prefill' if number < result.prefill_replicas else 'decode'} {number:.0f}"


def _title(result: RunResult, means: Floats) -> str:
    apart = result.prefill_replicas
    if not apart:
        return f"Sequences hold {_span(means)} of a replica's pool on average"
    prefill, decode = _span(means[:apart]), _span(means[apart:])
    return f"Sequences hold {prefill} of a prefill replica's pool on average, {decode} of a decode replica's"


def _span(means: Floats) -> str:
    least, most = (rough_percent_text(float(mean)) for mean in (means.min(), means.max()))
    return least if least == most else f"{least} to {most}"


def _subtitle(result: RunResult) -> str:
    cache, replicas, apart = result.cache, len(result.replicas), result.prefill_replicas
    hit = (
        f", {rough_percent_text(cache.hit_tokens / cache.query_tokens)} of prompt tokens hit"
        if cache.hit_tokens
        else ""
    )
    number = f"{apart} prefill and {replicas - apart} decode replicas" if apart else f"{replicas} replicas"
    return f"{number}, {cache.num_blocks // replicas:,} blocks of {cache.tokens_per_block} tokens each{hit}"
