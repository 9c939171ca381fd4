"""The demo: what it finds, that it finds the same everywhere, and what it leaves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import kernel_replay
from experiments.demo import BLOCK_SIZES, POOL_TOKENS, WORKLOAD, comparison, demo, replay_all, report
from sim.replay import main as replay_main

TINY = dataclasses.replace(WORKLOAD, num_requests=60)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def summaries(out: Path) -> dict[int, dict]:
    return replay_all(out, draw=False)


def test_smaller_blocks_hit_more_and_waste_less(summaries: dict[int, dict]) -> None:
    assert tuple(summaries) == BLOCK_SIZES
    runs = list(summaries.values())
    assert all(run["finished"] == WORKLOAD.num_requests for run in runs)
    for better, worse in itertools.pairwise(runs):
        assert better["hit_rate_tokens"] > worse["hit_rate_tokens"]
        assert better["internal_fragmentation"]["mean"] < worse["internal_fragmentation"]["mean"]
        assert better["preemptions"] < worse["preemptions"]
    # Contended enough to be worth looking at: each mechanism is at work in each run.
    assert all(run["preemptions"] and run["evicted_blocks"] and run["cow_copies"] for run in runs)


def test_the_table_shows_the_summaries(summaries: dict[int, dict]) -> None:
    lines = report(summaries).splitlines()
    table = [line.split() for line in lines if line.strip().startswith(tuple("0123456789"))]
    rows = {int(cells[0]): cells for cells in table if cells[0].isdigit()}
    assert tuple(rows) == BLOCK_SIZES
    for size, summary in summaries.items():
        assert rows[size][1] == f"{summary['hit_rate_tokens']:.1%}"
        assert rows[size][-1] == f"{summary['preemptions']:,}"
    assert f"KV pool of {POOL_TOKENS:,} tokens" in report(summaries)


def test_the_text_is_the_same_every_time(summaries: dict[int, dict], tmp_path: Path) -> None:
    first, second = (report(replay_all(tmp_path / name, draw=False, workload=TINY), TINY) for name in "ab")
    assert first == second
    assert first != report(summaries)
    # No wall time reaches the text.
    assert report(summaries) == report(
        {k: v | {"wall_s": 1e9, "total_wall_s": 1e9} for k, v in summaries.items()}
    )


def test_every_pool_holds_the_same_tokens(out: Path, summaries: dict[int, dict]) -> None:
    for size in summaries:
        budget = json.loads((out / f"block-{size}" / "manifest.json").read_text())["memory_budget"]
        assert budget["num_tokens"] == POOL_TOKENS
        assert budget["num_blocks"] == POOL_TOKENS // size


def test_a_manifest_of_the_demo_can_be_replayed(
    out: Path, summaries: dict[int, dict], tmp_path: Path
) -> None:
    manifest = out / "block-64" / "manifest.json"
    assert replay_main(["--from-manifest", str(manifest), "--out", str(tmp_path), "--no-figures"]) == 0
    for name in ("requests.parquet", "timeline.parquet"):
        assert (tmp_path / name).read_bytes() == (out / "block-64" / name).read_bytes()


def test_the_comparison_labels_every_bar(summaries: dict[int, dict]) -> None:
    drawn = comparison(summaries)
    assert len(drawn.axes) == 5
    for axes in drawn.axes:
        assert len(axes.patches) == len(axes.texts) == len(BLOCK_SIZES)
    waste = [bar.get_height() for bar in drawn.axes[1].patches]
    assert waste == [summary["internal_fragmentation"]["mean"] for summary in summaries.values()]


def test_the_command_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "experiments.demo.replay_all", lambda out, draw: replay_all(out, draw=draw, workload=TINY)
    )
    # What the kernels compute is tested in test_experiments_kernel_replay.
    checked: list[kernel_replay.Config] = []

    def run(config: kernel_replay.Config) -> SimpleNamespace:
        checked.append(config)
        return SimpleNamespace(last_line="kernels: checked")

    monkeypatch.setattr(kernel_replay, "run", run)
    demo(["--out", str(tmp_path), "--no-figures"])
    said = capsys.readouterr().out
    assert checked == [kernel_replay.Config()]
    assert said.endswith("\nkernels: checked\n")
    assert "tokens_per_block" in said
    assert f"Results in {tmp_path}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-128", "block-16", "block-64"]


def test_drawing_leaves_a_comparison_beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.figures.write_figures", lambda *_: [])  # drawn and tested elsewhere
    replay_all(tmp_path, workload=TINY)
    assert {path.name for path in tmp_path.glob("comparison.*")} == {"comparison.png", "comparison.svg"}


@pytest.mark.parametrize("blocked", ["block-64", "comparison.png/x"])
def test_what_cannot_be_written_is_found_out_first(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.demo.run", lambda *_: pytest.fail("something was run"))
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("mine")
    with pytest.raises(ValueError, match="cannot be written: "):
        replay_all(tmp_path, workload=TINY)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [blocked]


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sim.figures.write_figures", lambda *_: [])
    monkeypatch.setattr("experiments.demo.look.save", full)
    with pytest.raises(ValueError) as caught:
        replay_all(tmp_path, workload=TINY)
    assert str(caught.value) == f"out ({tmp_path}) cannot be written: No space left on device"
