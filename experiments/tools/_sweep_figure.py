"""The figure of a sweep: a panel a metric, the flag with most values across, a line for each choice of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sim import style

Values: TypeAlias = tuple[tuple[str, str], ...]
"""What was given to each flag that varies: (flag, value)."""
Found: TypeAlias = Mapping[Values, Sequence[Sequence[float | None]]]
"""For each combination and each metric, the figures of all seeds."""

MOST_LINES = 24
"""More than these nobody can tell apart."""

_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.VERMILLION, style.SKY, style.PURPLE)
_MARKERS = ("o", "s", "^", "D")
_LOGARITHMIC = 8
"""From this ratio of the greatest value to the least on, values stand at equal ratios."""
_SPREAD = 0.5
"""Of the way from one value to the next: where no line joins them, marks of different lines stand beside each other."""


@dataclass(frozen=True)
class Axis:
    """The flag that is drawn across, where its values stand, and whether values between them make sense."""

    flag: str
    places: dict[str, float]
    is_number: bool

    @property
    def is_logarithmic(self) -> bool:
        """Return whether equal ratios are drawn equally long."""
        least, most = min(self.places.values()), max(self.places.values())
        return self.is_number and least > 0 and most / least >= _LOGARITHMIC


def choose_axis(found: Found) -> Axis:
    """Return the flag to draw across: of those with numbers, or else of all, the first that has most values."""
    given: dict[str, dict[str, None]] = {}
    for values in found:
        for flag, value in values:
            given.setdefault(flag, {})[value] = None
    axes = [_axis(flag, list(texts)) for flag, texts in given.items() if len(texts) > 1]
    return max(axes, key=lambda axis: (axis.is_number, len(axis.places)))


def _axis(flag: str, texts: list[str]) -> Axis:
    try:
        numbers = {text: float(text) for text in texts}
    except ValueError:
        numbers = {}
    if numbers and np.isfinite(list(numbers.values())).all() and len(set(numbers.values())) == len(texts):
        return Axis(flag, numbers, True)
    return Axis(flag, {text: float(place) for place, text in enumerate(texts)}, False)


def lines_of(found: Found, axis: Axis) -> dict[Values, list[Values]]:
    """Return the combinations that make a line, in the order of the axis, by what they have in common."""
    lines: dict[Values, list[Values]] = {}
    for values in found:
        lines.setdefault(tuple(each for each in values if each[0] != axis.flag), []).append(values)
    for line in lines.values():
        line.sort(key=lambda values: axis.places[dict(values)[axis.flag]])
    return lines


def _names(values: Values) -> str:
    return ", ".join(f"{flag} {value}" for flag, value in values)


def headline(found: Found, metric: str) -> str:
    """Return the finding: between which means a metric lies, and where it is greatest."""
    means = {values: mean(known) for values, rows in found.items() if (known := _known(rows[0]))}
    if not means:
        return f"{metric} has no value anywhere"
    least, most = min(means.values()), max(means.values())
    if least == most:
        return f"{metric} is {most:.4g} everywhere"
    best = next(values for values, value in means.items() if value == most)
    return f"{metric} {least:.4g} to {most:.4g}, greatest at {_names(best)}"


def _known(figures: Sequence[float | None]) -> list[float]:
    return [figure for figure in figures if figure is not None]


def draw(found: Found, metrics: Sequence[str]) -> Figure | None:
    """Return the figure; None where nothing varies, or there would be more than MOST_LINES lines."""
    if len(found) < 2:
        return None
    axis = choose_axis(found)
    lines = lines_of(found, axis)
    if len(lines) > MOST_LINES:
        return None
    seeds = max(len(rows[0]) for rows in found.values())
    marks = f"means over {seeds} seeds; small marks: single seeds" if seeds > 1 else "a run each"
    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    legend_rows = -(-len(lines) // _columns_of_legend(lines)) if len(lines) > 1 else 0
    width, height = style.SLIDE[0], 2.6 + 3.2 * rows + 0.28 * legend_rows
    figure = style.slide(headline(found, metrics[0]), f"{len(found)} combinations, {marks}", (width, height))
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.35 / width,
        top=1 - 1.5 / height,
        bottom=(0.85 + 0.28 * legend_rows) / height,
        wspace=0.28,
        hspace=0.5,
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, metric in enumerate(metrics):
        axes = panels[place]
        axes.set_title(metric, fontsize=13, fontweight="bold", loc="left")
        _set_across(axes, axis)
        for number, line in enumerate(lines.values()):
            aside = 0.0 if axis.is_number else _SPREAD * ((number + 0.5) / len(lines) - 0.5)
            points = [(axis.places[dict(values)[axis.flag]] + aside, found[values][place]) for values in line]
            _draw_line(axes, points, number, "-" if axis.is_number else "")
        highest = max((figure for each in found.values() for figure in _known(each[place])), default=0)
        axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    if len(lines) > 1:
        _add_legend(figure, lines)
    return figure


def _set_across(axes: Axes, axis: Axis) -> None:
    if axis.is_logarithmic:
        axes.set_xscale("log")
    places = list(axis.places.values())
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(axis.places))
    if len(places) > 6 or sum(map(len, axis.places)) > 40:
        axes.tick_params("x", labelsize=9, rotation=30)
    axes.set_xlabel(axis.flag)
    if not axis.is_number:
        axes.set_xlim(-0.5, len(places) - 0.5)


def _look(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]


def _draw_line(
    axes: Axes, points: Sequence[tuple[float, Sequence[float | None]]], number: int, joined: str
) -> None:
    colour, marker = _look(number)
    known = [(place, _known(figures)) for place, figures in points if _known(figures)]
    for place, figures in known:
        if len(figures) > 1:
            axes.plot([place] * len(figures), figures, "_", color=colour, markersize=9, alpha=0.6)
    across, means = [place for place, _ in known], [mean(figures) for _, figures in known]
    axes.plot(across, means, linestyle=joined, marker=marker, color=colour, markersize=6)


def _columns_of_legend(lines: Mapping[Values, object]) -> int:
    longest = max(len(_label(values)) for values in lines)
    return max(1, min(len(lines), 130 // (longest + 6)))


def _label(values: Values) -> str:
    """Return the values alone, if there is a single flag: its name is the legend's title."""
    return values[0][1] if len(values) == 1 else _names(values)


def _add_legend(figure: Figure, lines: Mapping[Values, object]) -> None:
    handles = []
    for number, values in enumerate(lines):
        colour, marker = _look(number)
        handles.append(Line2D([], [], color=colour, marker=marker, label=_label(values)))
    (first, *_) = lines
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=_columns_of_legend(lines),
        title=first[0][0] if len(first) == 1 else None,
        bbox_to_anchor=(0.5, 0.0),
    )
