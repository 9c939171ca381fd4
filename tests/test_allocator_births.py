"""Births: what a list with a date for each block would say."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from allocator.births import cut_first, drop_last, last, one_by_one
from allocator.lifetimes import Lifetimes
from allocator.prefix import Extent

RUNS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=8)


def births_of(runs: list[tuple[int, int]]) -> array[int]:
    return array("q", [number for run in runs for number in run])


def dates_of(births: array[int]) -> list[int]:
    assert all(blocks >= 1 for blocks in births[::2])
    return list(np.repeat(births[1::2], births[::2]))


@given(RUNS, st.data())
def test_births_are_cut_where_a_list_would_be(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    births = births_of(runs)
    dates = dates_of(births)
    blocks = data.draw(st.integers(0, len(dates)))
    assert dates_of(last(births, blocks)) == dates[len(dates) - blocks :]
    assert births == births_of(runs)
    rest = births[:]
    drop_last(rest, blocks)
    assert dates_of(rest) == dates[: len(dates) - blocks]
    first = data.draw(st.integers(1, len(dates)))
    assert dates_of(cut_first(births, first)) == dates[:first]
    assert dates_of(births) == dates[first:]


@given(st.lists(st.integers(0, 2**62)))
def test_blocks_that_filled_one_by_one_are_runs_of_one(dates: list[int]) -> None:
    assert dates_of(one_by_one(array("q", dates))) == dates


@given(st.lists(st.tuples(RUNS, st.integers(10, 20), st.integers(0, 100)), max_size=6))
def test_lifetimes_are_those_of_the_blocks(
    evictions: list[tuple[list[tuple[int, int]], int, int]],
) -> None:
    """Of extents that go in part and then whole, joined where equal ones follow each other."""
    lifetimes = Lifetimes(lambda: None)
    root = Extent(None, b"", array("i"), 1)
    lived = []
    for runs, now, part in evictions:
        births = births_of(runs)
        dates = dates_of(births)
        extent = Extent(root, bytes(len(dates)), array("i", range(len(dates))), 1)
        extent.born = births
        for count in (part % len(dates), len(dates) - part % len(dates)):
            if count:
                lifetimes.evicted(extent, count, now)
                drop_last(births, count)
                del extent.ids[-count:]
                lived += [now - dates.pop() for _ in range(count)]
    assert len(lifetimes) <= 16 * 2 * len(evictions) + 2 * sum(len(runs) + 1 for runs, _, _ in evictions)
    values, weights = lifetimes.take()["lifetime"]
    assert np.repeat(values, weights).tolist() == lived
    assert (np.diff(values) != 0).all()
    assert not len(lifetimes)
