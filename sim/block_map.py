"""The block map: every block of the pool over time, and who held it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from numpy.typing import NDArray

from sim import style as look
from sim.distributions import Ints
from sim.metrics import int_column
from sim.quantities import rough_percent_text
from sim.records import CACHED, FREE, SHARED, BlockMap, RunResult
from sim.request import PS_PER_S

_ROWS = 300
_COLUMNS = 960


def _on_a_grid(result: RunResult, found: BlockMap) -> tuple[Ints, Ints, tuple[float, float]]:
    """Return (block ids [rows], owners [rows, columns], (start, end) in seconds) at evenly spaced moments.

    A moment shows the last sample before it; but between steps, when nothing runs, nobody holds a block. Rows are
    every n-th watched block: few enough to see, with shares as they are in the whole.
    """
    every = -(-found.block_ids.size // _ROWS)
    rows = np.arange(0, found.block_ids.size, every)
    starts, ends = (int_column(result.timeline, name) for name in ("start_ps", "end_ps"))
    begin = int(found.times_ps[0])
    end = max(int(found.times_ps[-1]), int(ends[-1]) if ends.size else 0, begin + 1)
    moments = np.linspace(begin, end, _COLUMNS, endpoint=False)
    sample = np.maximum(np.searchsorted(found.times_ps, moments, side="right") - 1, 0)
    owners: Ints = found.owners[np.ix_(sample, rows)].T.copy()
    if starts.size:
        stretch = np.searchsorted(starts, moments, side="right") - 1
        idle = (stretch < 0) | (moments >= ends[np.maximum(stretch, 0)])
        released = idle & ((owners >= 0) | (owners == SHARED))
        # No sample was taken then. With reuse, all but a sequence's last block stays behind as cache.
        owners[released] = CACHED if int_column(result.timeline, "evictable_blocks").any() else FREE
    return found.block_ids[rows], owners, (begin / PS_PER_S, end / PS_PER_S)


def _colours(owners: Ints, admit_ps: Ints) -> NDArray[np.float64]:
    """Return an RGB image of owners: requests take the palette's colours in turn, in order of admission."""
    order = np.empty(admit_ps.size, np.int64)
    order[np.argsort(admit_ps, kind="stable")] = np.arange(admit_ps.size)
    palette = np.array([to_rgb(colour) for colour in look.OWNERS])
    image = np.empty((*owners.shape, 3))
    held = owners >= 0
    image[held] = palette[order[owners[held]] % len(palette)]
    for state, colour in (
        (FREE, look.FREE_WHITE),
        (CACHED, look.CACHED_GREY),
        (SHARED, look.SHARED_INK),
    ):
        image[owners == state] = to_rgb(colour)
    return image


def block_map(result: RunResult) -> Figure:
    """Draw who holds which block of the pool over time.

    Needs `result.block_map`. Raises ValueError if the run kept none.
    """
    found = result.block_map
    if found is None or not found.times_ps.size:
        raise ValueError("block_map (None) must be kept by the run: block_map_samples must be positive")
    block_ids, owners, extent = _on_a_grid(result, found)
    figure = look.slide(_title(owners), _subtitle(result, block_ids))
    board = figure.subplots()
    board.imshow(
        _colours(owners, int_column(result.requests, "admit_ps")),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(*extent, -0.5, block_ids.size - 0.5),
    )
    board.grid(False)
    ticks = np.unique(np.linspace(0, block_ids.size - 1, 6).round().astype(int))
    board.set_yticks(ticks, [f"{block_ids[tick]:,}" for tick in ticks])
    board.set_ylabel("block id")
    board.set_xlabel("simulated time (s)")
    board.set_xlim(*extent)
    for side in ("top", "right"):
        board.spines[side].set_visible(True)
    _legend(board)
    return figure


def _legend(axes: Axes) -> None:
    requests = tuple(Patch(facecolor=colour) for colour in look.OWNERS[:6])
    handles: list[Any] = [
        requests,
        Patch(facecolor=look.SHARED_INK),
        Patch(facecolor=look.CACHED_GREY),
        Patch(facecolor="white", edgecolor=look.MUTED, linewidth=0.8),
    ]
    axes.legend(
        handles,
        ["held by one request, a colour each", "shared by several", "cached, evictable", "free"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=4,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.4,
    )


def _title(owners: Ints) -> str:
    shared, cached = (float((owners == state).mean()) for state in (SHARED, CACHED))
    held = float((owners >= 0).mean()) + shared
    parts = [f"Requests hold {rough_percent_text(held)} of the pool"]
    if shared >= 0.0005:
        parts.append(f"{rough_percent_text(shared)} is shared")
    if cached >= 0.0005:
        parts.append(f"{rough_percent_text(cached)} waits as cache")
    return ", ".join(parts)


def _subtitle(result: RunResult, block_ids: Ints) -> str:
    cache = result.cache
    drawn = (
        f"all {cache.num_blocks:,}"
        if block_ids.size == cache.num_blocks
        else f"{block_ids.size:,} of {cache.num_blocks:,}"
    )
    return f"Each line is a block of {cache.tokens_per_block} tokens ({drawn} blocks); shares are means over time"
