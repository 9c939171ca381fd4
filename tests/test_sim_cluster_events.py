"""`--events` and block maps with several replicas: each has its own log and its own map."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cluster_cases import APART, CLUSTER, TABLES, replay
from event_cases import assert_states_match

from sim.block_map import block_map
from sim.event_table import read_events
from sim.manifest import Manifest
from sim.records import CACHED, FREE, SHARED
from sim.runner import run
from sim.style import styled, words

HOST = ["--host-cache-bytes", str(2**29), "--preemption", "swap", "--admission", "max_utilization"]
WAYS = {
    "routed": CLUSTER,
    "host": [*CLUSTER, *HOST],
    "apart": APART,
    "apart, host": [*APART, *HOST],
    "stepping": [*APART, "--no-event-skipping"],
    "window": [*CLUSTER, "--window", "200", "--num-sinks", "8"],
}


@pytest.mark.parametrize("way", WAYS)
def test_each_log_says_how_its_cache_stood(way: str, tmp_path: Path) -> None:
    """Every stretch of every replica ends in the state that its log says, and logs change nothing else."""
    replay([*WAYS[way], "--no-figures", "--events"], tmp_path / "with")
    replay([*WAYS[way], "--no-figures"], tmp_path / "without")
    for name in TABLES:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    timeline, requests = (pl.read_parquet(tmp_path / "with" / name) for name in reversed(TABLES))
    events = pl.read_parquet(tmp_path / "with" / "events.parquet")
    for replica in range(3):
        log = read_events(tmp_path / "with" / "events.parquet", replica)
        assert_states_match(log, timeline.filter(pl.col("replica") == replica))
        mine = events.filter(pl.col("replica") == replica)
        assert mine["now_ps"].is_sorted()
        served = requests.filter(pl.col("replica") == replica)
        if "--prefill-replicas" in WAYS[way] and replica:
            served = requests.filter(pl.col("decode_replica") == replica)
        assert set(mine["request_id"].drop_nulls()) == set(served["request_id"])


def test_a_file_of_several_logs_is_read_one_by_one(tmp_path: Path) -> None:
    replay([*CLUSTER, "--no-figures", "--events"], tmp_path)
    path = tmp_path / "events.parquet"
    for replica in (None, 3):
        with pytest.raises(
            ValueError, match=rf"replica \({replica}\) must be one of those in .*: \[0, 1, 2\]"
        ):
            read_events(path, replica)
    one = tmp_path / "one.parquet"
    pl.read_parquet(path).filter(pl.col("replica") == 1).drop("replica").write_parquet(one)
    assert len(read_events(one)) == len(read_events(path, 1))
    with pytest.raises(
        ValueError, match=r"replica \(1\) must be None: events \(.*\) are those of a single cache"
    ):
        read_events(one, 1)


@pytest.mark.parametrize("arguments", [CLUSTER, APART], ids=["routed", "apart"])
def test_each_pool_is_mapped(arguments: list[str], tmp_path: Path) -> None:
    replay([*arguments, "--no-figures"], tmp_path)
    spec = Manifest.read(tmp_path / "manifest.json").spec
    result = run(spec).result
    for replica, part in enumerate(result.replicas):
        found = part.block_map
        assert found is not None
        assert found.times_ps.size > 50
        timeline = {name: np.asarray(column) for name, column in part.timeline.items()}
        held = 0
        for at, owners in zip(found.times_ps, found.owners, strict=True):
            owned = owners[owners >= 0]
            held += owned.size
            column = "decode_replica" if spec.cluster.prefill_replicas and replica else "replica"
            assert (np.asarray(result.requests[column])[owned] == replica).all()
            assert ((owners >= 0) | np.isin(owners, (FREE, CACHED, SHARED))).all()
            # What was free then is what the next step took blocks from.
            after = np.searchsorted(timeline["start_ps"], at)
            if spec.cluster.prefill_replicas:
                continue  # transfers that are over let go of blocks in between
            if after < timeline["start_ps"].size and timeline["start_ps"][after] == at:
                assert (owners == FREE).sum() >= timeline["free_blocks"][after]
        assert held > 0
    with styled():
        figure = block_map(result)
    assert len([axes for axes in figure.axes if axes.images]) == 3
    assert [axes.get_ylabel() for axes in figure.axes] == [f"replica {number}" for number in range(3)]


def test_of_many_replicas_a_few_are_drawn(tmp_path: Path) -> None:
    arguments = [*CLUSTER, "--num-replicas", "6", "--routing", "round_robin"]
    replay([*arguments, "--no-figures"], tmp_path)
    spec = Manifest.read(tmp_path / "manifest.json").spec
    with styled():
        figure = block_map(run(spec).result)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert (labels[0], labels[-1], len(labels)) == ("replica 0", "replica 5", 4)
    assert "all each replica's 180 blocks, 4 of 6 replicas" in words(figure)
    off = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, block_map_samples=0))
    with pytest.raises(ValueError, match="block_map"):
        block_map(run(off).result)
