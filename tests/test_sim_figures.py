"""Figures: same bytes for the same run, nothing global touched, and pictures that show what is in the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib.colors import to_rgb
from PIL import Image
from result_cases import NaiveEngine, results

from sim import block_map, figures, quantities, style
from sim.binning import binned
from sim.metrics import summarise
from sim.records import CACHED, FREE, SHARED, BlockMap, RunResult
from sim.request import PS_PER_S
from sim.scheduler.config import EngineConfig


@pytest.fixture(scope="module")
def run() -> RunResult:
    return NaiveEngine(1, 60).run()


@pytest.fixture(scope="module")
def written(run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return figures.write_figures(run, EngineConfig(), tmp_path_factory.mktemp("figures"))


def test_every_figure_is_written_and_again_with_the_same_bytes(
    run: RunResult, written: list[Path], tmp_path: Path
) -> None:
    names = {
        f"{name}.{ending}" for name in ("utilization", "latency", "block_map") for ending in ("png", "svg")
    }
    assert {path.name for path in written} == names
    again = figures.write_figures(run, EngineConfig(), tmp_path)
    for first, second in zip(written, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
        assert first.stat().st_size > 5000
    svg = (tmp_path / "latency.svg").read_text()
    assert "<dc:date>" not in svg


def test_no_global_state_is_left_behind(run: RunResult, written: list[Path], tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 31.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        found = figures.write_figures(run, EngineConfig(), tmp_path)
        assert dict(matplotlib.rcParams) == before
    for path, other in zip(found, written, strict=True):
        assert path.read_bytes() == other.read_bytes()  # the user's settings do not show


@given(results())
@settings(max_examples=8)
def test_any_result_can_be_drawn(tmp_path_factory: pytest.TempPathFactory, result: RunResult) -> None:
    folder = tmp_path_factory.mktemp("figures")
    written = figures.write_figures(result, EngineConfig(), folder)
    assert bool(result.timeline["steps"].size) == ((folder / "utilization.png") in written)
    assert all(path.stat().st_size for path in written)


def test_the_latency_table_shows_the_summarys_percentiles(run: RunResult) -> None:
    summary = summarise(run, EngineConfig())
    with style.styled():
        drawn = figures.latency(run, EngineConfig())
    texts = {text.get_text() for axes in drawn.axes for text in axes.texts}
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        for percentile in ("p50", "p90", "p99"):
            assert quantities.seconds_text(summary[name][percentile]) in texts
    assert quantities.seconds_text(summary["ttft_s"]["p99"]) in drawn.texts[0].get_text()


def test_curves_rise_from_zero_to_one_at_the_extremes() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0])
    x, share = figures._share_curve(values)  # type: ignore[misc]
    assert x.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert share.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    many = np.random.default_rng(0).exponential(size=100_000)
    x, share = figures._share_curve(many)  # type: ignore[misc]
    assert x.size <= figures._CURVE_POINTS + 3
    assert (x[0], x[-1], share[-1]) == (many.min(), many.max(), 1.0)
    middle = x[np.searchsorted(share, 0.5)]
    assert middle == pytest.approx(np.median(many), rel=0.01)


def test_bins_keep_the_time_weighted_mean(run: RunResult) -> None:
    """Thinning to bins loses no area: the mean over all bins is the summary's mean."""
    rows = run.timeline
    end = float(rows["end_ps"].max())
    edges = np.linspace(0, end, 38)
    used = rows["referenced_blocks"].astype(np.float64)
    durations = rows["end_ps"] - rows["start_ps"]
    found = binned(run.timeline, used, 0.0, edges)
    assert found.mean() == pytest.approx((used * durations).sum() / end)
    assert found.max() <= used.max() + 1e-9


@pytest.mark.parametrize(
    ("mean", "referenced", "preemptions", "waiting", "title"),
    [
        (0.95, 100, 2, 5, "Sequences fill the pool: 2 preemptions"),
        (0.14, 100, 1, 5, "Sequences hold 14% of the pool on average, all of it at times: 1 preemption"),
        (0.14, 100, 0, 5, "Sequences hold 14% of the pool on average, all of it at times; up to 5 wait"),
        (0.031, 44, 0, 1, "Sequences hold 3.1% of the pool on average, 44% at most; up to 1 waits"),
        (0.03, 44, 0, 0, "Sequences hold 3.0% of the pool on average, 44% at most; none waits"),
    ],
)
def test_the_title_says_how_full_the_pool_was(
    mean: float, referenced: int, preemptions: int, waiting: int, title: str
) -> None:
    rows = {"referenced_blocks": [3, referenced], "preemptions": [0, preemptions], "waiting": [0, waiting]}
    timeline = {name: np.array(values, np.int64) for name, values in rows.items()}
    result = dataclasses.replace(NaiveEngine(1, 0, num_blocks=100).run(), timeline=timeline)
    assert figures._utilization_title(result, mean) == title


def test_a_picture_says_in_words_what_it_shows(run: RunResult, written: list[Path]) -> None:
    (path,) = [path for path in written if path.name == "utilization.png"]
    with Image.open(path) as picture:
        said = picture.text["Description"].splitlines()
    use = summarise(run, EngineConfig())["kv_utilization"]["block"]["mean"]
    assert said[0].startswith(f"Sequences hold {use:.0%} of the pool on average")
    assert said[1].endswith(f"{run.cache.evicted_blocks:,} blocks evicted")


# ------------------------------------------------------------------ the block map


def mapped(owners: list[list[int]], times_s: list[int], busy_s: list[tuple[int, int]]) -> RunResult:
    """Return a run that kept these samples and stepped during these spans."""
    array = np.array(owners, np.int64)
    spans = np.array(busy_s, np.int64).reshape(-1, 2) * PS_PER_S
    timeline = {
        "start_ps": spans[:, 0],
        "end_ps": spans[:, 1],
        "evictable_blocks": np.full(len(spans), CACHED in array),
    }
    found = BlockMap(np.array(times_s, np.int64) * PS_PER_S, np.arange(array.shape[1]), array)
    return dataclasses.replace(NaiveEngine(1, 0).run(), timeline=timeline, block_map=found)


def on_a_grid(run: RunResult) -> tuple[np.ndarray, np.ndarray]:
    assert run.block_map is not None
    return block_map._on_a_grid(run, run.block_map, block_map._extent_ps([run]))


def test_a_moment_shows_the_last_sample_before_it() -> None:
    ids, owners = on_a_grid(mapped([[0, FREE], [CACHED, 1]], [0, 3], [(0, 4)]))
    assert ids.tolist() == [0, 1]
    quarter = block_map._COLUMNS // 4
    assert (owners[0, : 3 * quarter] == 0).all()
    assert (owners[0, 3 * quarter :] == CACHED).all()
    assert (owners[1, : 3 * quarter] == FREE).all()
    assert (owners[1, 3 * quarter :] == 1).all()


@pytest.mark.parametrize(("elsewhere", "left"), [(CACHED, CACHED), (FREE, FREE)])
def test_nobody_holds_a_block_while_nothing_runs(elsewhere: int, left: int) -> None:
    """The second and third of four seconds are idle: what was held is cache then, or free without reuse."""
    _, owners = on_a_grid(mapped([[0, SHARED, elsewhere]], [0], [(0, 1), (3, 4)]))
    quarter = block_map._COLUMNS // 4
    for busy in (slice(0, quarter), slice(3 * quarter, None)):
        assert (owners[:, busy] == [[0], [SHARED], [elsewhere]]).all()
    idle = slice(quarter, 3 * quarter)
    assert (owners[:, idle] == [[left], [left], [elsewhere]]).all()


def test_large_pools_are_thinned_evenly() -> None:
    state = np.where(np.arange(100_000) % 4 < 3, CACHED, FREE).tolist()
    ids, owners = on_a_grid(mapped([state, state], [0, 1], [(0, 2)]))
    assert ids.size <= block_map._ROWS
    assert np.ptp(np.diff(ids)) == 0
    assert owners.shape == (ids.size, block_map._COLUMNS)


def test_each_state_has_its_colour_and_neighbours_in_admission_differ() -> None:
    owners = np.array([[0, 1, 2, FREE, CACHED, SHARED]], np.int64)
    image = block_map._colours(owners, np.array([5, 3, 4], np.int64))
    assert tuple(image[0, 3]) == to_rgb(style.FREE_WHITE)
    assert tuple(image[0, 4]) == to_rgb(style.CACHED_GREY)
    assert tuple(image[0, 5]) == to_rgb(style.SHARED_INK)
    # Request 1 came first, then 2, then 0: they take the palette in that order.
    assert [tuple(image[0, column]) for column in (1, 2, 0)] == [to_rgb(c) for c in style.OWNERS[:3]]


def test_the_headline_states_the_time_weighted_shares() -> None:
    _, owners = on_a_grid(mapped([[0, FREE, FREE, FREE], [SHARED, 1, CACHED, FREE]], [0, 1], [(0, 4)]))
    assert block_map._title(owners) == "Requests hold 44% of the pool, 19% is shared, 19% waits as cache"


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        (1, ["0"]),
        (3, ["0", "1", "2"]),
        (7242, ["0", "2,000", "4,000", "6,000"]),
        (30_000, ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
    ],
)
def test_round_block_numbers_stand_where_those_blocks_are(blocks: int, numbers: list[str]) -> None:
    run = mapped([[FREE] * blocks], [0], [(0, 1)])
    ids, _ = on_a_grid(run)
    with style.styled():
        (board,) = block_map.block_map(run).axes
    assert [label.get_text() for label in board.get_yticklabels()] == numbers
    every = ids[1] - ids[0] if ids.size > 1 else 1
    assert (board.get_yticks() * every).tolist() == pytest.approx([int(n.replace(",", "")) for n in numbers])


def test_a_run_without_samples_cannot_be_mapped(run: RunResult) -> None:
    with pytest.raises(ValueError, match=r"block_map \(None\) must be kept"):
        block_map.block_map(dataclasses.replace(run, block_map=None))


# ------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (2.5e-5, "25 µs"),
        (0.0471, "47.1 ms"),
        (0.99949, "999 ms"),
        (1.119, "1.12 s"),
        (1234.5, "1,234 s"),
    ],
)
def test_durations_are_written_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert quantities.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (0.0001, "<0.1%"), (0.0346, "3.5%"), (0.099, "9.9%"), (0.75, "75%"), (1.0, "100%")],
)
def test_shares_are_written_with_a_digit_more_when_small(share: float, text: str) -> None:
    assert quantities.rough_percent_text(share) == text


def test_table_shares_have_three_digits_and_none_is_a_dash() -> None:
    found = [quantities.percent_text(share) for share in (None, 0.0, 0.00123, 0.0999, 0.5414, 1.0)]
    assert found == ["–", "0.0%", "0.12%", "9.99%", "54.1%", "100.0%"]
    assert quantities.seconds_text(None) == "–"
