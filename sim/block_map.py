"""The block map: every block of the pool over time, and who held it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sim import style as look
from sim.distributions import Ints
from sim.metrics import int_column
from sim.quantities import rough_percent_text
from sim.records import CACHED, FREE, SHARED, BlockMap, RunResult
from sim.request import PS_PER_S

_PANELS = 4
_ROWS = 300
_COLUMNS = 960


def _on_a_grid(result: RunResult, found: BlockMap, extent_ps: tuple[int, int]) -> tuple[Ints, Ints]:
    """Return (block ids [rows], owners [rows, columns]) at evenly spaced moments of an interval.

    A moment shows the last sample before it; but between steps, when nothing runs, nobody holds a block. Rows are
    every n-th watched block: few enough to see, with shares as they are in the whole.
    """
    every = -(-found.block_ids.size // _ROWS)
    rows = np.arange(0, found.block_ids.size, every)
    moments = np.linspace(*extent_ps, _COLUMNS, endpoint=False)
    sample = np.maximum(np.searchsorted(found.times_ps, moments, side="right") - 1, 0)
    owners: Ints = found.owners[np.ix_(sample, rows)].T.copy()
    starts, ends = (int_column(result.timeline, name) for name in ("start_ps", "end_ps"))
    if starts.size:
        stretch = np.searchsorted(starts, moments, side="right") - 1
        idle = (stretch < 0) | (moments >= ends[np.maximum(stretch, 0)])
        released = idle & ((owners >= 0) | (owners == SHARED))
        # No sample was taken then. With reuse, all but a sequence's last block stays behind as cache.
        owners[released] = CACHED if int_column(result.timeline, "evictable_blocks").any() else FREE
    return found.block_ids[rows], owners


def _extent_ps(results: Sequence[RunResult]) -> tuple[int, int]:
    """Return when the first sample was taken, and when the last step or sample was over."""
    samples = [int(at) for result in results if result.block_map for at in result.block_map.times_ps[[0, -1]]]
    ends = [
        int(int_column(result.timeline, "end_ps")[-1]) for result in results if len(result.timeline["end_ps"])
    ]
    begin = min(samples)
    return begin, max(*samples, *ends, begin + 1)


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


def has_block_map(result: RunResult) -> bool:
    """Return whether the run looked at a pool at least once."""
    return bool(_mapped(result))


def _mapped(result: RunResult) -> dict[int, RunResult]:
    """Return the results that have a map, by replica: up to _PANELS, of many those evenly between first and last."""
    parts = result.replicas or (result,)
    mapped = [
        number
        for number, part in enumerate(parts)
        if part.block_map is not None and part.block_map.times_ps.size
    ]
    shown = np.linspace(0, len(mapped) - 1, min(_PANELS, len(mapped))).round().astype(int)
    return {mapped[at]: parts[mapped[at]] for at in shown}


def block_map(result: RunResult) -> Figure:
    """Draw who holds which block of the pool over time; of several replicas, a panel each, up to _PANELS of them.

    Needs `result.block_map`, or that of its replicas. Raises ValueError if the run kept none.
    """
    parts = _mapped(result)
    if not parts:
        raise ValueError("block_map (None) must be kept by the run: block_map_samples must be positive")
    extent_ps = _extent_ps(list(parts.values()))
    maps = []
    for part in parts.values():
        assert part.block_map is not None
        maps.append(_on_a_grid(part, part.block_map, extent_ps))
    figure = look.slide(
        _title(
            np.concatenate([owners for _, owners in maps]), "the pools" if result.replicas else "the pool"
        ),
        _subtitle(result, maps[0][0], list(parts)),
    )
    boards = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    admit_ps = int_column(result.requests, "admit_ps")
    extent_s = (extent_ps[0] / PS_PER_S, extent_ps[1] / PS_PER_S)
    for board, number, (block_ids, owners) in zip(boards, parts, maps, strict=True):
        board.imshow(
            _colours(owners, admit_ps),
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            extent=(*extent_s, -0.5, block_ids.size - 0.5),
        )
        board.grid(False)
        numbers = _round_numbers(block_ids, 6 if len(maps) == 1 else 3)
        places = np.interp(numbers, block_ids, np.arange(block_ids.size))
        board.set_yticks(places, [f"{block_id:,}" for block_id in numbers])
        board.set_ylabel("block id" if not result.replicas else f"replica {number}")
        for side in ("top", "right"):
            board.spines[side].set_visible(True)
    boards[-1].set_xlabel("simulated time (s)")
    boards[-1].set_xlim(*extent_s)
    _legend(boards[0])
    return figure


def _round_numbers(block_ids: Ints, at_most: int) -> Ints:
    """Return block ids to write beside an axis: round ones between the first and the last, drawn or not."""
    first, last = int(block_ids[0]), int(block_ids[-1])
    locator = MaxNLocator(at_most, steps=[1, 2, 5, 10], integer=True)
    numbers = np.unique(np.rint(locator.tick_values(first, last)).astype(np.int64))
    return numbers[(numbers >= first) & (numbers <= last)]


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


def _title(owners: Ints, pools: str = "the pool") -> str:
    shared, cached = (float((owners == state).mean()) for state in (SHARED, CACHED))
    held = float((owners >= 0).mean()) + shared
    parts = [f"Requests hold {rough_percent_text(held)} of {pools}"]
    if shared >= 0.0005:
        parts.append(f"{rough_percent_text(shared)} is shared")
    if cached >= 0.0005:
        parts.append(f"{rough_percent_text(cached)} waits as cache")
    return ", ".join(parts)


def _subtitle(result: RunResult, block_ids: Ints, replicas: list[int]) -> str:
    cache, whose, pool = result.cache, "", f"{result.cache.num_blocks:,}"
    num_blocks = cache.num_blocks
    if result.replicas:
        num_blocks //= len(result.replicas)
        pool = f"each replica's {num_blocks:,}"
        if len(replicas) < len(result.replicas):
            whose = f", {len(replicas)} of {len(result.replicas)} replicas"
    drawn = f"all {pool}" if block_ids.size == num_blocks else f"{block_ids.size:,} of {pool}"
    size = cache.tokens_per_block
    return f"Each line is a block of {size} tokens ({drawn} blocks{whose}); shares are means over time"
