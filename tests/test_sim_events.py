"""`--events`: events.parquet, and how every block stood at any moment of a replay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import polars as pl
import pytest
from engine_cases import LinearCost
from event_cases import assert_states_match

from allocator.config import BuildConfig, CacheConfig
from allocator.events import rebuild
from sim.engine import simulate
from sim.event_table import event_frame, read_events
from sim.replay import main
from sim.request import Request
from sim.scheduler.config import EngineConfig

TIGHT = [
    "synthetic",
    "--num-requests",
    "40",
    "--user-tokens-max",
    "1000",
    "--output-tokens-max",
    "200",
    "--system-prompts",
    "2",
    "--turns-mean",
    "2",
    "--session-tokens-max",
    "2048",
    "--num-blocks",
    "160",
    "--tokens-per-block",
    "16",
    "--admission",
    "max_utilization",
    "--no-figures",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a replay that evicts, preempts and shares, with its events."""
    out = tmp_path_factory.mktemp("run")
    assert main([*TIGHT, "--events", "--out", str(out)]) == 0
    return out


def test_the_table_says_how_the_blocks_stood_at_a_random_moment(run: Path) -> None:
    timeline = pl.read_parquet(run / "timeline.parquet")
    log = read_events(run / "events.parquet")
    for row in random.Random(4).sample(list(timeline.iter_rows(named=True)), 5):
        state = rebuild(log, log.at_time(row["end_ps"] - 1))
        assert list(state.counts().values()) == [
            row["free_blocks"],
            row["evictable_blocks"],
            row["referenced_blocks"],
            0,
        ]


def test_states_at_the_end_of_every_stretch(run: Path) -> None:
    timeline = pl.read_parquet(run / "timeline.parquet")
    assert timeline["preemptions"].sum() > 0
    assert_states_match(read_events(run / "events.parquet"), timeline)


def test_the_table_adds_up_with_the_others(run: Path) -> None:
    events, requests = (pl.read_parquet(run / f"{name}.parquet") for name in ("events", "requests"))
    summary = json.loads((run / "summary.json").read_text())
    blocks = events.with_columns(count=pl.col("blocks").list.len())
    of_kind = {
        kind: blocks.filter(pl.col("kind") == kind) for kind in ("admitted", "freed", "hit", "evicted")
    }
    assert of_kind["evicted"]["count"].sum() == summary["evicted_blocks"] > 0
    assert of_kind["admitted"].height == of_kind["freed"].height == 40 + summary["preemptions"]
    first = of_kind["admitted"].group_by("request_id").agg(pl.col("sequence").min()).sort("request_id")
    assert first["request_id"].to_list() == requests["request_id"].to_list()
    hits = first.join(of_kind["hit"], on="sequence", how="left").sort("request_id")["count"].fill_null(0)
    assert hits.to_list() == requests["hit_blocks"].to_list()
    admitted = first.join(of_kind["admitted"], on="sequence").sort("request_id")
    assert admitted["now_ps"].to_list() == requests["admit_ps"].to_list()
    last = of_kind["freed"].group_by("request_id").agg(pl.col("now_ps").max()).sort("request_id")
    assert last["now_ps"].to_list() == requests["finish_ps"].to_list()


def test_a_rerun_from_the_manifest_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "manifest.json").read_text())["config"]["engine"]["events"] is True
    again = tmp_path / "again"
    command = ["--from-manifest", str(run / "manifest.json"), "--no-figures"]
    assert main([*command, "--out", str(again)]) == 0
    for name in ("events.parquet", "requests.parquet", "timeline.parquet"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert main([*command, "--no-events", "--out", str(again)]) == 0  # and the earlier table is gone
    assert not (again / "events.parquet").exists()


def test_keeping_events_changes_nothing_else(run: Path, tmp_path: Path) -> None:
    assert main([*TIGHT, "--out", str(tmp_path)]) == 0
    for name in ("requests.parquet", "timeline.parquet"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    with_log, without = (json.loads((out / "summary.json").read_text()) for out in (run, tmp_path))
    for summary in (with_log, without):
        del summary["wall_s"], summary["total_wall_s"]
    assert with_log == without


@pytest.mark.parametrize("flags", [["--no-event-skipping"], ["--no-enable-paged-kv-cache"]])
def test_other_ways_to_run(flags: list[str], tmp_path: Path) -> None:
    few = [*TIGHT, "--num-requests", "12", "--num-blocks", "2000", *flags]
    assert main([*few, "--events", "--out", str(tmp_path)]) == 0
    assert_states_match(
        read_events(tmp_path / "events.parquet"), pl.read_parquet(tmp_path / "timeline.parquet")
    )


HOST = ["--host-cache-bytes", str(2**29), "--preemption", "swap"]  # 64 blocks
WINDOW = ["--window", "200", "--num-sinks", "8", "--num-blocks", "130"]


@pytest.mark.parametrize("skipping", [True, False])
@pytest.mark.parametrize("flags", [HOST, WINDOW], ids=["host", "window"])
def test_states_behind_a_host_tier_and_within_windows(
    flags: list[str], skipping: bool, tmp_path: Path
) -> None:
    """Every stretch ends in the state that the log says, and the log changes nothing else."""
    command = [*TIGHT, *flags] if skipping else [*TIGHT, *flags, "--no-event-skipping"]
    assert main([*command, "--events", "--out", str(tmp_path / "with")]) == 0
    assert main([*TIGHT, *flags, "--out", str(tmp_path / "without")]) == 0
    for name in ("requests.parquet", "timeline.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    timeline = pl.read_parquet(tmp_path / "with" / "timeline.parquet")
    log = read_events(tmp_path / "with" / "events.parquet")
    assert_states_match(log, timeline)
    kinds = set(pl.read_parquet(tmp_path / "with" / "events.parquet")["kind"])
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    if flags is HOST:
        assert summary["swapped_blocks"] > 0
        assert {"swapped_out", "swapped_in"} <= kinds
    else:
        assert {"window", "passed", "placed"} <= kinds


def test_samples_belong_to_their_request() -> None:
    requests = [Request(i, 1000 * i, 20, 9, num_samples=1 + 2 * i) for i in range(2)]
    result = simulate(
        requests,
        BuildConfig(tokens_per_block=8),
        CacheConfig(),
        EngineConfig(events=True),
        num_blocks=100,
        cost=LinearCost(),
    )
    assert result.events is not None
    frame = event_frame(result.events, result.sequences)
    forks = frame.filter(pl.col("kind") == "forked")
    assert forks["request_id"].to_list() == [1, 1]
    assert frame.filter(pl.col("kind") == "freed")["request_id"].sort().to_list() == [0, 1, 1, 1]
    assert frame.filter(pl.col("kind") == "executed")["request_id"].to_list() == [None]
    assert frame.filter(pl.col("kind") == "copied")["blocks"].list.len().to_list() == [2, 2]


def test_what_is_no_event_table_is_refused(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "absent.parquet", run / "summary.json", run / "requests.parquet"):
        with pytest.raises(ValueError, match=rf"events \({path}\) cannot be read: .+"):
            read_events(path)
