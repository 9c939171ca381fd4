"""Records on disk: the same as in memory, figure by figure, and in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from engine_cases import LinearCost, scenarios
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from stored_cases import assert_equal, pieces_of, small_pieces, stream_of, told

import sim.export
import sim.runner
import sim.stored
from allocator.config import MODEL_PRESETS, BuildConfig, CacheConfig
from sim.cost import RooflineCost
from sim.distributions import Progressions, summary_of_values
from sim.engine import simulate
from sim.export import write_columns
from sim.hardware import GPU_PRESETS
from sim.metrics import summarise
from sim.records import RunResult
from sim.replay import main
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.stored import ColumnFiles, StoredColumns, StoredTimes
from sim.stream import RequestStream
from sim.workload import WorkloadConfig, generate

NAMES = ("first", "second", "third")


WORKLOAD = WorkloadConfig(
    num_requests=160,
    requests_per_s=30.0,
    turns_mean=2.0,
    think_s_mean=1.0,
    sampling_share=0.2,
    system_prompts=3,
    user_tokens_mean=200.0,
    output_tokens_mean=60.0,
)


def _simulate(requests: object, folder: Path | None, max_seq_len: int = 1200) -> RunResult:
    build = BuildConfig(64, 1024, max_seq_len, tokens_per_block=16)
    cost = RooflineCost(MODEL_PRESETS["llama-2-7b"], GPU_PRESETS["a100-80gb"])
    return simulate(
        requests,  # type: ignore[arg-type]
        build,
        CacheConfig(),
        EngineConfig(admission="max_utilization", block_map_samples=0),
        num_blocks=300,
        cost=cost,
        folder=folder,
    )


def test_records_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = list(generate(WORKLOAD).requests)
    expected = _simulate(requests, None)
    assert set(expected.requests["status"].tolist()) == {"finished", "rejected"}
    assert expected.timeline["preemptions"].any()
    assert expected.cache.evicted_blocks > 0
    small_pieces(monkeypatch)
    stream = stream_of(requests)
    found = _simulate(stream, tmp_path / "records")
    assert isinstance(found.requests, StoredColumns)
    assert isinstance(found.lifetimes["lifetime"], StoredTimes)
    assert_equal(found, expected)
    assert_equal(_simulate(stream, None), expected)  # packed in small pieces, in memory
    assert told(found, tmp_path) == told(expected, tmp_path)
    for kind in ("requests", "timeline"):
        paths = [tmp_path / f"{kind}.{end}" for end in ("disk", "memory")]
        for path, result in zip(paths, (found, expected), strict=True):
            write_columns(getattr(result, kind), path)
        assert pl.read_parquet(paths[0]).equals(pl.read_parquet(paths[1]))


@settings(max_examples=settings().max_examples // 4)
@given(scenario=scenarios())
def test_a_stream_of_requests_runs_like_a_list(
    scenario: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    requests = scenario.requests  # type: ignore[attr-defined]
    arguments = (scenario.build, scenario.cache, scenario.engine)  # type: ignore[attr-defined]
    results = [
        simulate(
            each,
            *arguments,
            num_blocks=scenario.num_blocks,  # type: ignore[attr-defined]
            cost=scenario.cost,  # type: ignore[attr-defined]
            folder=folder,
        )
        for each, folder in (
            (requests, None),
            (stream_of(requests), tmp_path_factory.mktemp("records")),
        )
    ]
    assert_equal(results[1], results[0])


def test_requests_of_a_stream_are_checked_as_they_come() -> None:
    requests = [Request(0, 5, 1, 1), Request(1, 3, 1, 1)]
    stream = stream_of(requests)
    with pytest.raises(ValueError, match=r"arrival_ps \(3\) of request 1 must not be before .* \(5\)"):
        _simulate(stream, None)


def test_only_what_waits_or_runs_is_held() -> None:
    """One at a time, far apart: at no moment are more than two of the requests alive."""
    alive: list[int] = []

    class Counted(Request):
        __slots__ = ()

        def __del__(self) -> None:
            alive.remove(self.request_id)

    def requests() -> object:
        for row in range(500):
            alive.append(row)
            assert len(alive) <= 3
            yield Counted(row, row * 10**6, 4, 2)

    build = BuildConfig(4, 8, 64, tokens_per_block=4)
    stream = RequestStream(requests, 500, 500 * 10**6, False)  # type: ignore[arg-type]
    engine = EngineConfig(block_map_samples=0)
    result = simulate(stream, build, CacheConfig(), engine, num_blocks=16, cost=LinearCost(10))
    assert (result.requests["status"] == "finished").all()
    assert not alive


# ------------------------------------------------------------------ the files themselves


@given(
    rows=arrays.arrays(
        np.int64, st.tuples(st.integers(0, 40), st.just(3)), elements=st.integers(-(2**62), 2**62)
    ),
    cut=st.integers(0, 40),
)
def test_columns_come_back(rows: np.ndarray, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = ColumnFiles(tmp_path_factory.mktemp("files"), NAMES)
    files.write(rows[:cut])
    files.write(rows[cut:])
    columns = StoredColumns(files, NAMES)
    assert list(columns) == list(NAMES)
    assert columns.num_rows == len(rows)
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(columns[name], rows[:, column])
        np.testing.assert_array_equal(columns.part(name, min(cut, len(rows)), len(rows)), rows[cut:, column])
    with pytest.raises(KeyError):
        columns["fourth"]


def test_rows_are_put_in_order(tmp_path: Path) -> None:
    places = np.random.default_rng(0).permutation(100)
    files = ColumnFiles(tmp_path, NAMES)
    files.write(np.stack([places, places * 2, -places], axis=1))
    files.sort_by("first")
    columns = StoredColumns(files, NAMES)
    for name, factor in zip(NAMES, (1, 2, -1), strict=True):
        assert columns[name].tolist() == [factor * place for place in range(100)]


@given(
    values=st.lists(st.tuples(st.integers(0, 10**15) | st.integers(0, 3), st.integers(1, 1000)), max_size=60),
    bins=st.sampled_from([2, 3, 1 << 16]),
)
def test_percentiles_from_disk_are_exact(
    values: list[tuple[int, int]], bins: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = ColumnFiles(tmp_path_factory.mktemp("times"), ("values_ps", "weights"))
    table = np.array(values, dtype=np.int64).reshape(-1, 2)
    files.write(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.stored, "_BINS", bins)
        patch.setattr(sim.stored, "_CHUNK", 7)
        found = StoredTimes(files).summary(10**12)
    every = sorted(value for value, weight in values for _ in range(weight))
    if not every:
        assert set(found.values()) == {None}
        return
    expected = {f"p{p}": every[-(-p * len(every) // 100) - 1] / 10**12 for p in (50, 90, 99)}
    expected |= {"mean": sum(every) / len(every) / 10**12, "max": every[-1] / 10**12}
    assert found == expected


@given(st.lists(st.integers(0, 10**15) | st.integers(0, 3), max_size=200))
def test_a_summary_of_plain_values_is_that_of_their_progressions(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    assert summary_of_values(array.copy(), 10**12) == Progressions.plain(array).summary(10**12)


def test_values_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match=r"values \(-1\) must not be negative"):
        summary_of_values(np.array([3, -1]), 1)


# ------------------------------------------------------------------ a run that keeps its records on disk


@pytest.mark.parametrize("max_seq_len", ["16384", "900"], ids=["all finish", "some are rejected"])
def test_a_replay_leaves_the_same_files_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], max_seq_len: str
) -> None:
    arguments = ["synthetic", "--num-requests", "150", "--max-seq-len", max_seq_len, "--requests-per-s", "50"]
    arguments += ["--num-blocks", "260", "--admission", "max_utilization", "--no-figures", "--perfetto"]
    reports = []
    for kind in ("memory", "disk"):
        if kind == "disk":
            monkeypatch.setattr(sim.runner, "MOST_IN_MEMORY", 10)
        out = tmp_path / kind
        assert main([*arguments, "--prometheus", str(tmp_path / f"{kind}.prom"), "--out", str(out)]) == 0
        reports.append(capsys.readouterr().out.partition("wall time")[0])
    assert reports[0] == reports[1]
    assert "overloaded" in reports[0]
    assert ("rejected" in reports[0]) == (max_seq_len == "900")
    assert (tmp_path / "memory.prom").read_text() == (tmp_path / "disk.prom").read_text()
    names = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("memory", "disk")]
    assert names[0] == names[1]
    for name in ("requests.parquet", "timeline.parquet", "timeline.perfetto-trace"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("memory", "disk"))
        assert one == other
    one, other = (json.loads((tmp_path / kind / "summary.json").read_text()) for kind in ("memory", "disk"))
    for key in ("wall_s", "total_wall_s"):
        del one[key], other[key]
    assert one == other


def _peak_bytes(count: int, folder: Path | None) -> int:
    """Return the most memory that a run and its summary held at once."""
    stream = RequestStream(
        lambda: (Request(i, i * 100, 16, 2) for i in range(count)), count, count * 100, False
    )
    engine = EngineConfig(block_map_samples=0)
    build = BuildConfig(tokens_per_block=16)
    tracemalloc.start()
    try:
        result = simulate(
            stream, build, CacheConfig(), engine, num_blocks=200, cost=LinearCost(10), folder=folder
        )
        summarise(result, engine)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_a_few_columns_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request leaves 16 numbers of its own, and three steps of 22: 656 bytes, of which disk runs hold few."""
    pieces_of(256, monkeypatch)
    growth = [
        (_peak_bytes(4000, folder) - _peak_bytes(1000, small)) / 3000
        for folder, small in ((tmp_path / "4000", tmp_path / "1000"), (None, None))
    ]
    assert growth[0] < 0.6 * growth[1], growth
