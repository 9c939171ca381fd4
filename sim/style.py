"""The look that all figures share: one style sheet, one palette, one way to save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#5c6673", "#e3e6ea"
# Okabe and Ito (2008): distinct under the common forms of colour blindness.
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
)
# Paul Tol's "light" qualitative scheme (SRON/EPS/TN/09-002), in an order that keeps neighbours apart: light, so
# that what is shared can stand out in ink.
OWNERS = ("#77aadd", "#ee8866", "#44bb99", "#eedd88", "#99ddff", "#ffaabb", "#bbcc33")
CACHED_GREY, FREE_WHITE, SHARED_INK = "#d5d9df", "#ffffff", "#23134a"

SLIDE = (12.8, 7.2)  # inches, 16:9; at 150 dots per inch 1920 × 1080


def style() -> dict[str, Any]:
    """Return the style sheet, as matplotlib parameters."""
    return {
        "figure.dpi": 150,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
        "font.size": 12,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.labelsize": 12,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 11,
        "svg.hashsalt": "paged-kv-lab",  # otherwise every file has its own random ids
        "svg.fonttype": "path",
        "path.simplify": True,
    }


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style sheet to figures made and saved inside, and to nothing else."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(cast(Any, style()))
        yield


def slide(title: str, subtitle: str, size: tuple[float, float] = SLIDE) -> Figure:
    """Return an empty slide-sized figure with a headline, the finding, and a line that says what is drawn."""
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    width, height = size
    margin = 0.35 / width
    size_in_points = min(18.0, 18.0 * 76 / max(1, len(title)))  # long findings shrink to the slide's width
    figure.text(margin, 1 - 0.32 / height, title, fontsize=size_in_points, fontweight="bold", va="top")
    figure.text(margin, 1 - 0.74 / height, subtitle, fontsize=12, color=MUTED, va="top")
    # Margins are set by hand: matplotlib's layout engines solve for them in an order that differs from run to
    # run, and the last digits with it.
    figure.subplots_adjust(
        left=1.05 / width, right=1 - 0.4 / width, bottom=0.75 / height, top=1 - 1.45 / height, hspace=0.3
    )
    return figure


def words(figure: Figure) -> str:
    """Return what a figure says in words: headline, subtitle, and the texts in its panels, a line each."""
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return "\n".join(text.get_text() for text in texts)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths; the bytes hold no date and no random ids.

    The PNG has the figure's words as its description, for whoever cannot see it.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    with styled():
        figure.savefig(png, metadata={"Software": None, "Description": words(figure)})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]
