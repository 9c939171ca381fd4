"""What `python -m sim.replay --num-replicas N` leaves: tables, summary, figures, and a manifest that reruns it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cluster_cases import APART, BASE, CLUSTER, SHARED, TABLES, TIGHT, replay

from sim.cluster.figures import replica_utilization
from sim.cluster.results import merged_stats
from sim.manifest import Manifest
from sim.metrics import summarise
from sim.quantities import percent_text, rough_percent_text
from sim.replay import main
from sim.runner import Run, run
from sim.style import styled
from sim.window import Window


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cluster") / "out"
    replay(CLUSTER, out)
    return out


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    """The same run, in memory."""
    return run(Manifest.read(folder / "manifest.json").spec)


def test_the_files(folder: Path) -> None:
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    figures = [
        f"figures/{name}.{end}" for name in ("block_map", "latency", "utilization") for end in ("png", "svg")
    ]
    assert found == sorted([*figures, "manifest.json", "summary.json", *TABLES])


def test_rows_say_whose_they_are(folder: Path) -> None:
    requests, timeline = (pl.read_parquet(folder / name) for name in TABLES)
    assert requests["replica"].value_counts().height == 3
    assert timeline["replica"].unique().sort().to_list() == [0, 1, 2]
    assert timeline["start_ps"].is_sorted()
    for replica in range(3):  # a replica takes one step at a time
        rows = timeline.filter(pl.col("replica") == replica)
        assert (rows["start_ps"][1:] >= rows["end_ps"][:-1]).all()


def test_the_summary_is_the_sum_of_its_replicas(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    requests, timeline = (pl.read_parquet(folder / name) for name in TABLES)
    replicas = summary["replicas"]
    assert [each["replica"] for each in replicas] == [0, 1, 2]
    for name in ("requests", "finished", "output_tokens", "evicted_blocks", "preemptions"):
        assert sum(each[name] for each in replicas) == summary[name], name
    means = [each["kv_utilization"]["mean"] for each in replicas]
    assert sum(means) / 3 == pytest.approx(summary["kv_utilization"]["block"]["mean"])
    assert (
        max(each["kv_utilization"]["max"] for each in replicas) == (summary["kv_utilization"]["block"]["max"])
    )
    assert summary["evicted_blocks"] > 0
    for each in replicas:
        mine = requests.filter(pl.col("replica") == each["replica"])
        assert each["hit_rate_tokens"] == mine["hit_tokens"].sum() / mine["prompt_tokens"].sum()
        rows = timeline.filter(pl.col("replica") == each["replica"])
        busy = (rows["end_ps"] - rows["start_ps"]).sum() / 1e12
        assert each["busy"] == pytest.approx(busy / summary["simulated_s"])
    used = (timeline["referenced_blocks"] * (timeline["end_ps"] - timeline["start_ps"])).sum()
    mean = used / 180 / 3 / (summary["simulated_s"] * 1e12)
    assert summary["kv_utilization"]["block"]["mean"] == pytest.approx(mean, rel=0.02)
    assert summary["throughput_tokens_per_s"] == summary["output_tokens"] / summary["simulated_s"]


def test_a_manifest_reruns_it(folder: Path, tmp_path: Path) -> None:
    replay(["--from-manifest", str(folder / "manifest.json")], tmp_path)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "summary.json":
            assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path
    first, second = (json.loads((place / "summary.json").read_text()) for place in (folder, tmp_path))
    for summary in (first, second):
        del summary["wall_s"], summary["total_wall_s"]
    assert first == second
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["cluster"]["num_replicas"] == 3


def test_skipping_events_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    replay([*CLUSTER, "--no-event-skipping", "--no-figures"], tmp_path)
    for name in TABLES:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_warm_up_is_taken_off_each_replica(done: Run) -> None:
    engine = dataclasses.replace(done.spec.engine, warm_up_requests=30)
    whole, late = summarise(done.result, done.spec.engine), summarise(done.result, engine)
    assert (whole["requests"], late["requests"]) == (80, 50)
    assert sum(each["requests"] for each in late["replicas"]) == 50
    assert late["measured_s"] < whole["measured_s"]
    for each in late["replicas"]:
        assert 0 < each["busy"] <= 1
        assert each["kv_utilization"]["mean"] <= each["kv_utilization"]["max"]
    cut = Window.of(done.result, engine).cut(done.result)
    assert cut.cache == merged_stats([part.cache for part in cut.replicas])
    assert late["hit_tokens"] == int(np.asarray(done.result.requests["hit_tokens"])[30:].sum())


def test_each_replica_has_a_line_of_the_picture(done: Run) -> None:
    with styled():
        pools, queue = replica_utilization(done.result).axes[:2]
    image = pools.get_images()[0].get_array()
    assert image.shape[0] == 3
    summary = summarise(done.result, done.spec.engine)
    for line, each in zip(image.mean(axis=1), summary["replicas"], strict=True):
        assert line == pytest.approx(each["kv_utilization"]["mean"], rel=0.02)
    assert max(queue.lines[1].get_ydata()) > 0


def test_the_perfetto_trace_has_a_group_of_tracks_for_each(tmp_path: Path) -> None:
    replay([*CLUSTER, "--no-figures", "--perfetto"], tmp_path)
    trace = (tmp_path / "timeline.perfetto-trace").read_bytes()
    assert all(f"replica {number}".encode() in trace for number in range(3))
    assert b"replica 3" not in trace


def test_the_report_names_the_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay([*BASE, "--num-replicas", "2", "--no-figures"], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "replicas 2, round_robin requests 40 to 40; busy " in said


# ------------------------------------------------------------------ prefill and decode apart


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("apart") / "out"
    replay(APART, out)
    return out


def test_transfers_are_in_the_tables_and_in_the_summary(apart: Path) -> None:
    summary = json.loads((apart / "summary.json").read_text())
    requests = pl.read_parquet(apart / "requests.parquet").filter(pl.col("decode_replica") >= 0)
    assert set(requests["decode_replica"]) == {1, 2}
    assert set(requests["replica"]) == {0}
    transfers = summary["transfers"]
    assert transfers["requests"] == requests.height > 0
    assert transfers["blocks"] == requests["transferred_blocks"].sum()
    assert transfers["blocks"] + transfers["hit_blocks"] == requests["query_blocks"].sum()
    took = (requests["transfer_end_ps"] - requests["transfer_start_ps"]).max()
    assert transfers["transfer_s"]["max"] == took / 1e12
    # 16 tokens of llama-3-8b are 2 MiB, PCIe 4 at 0.8 of 32 GB/s; the wait for others comes on top.
    least = requests["transferred_blocks"] * (2**21 / 25.6e9) + 10e-6
    assert (((requests["transfer_end_ps"] - requests["transfer_start_ps"]) / 1e12) > least - 1e-9).all()
    roles = [each["role"] for each in summary["replicas"]]
    assert roles == ["prefill", "decode", "decode"]
    assert sum(each["finished"] for each in summary["replicas"]) == summary["finished"]
    assert sum(each["requests"] for each in summary["replicas"][1:]) == requests.height
    assert summary["replicas"][0]["hit_rate_tokens"] == summary["hit_rate_tokens"] > 0
    assert summary["replicas"][1]["hit_rate_tokens"] is None


def test_the_report_has_a_line_for_each_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is of one side is not mixed with what is of the other."""
    flags = ["--num-replicas", "4", "--prefill-replicas", "2", "--no-figures"]
    summary = replay([*SHARED, *TIGHT, *flags], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "replicas 4, 2 of them for prompts alone, round_robin prefill requests" in said
    for role in ("prefill", "decode"):
        own = [each for each in summary["replicas"] if each["role"] == role]
        numbers = [each["requests"] for each in own]
        busy, used, rates = (
            [percent_text(value) for value in (min(values), max(values))] if None not in values else []
            for values in (
                [each["busy"] for each in own],
                [each["kv_utilization"]["mean"] for each in own],
                [each["hit_rate_tokens"] for each in own],
            )
        )
        line = (
            f"{role} requests {min(numbers)} to {max(numbers)}; busy {' to '.join(busy)} "
            f"of blocks in use, mean {' to '.join(used)}"
        )
        if rates:
            line += f"; hit rate {' to '.join(rates)} of tokens"
        assert bool(rates) == (role == "prefill"), "nothing counts as looked up where nothing is computed"
        assert line + (" decode" if rates else " transfers") in said


def test_a_role_of_one_replica_spans_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay([*APART, "--no-figures"], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r" prefill requests 80; busy [\d.]+% of blocks in use, mean [\d.]+%; hit rate [\d.]+% of", said
    )


def test_the_picture_says_which_replica_does_what(apart: Path) -> None:
    finished = run(Manifest.read(apart / "manifest.json").spec)
    with styled():
        figure = replica_utilization(finished.result)
        pools = figure.axes[0]
        pools.figure.draw_without_rendering()
    shown = {
        tick: label.get_text()
        for tick, label in zip(pools.get_yticks(), pools.get_yticklabels(), strict=True)
    }
    assert {tick: text for tick, text in shown.items() if text} == {
        0: "prefill 0",
        1: "decode 1",
        2: "decode 2",
    }
    means = [
        each["kv_utilization"]["mean"]
        for each in summarise(finished.result, finished.spec.engine)["replicas"]
    ]
    prefill, *decode = (rough_percent_text(mean) for mean in (means[0], *sorted(means[1:])))
    headline, below = (text.get_text() for text in figure.texts)
    assert headline == (
        f"Sequences hold {prefill} of a prefill replica's pool on average, "
        f"{' to '.join(dict.fromkeys(decode))} of a decode replica's"
    )
    assert below.startswith("1 prefill and 2 decode replicas, 180 blocks of 16 tokens each")


def test_a_manifest_reruns_replicas_apart(apart: Path, tmp_path: Path) -> None:
    replay(["--from-manifest", str(apart / "manifest.json"), "--no-figures"], tmp_path / "a")
    replay([*APART, "--no-event-skipping", "--no-figures"], tmp_path / "b")
    for name in TABLES:
        assert (apart / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
        assert (apart / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_faster_link_transfers_faster(apart: Path, tmp_path: Path) -> None:
    flags = ["--kv-link-gb-s", "400", "--kv-link-latency-us", "2", "--no-figures"]
    fast = replay(["--from-manifest", str(apart / "manifest.json"), *flags], tmp_path)
    slow = json.loads((apart / "summary.json").read_text())
    assert fast["transfers"]["transfer_s"]["mean"] < slow["transfers"]["transfer_s"]["mean"] / 5


def test_a_warm_up_is_taken_off_replicas_apart(apart: Path) -> None:
    finished = run(Manifest.read(apart / "manifest.json").spec)
    engine = dataclasses.replace(finished.spec.engine, warm_up_requests=30)
    late = summarise(finished.result, engine)
    requests = finished.result.requests
    assert late["hit_tokens"] == int(np.asarray(requests["hit_tokens"])[30:].sum())
    assert late["transfers"]["requests"] == int((np.asarray(requests["decode_replica"])[30:] >= 0).sum())
    assert late["replicas"][0]["hit_rate_tokens"] == late["hit_rate_tokens"]


def test_what_cannot_be_apart_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*APART, "--window", "64", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert said == "error: window (64) must be None with prefill_replicas\n"
