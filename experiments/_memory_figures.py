"""The two figures of memory_savings: where slots go over time, and how many requests share a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from experiments._serving import Recording
from sim import style
from sim.quantities import rough_percent_text
from sim.request import PS_PER_S

if TYPE_CHECKING:
    from experiments.memory_savings import Comparison

LEGEND_MARGIN = 1.25 / style.SLIDE[1]
"""Room below the axes, as a share of the slide's height, for their labels and a legend."""

LAYERS = {
    "tokens": (style.BLUE, "token state"),
    "reserved": (style.SKY, "reserved, used later"),
    "internal": (style.ORANGE, "internal: reserved, never used"),
    "external": (style.CACHED_GREY, "external: rounding and holes"),
}


def _binned(recording: Recording, column: str, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a column's time-weighted mean in each bin between `edges` (ps), as a share of the memory.

    The recording must have no idle gaps, as when all requests are there from the start.
    """
    ends = recording.columns["end_ps"].astype(np.float64)
    lasts = ends - recording.columns["start_ps"]
    area = np.concatenate(([0.0], np.cumsum(recording.columns[column] * lasts)))
    moments = np.concatenate(([0.0], ends))
    means: NDArray[np.float64] = np.diff(np.interp(edges, moments, area)) / np.diff(edges)
    return means / recording.num_slots


def draw_over_time(comparison: Comparison) -> Figure:
    """Draw, a panel a memory, how its slots divide over time when all requests wait from the start."""
    recordings = comparison.at_once
    best, worst = recordings[-1], recordings[0]
    # Until the queue of the fastest memory is empty: then all of them are short of memory.
    end = min(
        float(r.columns["end_ps"][np.nonzero(r.columns["waiting"])[0]].max(initial=0)) for r in recordings
    )
    end = end or min(float(r.columns["end_ps"][-1]) for r in recordings)
    edges = np.linspace(0, end, 101)
    seconds = (edges[1:] + edges[:-1]) / 2 / PS_PER_S
    if np.isfinite(best.share("tokens")):
        title = (
            f"Paging keeps {rough_percent_text(best.share('tokens'))} of the KV memory in use; "
            f"reserving the maximum, {rough_percent_text(worst.share('tokens'))}"
        )
    else:
        title = "The paged memory is larger than this workload needs: nobody waits for it"
    figure = style.slide(
        title,
        f"{comparison.workload.name}, all requests there from the start, {best.num_slots:,} slots; "
        "percentages: token state, mean while requests wait",
    )
    figure.subplots_adjust(bottom=LEGEND_MARGIN, wspace=0.07)
    panels = figure.subplots(1, len(recordings), sharex=True, sharey=True)
    for axes, recording in zip(panels, recordings, strict=True):
        layers = [_binned(recording, name, edges) for name in LAYERS]
        axes.stackplot(seconds, layers, colors=[colour for colour, _ in LAYERS.values()], linewidth=0)
        axes.set_title(recording.name, fontsize=14, fontweight="bold", loc="left")
        axes.set(xlim=(0, seconds[-1]), ylim=(0, 1))
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(3, prune="upper"))
        share = recording.share("tokens")
        if not np.isfinite(share):
            continue
        axes.text(
            0.5,
            share / 2,
            rough_percent_text(share),
            transform=axes.get_yaxis_transform(),
            color="white",
            fontsize=22,
            fontweight="bold",
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=5, foreground=style.BLUE)],
        )
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("share of the KV memory")
    panels[len(panels) // 2].set_xlabel("simulated time (s)")
    handles = [Patch(color=colour, label=label) for colour, label in LAYERS.values()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles))
    return figure


def draw_batched(comparisons: list[Comparison]) -> Figure:
    """Draw how many requests are batched together under each memory, the paper's numbers marked."""
    from experiments.memory_savings import batched

    names = [recording.name for recording in comparisons[0].at_once]
    means = [[batched(recording) for recording in c.at_once] for c in comparisons]
    gains = " and ".join(f"{row[-1] / row[0]:.1f}×" for row in means)
    figure = style.slide(
        f"Paging batches {gains} as many requests as reserving the maximum",
        f"requests that run together in {comparisons[0].at_once[0].num_slots:,} slots, while others wait",
    )
    width, _ = style.SLIDE
    figure.subplots_adjust(left=1.75 / width, bottom=LEGEND_MARGIN, wspace=0.4)
    panels = np.atleast_1d(figure.subplots(1, len(comparisons)))
    marked = False
    for axes, comparison, row in zip(panels, comparisons, means, strict=True):
        places = np.arange(len(names))[::-1]
        colours = [style.BLUE if name == "paged" else style.CACHED_GREY for name in names]
        axes.barh(places, row, color=colours, height=0.62)
        paper = comparison.workload.published.batched if comparison.workload.published else {}
        for place, name, value in zip(places, names, row, strict=True):
            axes.text(value, place, f" {value:.1f}", va="center", fontsize=13, fontweight="bold")
            if name in paper:
                axes.plot(
                    paper[name],
                    place - 0.4,
                    marker="^",
                    markersize=10,
                    color=style.VERMILLION,
                    clip_on=False,
                    linestyle="none",
                )
                marked = True
        axes.set_yticks(places, names, fontsize=13)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.margins(x=0.16)
        prompt, output = comparison.workload.mean_tokens
        axes.set_title(
            f"{comparison.workload.name}: {prompt:.0f} tokens in, {output:.0f} out",
            fontsize=14,
            fontweight="bold",
            loc="left",
        )
        axes.set_xlabel("requests in the batch, mean")
    if marked:
        label = "PagedAttention paper, figure 13 (at its own request rate)"
        marker = Line2D(
            [], [], marker="^", markersize=10, color=style.VERMILLION, linestyle="none", label=label
        )
        figure.legend(handles=[marker], loc="lower center")
    return figure
