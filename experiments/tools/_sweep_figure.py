"""The figure of a sweep: a panel a metric, the flag with most values across, a line for each choice of the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from experiments.tools._intervals import interval
from sim import style

Values: TypeAlias = tuple[tuple[str, str], ...]
"""What was given to each flag that varies: (flag, value)."""
Found: TypeAlias = Mapping[Values, Sequence[Sequence[float | None]]]
"""For each combination and each metric, the figures of all seeds."""

Points: TypeAlias = Sequence[tuple[float, Sequence[float | None], bool]]
"""A line in a panel: (where it stands across, the figures of all seeds, whether any of their runs was overloaded)."""

MOST_LINES = 24
"""More than these nobody can tell apart."""

_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.VERMILLION, style.SKY, style.PURPLE)
_MARKERS = ("o", "s", "^", "D")
_LOGARITHMIC = 8
"""From this ratio of the greatest value to the least on, values stand at equal ratios."""
_NEAR = 0.008
"""Of a panel's height: lines that are closer cover each other."""
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
    """Return the finding: between which means the first metric lies, and where it is greatest.

    Of several seeds, combinations whose intervals overlap the greatest one's are as great; of one, those that read
    alike.
    """
    several = max(len(rows[0]) for rows in found.values()) > 1
    ranges: dict[Values, tuple[float, float]] = {}  # mean and half of its interval
    for values, rows in found.items():
        if known := _known(rows[0]):
            middle, half = interval(known)
            ranges[values] = middle, (math.inf if several else 0.0) if half is None else half
    if not ranges:
        return f"{metric} has no value anywhere"
    most, within = max(ranges.values())
    least, text = min(ranges.values())[0], f"{most:.4g}"
    if f"{least:.4g}" == text:
        return f"{metric} is {text} everywhere"
    best = [
        values
        for values, (middle, half) in ranges.items()
        if f"{middle:.4g}" == text or (several and middle + half >= most - within)
    ]
    span = f"{metric} {least:.4g} to {text}"
    if len(best) == len(ranges):
        return f"{span}, no difference beyond the intervals"
    alike = all(f"{ranges[values][0]:.4g}" == text for values in best)
    return f"{span}, greatest {'' if alike else '(within intervals) '}at {_where(best, list(ranges))}"


def _where(chosen: Sequence[Values], every: Sequence[Values]) -> str:
    """Name some combinations among all by what tells them from the others: values that matter, of flags that do."""
    parts = []
    for flag, _ in every[0]:
        taken, there = (dict.fromkeys(dict(values)[flag] for values in group) for group in (chosen, every))
        if len(taken) < len(there):
            parts.append((flag, taken))
    if [values for values in every if all(dict(values)[flag] in taken for flag, taken in parts)] == list(
        chosen
    ):
        return ", ".join(f"{flag} {' or '.join(taken)}" for flag, taken in parts)
    shared = [f"{flag} {next(iter(taken))}" for flag, taken in parts if len(taken) == 1]
    return f"{len(chosen)} of {len(every)} combinations" + (
        f", all with {', '.join(shared)}" if shared else ""
    )


def _known(figures: Sequence[float | None]) -> list[float]:
    return [figure for figure in figures if figure is not None]


def draw(found: Found, metrics: Sequence[str], overloaded: Collection[Values] = ()) -> Figure | None:
    """Return the figure; None where nothing varies, or there would be more than MOST_LINES lines.

    The marks of the `overloaded` combinations are hollow.
    """
    if len(found) < 2:
        return None
    axis = choose_axis(found)
    lines = lines_of(found, axis)
    if len(lines) > MOST_LINES:
        return None
    seeds = max(len(rows[0]) for rows in found.values())
    panel_lines = [_points(found, lines, axis, place, overloaded) for place in range(len(metrics))]
    covers = [_covers(drawn) for drawn in panel_lines]
    marks = f"means over {seeds} seeds; small marks: single seeds" if seeds > 1 else "a run each"
    if any(map(any, covers)):
        marks += "; wide lines lie under others"
    if any(values in overloaded for values in found):
        marks += "; hollow: overloaded"
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
    for axes, metric, drawn, covered in zip(panels, metrics, panel_lines, covers, strict=False):
        axes.set_title(metric, fontsize=13, fontweight="bold", loc="left")
        _set_across(axes, axis)
        if len(values := _values(drawn)) < 2:
            _say_constant(axes, *values)
            continue
        for number, points in enumerate(drawn):
            _draw_line(axes, points, number, "-" if axis.is_number else "", covered[number])
        axes.set_ylim(0, _top(drawn))
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


def _say_constant(axes: Axes, value: float | None = None) -> None:
    """Say in a panel what there is no need to draw: a figure that is the same everywhere, or that nobody has."""
    text = "no value anywhere" if value is None else f"{value:.4g} everywhere"
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.MUTED)
    axes.set_yticks([])
    places = [float(place) for place in axes.get_xticks()]
    if len(places) > 1 and axes.get_autoscalex_on():  # nothing is drawn that would stretch the axis
        axes.update_datalim([(min(places), 0.0), (max(places), 0.0)], updatey=False)
        axes.autoscale_view(scaley=False)


def _points(
    found: Found,
    lines: Mapping[Values, Sequence[Values]],
    axis: Axis,
    place: int,
    overloaded: Collection[Values],
) -> list[Points]:
    """Return what is to draw of one metric, a line each; marks that no line joins stand beside each other."""
    drawn = []
    for number, line in enumerate(lines.values()):
        aside = 0.0 if axis.is_number else _SPREAD * ((number + 0.5) / len(lines) - 0.5)
        drawn.append(
            [
                (axis.places[dict(values)[axis.flag]] + aside, found[values][place], values in overloaded)
                for values in line
            ]
        )
    return drawn


def _values(drawn: Sequence[Points]) -> set[float]:
    return {value for points in drawn for _, figures, _ in points for value in _known(figures)}


def _top(drawn: Sequence[Points]) -> float:
    """Return where a panel ends: a little above the greatest figure."""
    greatest = max(_values(drawn), default=0.0)
    return 1.08 * greatest if greatest > 0 else 1.0


def _covers(drawn: Sequence[Points]) -> list[int]:
    """Return for each line how many of the later ones lie on it: at two places in a row, or at its only one."""
    near = _NEAR * _top(drawn)
    means = [
        {place: mean(known) for place, figures, _ in points if (known := _known(figures))} for points in drawn
    ]

    def covers(later: dict[float, float], line: dict[float, float]) -> bool:
        alike = [place in later and abs(later[place] - line[place]) < near for place in line]
        return any(map(all, pairwise(alike))) or alike == [True]

    if len(_values(drawn)) < 2:  # nothing is drawn
        return [0] * len(drawn)
    return [sum(covers(later, line) for later in means[number + 1 :]) for number, line in enumerate(means)]


def _draw_line(axes: Axes, points: Points, number: int, joined: str, covered: int) -> None:
    """Draw a line, the wider the more of later ones lie on it, so that it shows on both sides of them."""
    colour, marker = _look(number)
    wider = (
        covered if covered <= 5 else 5 + 0.4 * (covered - 5)
    )  # many: thinner rims, lest they fill the panel
    known = [(place, _known(figures), hollow) for place, figures, hollow in points if _known(figures)]
    for place, figures, _ in known:
        if len(figures) > 1:
            axes.plot(
                [place] * len(figures),
                figures,
                "_",
                color=colour,
                markersize=9 + 5 * wider,
                alpha=0.6,
                zorder=2 - 0.02 * wider,
            )
    across, means = [place for place, _, _ in known], [mean(figures) for _, figures, _ in known]
    size = 6 + 4 * wider
    axes.plot(
        across,
        means,
        linestyle=joined,
        marker=marker,
        color=colour,
        linewidth=2 + 2.5 * wider,
        markersize=size,
        clip_on=False,
    )
    hollow = [place for place, (_, _, overloaded) in enumerate(known) if overloaded]
    if hollow:
        axes.plot(
            [across[place] for place in hollow],
            [means[place] for place in hollow],
            linestyle="",
            marker=marker,
            color="white",
            markersize=size - 3,
            clip_on=False,
        )


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
