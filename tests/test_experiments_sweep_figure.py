"""The figure of a sweep: what is drawn across, which lines there are, and that they are where the figures are."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from experiments.tools import sweep
from experiments.tools._sweep_figure import MOST_LINES, Found, choose_axis, draw, headline, lines_of
from sim import style

FOUND: Found = {
    (("policy", policy), ("tokens_per_block", size)): [[value, value + 2.0], [None, None]]
    for policy, size, value in [
        ("lru", "128", 1.0),
        ("lru", "16", 4.0),
        ("fifo", "128", 2.0),
        ("fifo", "16", 3.0),
    ]
}


def test_numbers_go_across_in_their_order_and_the_other_flags_make_lines() -> None:
    axis = choose_axis(FOUND)
    assert (axis.flag, axis.places, axis.is_logarithmic) == ("tokens_per_block", {"128": 128, "16": 16}, True)
    lines = lines_of(FOUND, axis)
    assert [[dict(values)["tokens_per_block"] for values in line] for line in lines.values()] == [
        ["16", "128"]
    ] * 2
    assert list(lines) == [(("policy", "lru"),), (("policy", "fifo"),)]


@pytest.mark.parametrize(
    ("given", "flag", "is_number"),
    [
        ({"a": ["1", "2"], "b": ["1", "2", "3"]}, "b", True),
        ({"policy": ["lru", "fifo", "lfu"], "a": ["1", "2"]}, "a", True),
        ({"policy": ["lru", "fifo"], "on": ["True", "False"]}, "policy", False),
        ({"a": ["1", "1.0"], "b": ["x"]}, "a", False),  # equal numbers would stand on one another
        ({"a": ["nan", "2"], "b": ["x"]}, "a", False),
    ],
)
def test_the_flag_with_most_numbers_is_drawn_across(
    given: dict[str, list[str]], flag: str, *, is_number: bool
) -> None:
    found = {
        values: [[1.0]]
        for values in product(*([(name, text) for text in texts] for name, texts in given.items()))
    }
    axis = choose_axis(found)
    assert (axis.flag, axis.is_number) == (flag, is_number)


def test_lines_go_through_the_means_and_every_seed_has_a_mark() -> None:
    with style.styled():
        figure = draw(FOUND, ["one", "none"])
    assert figure is not None
    one, none = figure.axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in one.lines]
    assert ([16.0, 128.0], [5.0, 2.0]) in drawn
    assert ([16.0, 128.0], [4.0, 3.0]) in drawn
    assert ([16.0, 16.0], [4.0, 6.0]) in drawn
    assert len(drawn) == 2 + 4
    assert one.get_ylim()[0] == 0
    assert one.get_ylim()[1] > 6
    assert [label.get_text() for label in one.get_xticklabels()] == ["128", "16"]
    assert not none.lines
    assert [text.get_text() for text in none.texts] == ["no value anywhere"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lru", "fifo"]
    assert legend.get_title().get_text() == "policy"


def points(sizes: dict[str, dict[str, list[float | None]]]) -> Found:
    """Return one metric for each block size and policy."""
    return {
        (("size", size), ("policy", policy)): [figures]
        for size, policies in sizes.items()
        for policy, figures in policies.items()
    }


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            points({"16": {"lru": [4.0], "fifo": [3.0]}, "64": {"lru": [1.0], "fifo": [2.0]}}),
            "hits 1 to 4, greatest at size 16, policy lru",
        ),
        # Both policies are as good: only the block size matters.
        (
            points({"16": {"lru": [4.0], "fifo": [4.0]}, "64": {"lru": [1.0], "fifo": [2.0]}}),
            "hits 1 to 4, greatest at size 16",
        ),
        (
            points(
                {
                    size: {"lru": [value], "fifo": [value]}
                    for size, value in zip("123", (4, 4, 1), strict=True)
                }
            ),
            "hits 1 to 4, greatest at size 1 or 2",
        ),
        (
            points({"1": {"a": [4.0], "b": [4.0]}, "2": {"a": [4.0], "b": [1.0]}}),
            "hits 1 to 4, greatest at 3 of 4 combinations",
        ),
        (
            points(
                {"1": {"a": [4.0], "b": [4.0]}, "2": {"a": [4.0], "b": [1.0]}, "3": {"a": [1.0], "b": [1.0]}}
            ),
            "hits 1 to 4, greatest at 3 of 6 combinations",
        ),
        (
            {
                tuple(zip("abc", values, strict=True)): [
                    [float(values[0] == "1" and values != ("1", "2", "2"))]
                ]
                for values in product("12", repeat=3)
            },
            "hits 0 to 1, greatest at 3 of 8 combinations, all with a 1",
        ),
        # Means differ by less than the intervals do.
        (
            points({"16": {"lru": [1.0, 3.0], "fifo": [1.1, 3.0]}}),
            "hits 2 to 2.05, no difference beyond the intervals",
        ),
        (
            points(
                {
                    "16": {"lru": [4.0, 4.1], "fifo": [4.0, 4.12]},
                    "64": {"lru": [1.0, 1.0], "fifo": [1.0, 1.0]},
                }
            ),
            "hits 1 to 4.06, greatest (within intervals) at size 16",
        ),
        # Of a combination with a single value, nobody knows the interval.
        (
            points({"16": {"lru": [4.0, 4.0], "fifo": [1.0, None]}}),
            "hits 1 to 4, no difference beyond the intervals",
        ),
        (
            points({"16": {"lru": [4.0], "fifo": [None]}, "64": {"lru": [1.0]}}),
            "hits 1 to 4, greatest at size 16",
        ),
        (points({"16": {"lru": [0.50004], "fifo": [0.50001]}}), "hits is 0.5 everywhere"),
        (points({"16": {"lru": [None]}}), "hits has no value anywhere"),
    ],
)
def test_the_headline_names_what_the_greatest_share_and_no_more(found: Found, says: str) -> None:
    assert headline(found, "hits") == says


def test_a_line_under_others_is_wider_than_they_are() -> None:
    found = {
        (("size", size), ("policy", policy)): [[float(value)]]
        for policy, values in {"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 9, 5), "d": (1, 2, 4)}.items()
        for size, value in zip("123", values, strict=True)
    }
    with style.styled():
        figure = draw(found, ["hits"])
    assert figure is not None
    (axes,) = figure.axes
    # b and d cover a, d covers b; c meets the others in one place only.
    a, b, c, d = ((line.get_linewidth(), line.get_markersize()) for line in axes.lines)
    assert a > b > c == d
    assert "wide lines lie under others" in style.words(figure)
    assert [handle.get_linewidth() for handle in figure.legends[0].get_lines()] == [d[0]] * 4


def test_marks_of_what_was_overloaded_are_hollow() -> None:
    crowded = (("policy", "lru"), ("tokens_per_block", "16"))
    with style.styled():
        figure = draw(FOUND, ["one"], {crowded})
        plain = draw(FOUND, ["one"])
    assert figure is not None
    assert plain is not None
    (one,) = figure.axes
    white = [
        (list(line.get_xdata()), list(line.get_ydata())) for line in one.lines if line.get_color() == "white"
    ]
    assert white == [([16.0], [5.0])]
    assert any(text.get_text().endswith("; hollow: overloaded") for text in figure.texts)
    assert not any("hollow" in text.get_text() for text in plain.texts)


def test_a_panel_of_equal_figures_says_so_and_has_no_scale() -> None:
    found = {values: [[0.0, 0.0], [5.0, 6.0]] for values in FOUND}
    with style.styled():
        figure = draw(found, ["preemptions", "hits"])
    assert figure is not None
    same, hits = figure.axes
    assert [text.get_text() for text in same.texts] == ["0 everywhere"]
    assert not same.lines
    assert not len(same.get_yticks())
    assert [label.get_text() for label in same.get_xticklabels()] == ["128", "16"]
    assert same.get_xlim() == pytest.approx(hits.get_xlim())
    assert len(hits.get_yticks())


def test_what_would_be_too_many_lines_is_not_drawn(tmp_path: Path) -> None:
    many = {
        (("a", str(a)), ("b", str(b))): [[1.0]] for a in range(MOST_LINES + 2) for b in range(MOST_LINES + 1)
    }
    few = dict(list(many.items())[: MOST_LINES + 1])
    config = sweep.Config(tmp_path, metrics=("hits",))
    assert "sweep.png" in sweep.draw_figure(few, config, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.png", "sweep.svg"]
    assert "more than 24 lines" in sweep.draw_figure(many, config, ())
    assert not list(tmp_path.iterdir())  # lest it be taken for this sweep's
    assert sweep.draw_figure({(): [[1.0]]}, config, ()) == ""
