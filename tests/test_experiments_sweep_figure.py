"""The figure of a sweep: what is drawn across, which lines there are, and that they are where the figures are."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
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
    assert not np.concatenate([np.asarray(line.get_xdata()) for line in none.lines]).size
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lru", "fifo"]
    assert legend.get_title().get_text() == "policy"


def test_the_headline_says_where_the_first_metric_is_greatest() -> None:
    assert headline(FOUND, "hits") == "hits 2 to 5, greatest at policy lru, tokens_per_block 16"
    assert headline({(("a", "1"),): [[2.0]], (("a", "2"),): [[2.0]]}, "hits") == "hits is 2 everywhere"
    assert headline({(("a", "1"),): [[None]]}, "hits") == "hits has no value anywhere"


def test_what_would_be_too_many_lines_is_not_drawn(tmp_path: Path) -> None:
    many = {
        (("a", str(a)), ("b", str(b))): [[1.0]] for a in range(MOST_LINES + 2) for b in range(MOST_LINES + 1)
    }
    few = dict(list(many.items())[: MOST_LINES + 1])
    config = sweep.Config(tmp_path, metrics=("hits",))
    assert "sweep.png" in sweep.draw_figure(few, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.png", "sweep.svg"]
    assert "more than 24 lines" in sweep.draw_figure(many, config)
    assert not list(tmp_path.iterdir())  # lest it be taken for this sweep's
    assert sweep.draw_figure({(): [[1.0]]}, config) == ""
