"""Records of several replicas on disk: the same as in memory, figure by figure, and in bounded memory."""

from __future__ import annotations

import json
import resource
import tracemalloc
from pathlib import Path

import polars as pl
import pytest
from cluster_cases import (
    APART,
    CLUSTER,
    PLAIN,
    TABLES,
    ClusterScenario,
    cluster_scenarios,
    disaggregated_scenarios,
    replay,
    session_scenario,
)
from engine_cases import LinearCost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_cases import assert_equal, pieces_of, small_pieces, stream_of, told

import sim.rows
import sim.runner
import sim.stored
from allocator.config import BuildConfig, CacheConfig
from sim.cluster.cluster import simulate_cluster
from sim.cluster.config import ClusterConfig
from sim.cluster.link import TransferCost
from sim.export import write_columns
from sim.metrics import summarise
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.stored import StoredColumns, StoredTimes
from sim.stream import RequestStream


def _assert_same(found: RunResult, expected: RunResult) -> None:
    """Compare what is on disk with what is in memory, of the whole and of each replica."""
    assert_equal(found, expected)
    assert found.gaps_ps.tolist() == expected.gaps_ps.tolist()
    assert found.cache == expected.cache
    assert len(found.replicas) == len(expected.replicas)
    for ours, theirs in zip(found.replicas, expected.replicas, strict=True):
        assert isinstance(ours.requests, StoredColumns)
        assert_equal(ours, theirs)


@settings(
    max_examples=settings().max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scenario=st.one_of(cluster_scenarios(), disaggregated_scenarios()))
def test_records_on_disk_are_those_in_memory(
    scenario: ClusterScenario, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scenario.run()
    small_pieces(monkeypatch)
    found = scenario.simulate(stream_of(scenario.requests), tmp_path_factory.mktemp("records"))
    _assert_same(found, expected)


@pytest.mark.parametrize("prefill_replicas", [0, 1])
def test_all_that_is_made_of_them_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefill_replicas: int
) -> None:
    scenario = session_scenario(40.0)
    fields = dict(vars(scenario))
    fields["cluster"] = ClusterConfig(3, "longest_prefix", prefill_replicas)
    fields["build"] = BuildConfig(16, 512, 1200, tokens_per_block=16)  # some of the requests are longer
    scenario = ClusterScenario(**fields)
    expected = scenario.run()
    assert {"", "exceeds_max_seq_len", "follows_rejected"} <= set(expected.requests["reject_cause"].tolist())
    assert expected.timeline["preemptions"].any()
    assert expected.cache.evicted_blocks > 0
    assert len(expected.pauses["sample"])
    small_pieces(monkeypatch)
    monkeypatch.setattr(sim.rows, "_ROWS", 50)
    monkeypatch.setattr(sim.stored, "_CHUNK", 301)
    found = scenario.simulate(stream_of(scenario.requests), tmp_path / "records")
    assert isinstance(found.timeline, StoredColumns)
    assert isinstance(found.lifetimes["lifetime"], StoredTimes)
    assert len(found.lifetimes["lifetime"].tables) == 3
    _assert_same(found, expected)
    assert told(found, tmp_path) == told(expected, tmp_path)
    for engine in (EngineConfig(warm_up_requests=40), EngineConfig(warm_up_s=1.5)):
        figures = [summarise(result, engine) for result in (found, expected)]
        for each in figures:
            del each["wall_s"]
        assert figures[0] == figures[1]
    for kind in ("requests", "timeline"):
        paths = [tmp_path / f"{kind}.{end}" for end in ("disk", "memory")]
        for path, result in zip(paths, (found, expected), strict=True):
            write_columns(getattr(result, kind), path)
        assert pl.read_parquet(paths[0]).equals(pl.read_parquet(paths[1]))


@pytest.mark.parametrize("arguments", [CLUSTER, APART], ids=["together", "apart"])
def test_a_replay_leaves_the_same_files_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    summaries = []
    for kind in ("memory", "disk"):
        if kind == "disk":
            monkeypatch.setattr(sim.runner, "MOST_IN_MEMORY", 10)
        summary = replay([*arguments, "--no-figures", "--perfetto", "--events"], tmp_path / kind)
        for key in ("wall_s", "total_wall_s"):
            del summary[key]
        summaries.append(summary)
    assert summaries[0] == summaries[1]
    names = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("memory", "disk")]
    assert names[0] == names[1]
    for name in (*TABLES, "events.parquet", "timeline.perfetto-trace"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("memory", "disk"))
        assert one == other, name
    manifests = [json.loads((tmp_path / kind / "manifest.json").read_text()) for kind in ("memory", "disk")]
    assert manifests[0] == manifests[1]


def _run(count: int, folder: Path | None, cluster: ClusterConfig) -> RunResult:
    stream = RequestStream(
        lambda: (Request(i, i * 100, 16, 2) for i in range(count)), count, count * 100, False
    )
    return simulate_cluster(
        stream,
        BuildConfig(tokens_per_block=16),
        CacheConfig(),
        PLAIN,
        cluster,
        num_blocks=20,
        cost=LinearCost(10),
        transfer=TransferCost(1, 1),
        folder=folder,
    )


def _peak_bytes(count: int, folder: Path | None, cluster: ClusterConfig) -> tuple[int, int]:
    """Return the most memory that a run held at once, and a run and its summary."""
    tracemalloc.start()
    try:
        result = _run(count, folder, cluster)
        running = tracemalloc.get_traced_memory()[1]
        summarise(result, PLAIN)
        return running, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_a_few_columns_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run holds 12 bytes a request and, as it merges, three columns of two rows; in memory, some 1,700 bytes."""
    pieces_of(256, monkeypatch)
    cluster = ClusterConfig(3)
    growth = []
    for folder, small in ((tmp_path / "3000", tmp_path / "1000"), (None, None)):
        peaks = zip(_peak_bytes(3000, folder, cluster), _peak_bytes(1000, small, cluster), strict=True)
        growth.append([(large - less) / 2000 for large, less in peaks])
    (run_disk, all_disk), (run_memory, all_memory) = growth
    assert run_disk < 0.15 * run_memory, growth
    assert all_disk < 0.3 * all_memory, growth


def test_many_replicas_need_few_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        found = _run(400, tmp_path / "records", ClusterConfig(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_equal(found, _run(400, None, ClusterConfig(40)))
