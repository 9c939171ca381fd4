"""The sweep: what it runs, what it keeps, and the intervals it prints."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.tools import sweep
from experiments.tools._intervals import interval, t_quantile
from sim.replay import main as replay

WORKLOAD = ["synthetic", "--num-requests", "12", "--requests-per-s", "20", "--num-blocks", "300"]


def _sweep(out: Path, *flags: str, workload: list[str] | None = None) -> int:
    return sweep.main(
        ["--out", str(out), "--jobs", "1", "--no-figures", *flags, "--", *(workload or WORKLOAD)]
    )


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / sweep.TABLE).open() as file:
        return list(csv.DictReader(file))


def test_every_combination_and_seed_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vary", "tokens_per_block=16,64", "--vary", "policy=lru,fifo", "--seeds", "2"]
    assert _sweep(tmp_path, *flags) == 0
    rows = _rows(tmp_path)
    given = [(row["tokens_per_block"], row["policy"], row["seed"]) for row in rows]
    assert given == [
        (size, policy, seed) for size in ("16", "64") for policy in ("lru", "fifo") for seed in "01"
    ]
    out = capsys.readouterr().out
    assert "±" in out
    assert "8 points" in out


def test_the_metrics_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        _sweep(tmp_path, "--figures", "--vary", "policy=lru,fifo", "--metrics", "hit_rate_tokens", "steps")
        == 0
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"sweep.png", "sweep.svg"}
    said = " ".join(capsys.readouterr().out.split())  # lines are as long as the folder's name lets them be
    assert f"the metrics drawn in {tmp_path / 'sweep.png'}" in said


def test_overloaded_combinations_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = ["synthetic", "--num-requests", "300", "--output-tokens-mean", "60"]
    flags = ["--metrics", "requests", "overload.waiting"]
    assert _sweep(tmp_path, "--vary", "requests_per_s=1,100", *flags, workload=workload) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "300", "–"] in rows
    (crowded,) = [row for row in rows if row[:1] == ["100"]]
    assert float(crowded[2]) >= 10
    assert crowded[3:] == ["1", "of", "1"]
    assert _sweep(tmp_path, "--vary", "requests_per_s=1", *flags, workload=workload) == 0
    assert "overloaded" not in capsys.readouterr().out.split()


def test_a_point_is_what_a_replay_gives(tmp_path: Path) -> None:
    assert _sweep(tmp_path / "sweep", "--vary", "tokens-per-block=32") == 0
    (point,) = (tmp_path / "sweep" / sweep.POINTS).iterdir()
    swept = json.loads(point.read_text())["summary"]
    assert (
        replay([*WORKLOAD, "--tokens-per-block", "32", "--no-figures", "--out", str(tmp_path / "one")]) == 0
    )
    replayed = json.loads((tmp_path / "one" / "summary.json").read_text())
    walls = ("wall_s", "total_wall_s")
    assert {k: v for k, v in swept.items() if k not in walls} == {
        k: v for k, v in replayed.items() if k not in walls
    }


def test_finished_points_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _sweep(tmp_path, "--vary", "tokens_per_block=16,32") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / sweep.POINTS).iterdir()}
    ran: list[Any] = []
    real = sweep.run_point

    def counting(point: sweep.Point, folder: Path) -> None:
        ran.append(dict(point.values)["tokens_per_block"])
        real(point, folder)

    monkeypatch.setattr(sweep, "run_point", counting)
    assert _sweep(tmp_path, "--vary", "tokens_per_block=16,32,64") == 0
    assert ran == ["64"]
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / sweep.POINTS).iterdir()}
    assert before.items() <= after.items()
    assert [row["tokens_per_block"] for row in _rows(tmp_path)] == ["16", "32", "64"]


def test_a_point_of_another_sweep_goes_by_the_names_of_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sweep(tmp_path, "--vary", "policy=lru,fifo") == 0
    capsys.readouterr()
    assert _sweep(tmp_path, "--vary", "tokens_per_block=64,16") == 0  # the first is the run with lru
    assert "1 of them from before" in (out := capsys.readouterr().out)
    assert "policy" not in out
    assert [(row["tokens_per_block"], "policy" in row) for row in _rows(tmp_path)] == [
        ("64", False),
        ("16", False),
    ]


def test_seeds_go_on_from_the_one_that_is_given(tmp_path: Path) -> None:
    seeded = [*WORKLOAD, "--workload-seed", "3"]
    assert _sweep(tmp_path, "--seeds", "2", workload=seeded) == 0
    both = _rows(tmp_path)
    assert [row["seed"] for row in both] == ["3", "4"]
    assert _sweep(tmp_path, workload=seeded) == 0
    assert _rows(tmp_path) == both[:1]


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sweep.run_point

    def interrupted(point: sweep.Point, folder: Path) -> None:
        if dict(point.values)["tokens_per_block"] == "32":
            raise KeyboardInterrupt
        real(point, folder)

    monkeypatch.setattr(sweep, "run_point", interrupted)
    assert _sweep(tmp_path, "--vary", "tokens_per_block=16,32,64") == 130
    assert len(list((tmp_path / sweep.POINTS).iterdir())) == 1
    assert not (tmp_path / sweep.TABLE).exists()
    monkeypatch.setattr(sweep, "run_point", real)
    assert _sweep(tmp_path, "--vary", "tokens_per_block=16,32,64") == 0
    assert len(_rows(tmp_path)) == 3


def test_a_trace_file_that_changed_is_run_again(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n")
    flags = ["--num-blocks", "300", "--format", "azure"]
    assert _sweep(tmp_path / "out", workload=[str(trace), *flags]) == 0
    trace.write_text(trace.read_text() + "2023-11-16 18:17:04.9799600,480,10\n")
    assert _sweep(tmp_path / "out", workload=[str(trace), *flags]) == 0
    assert [row["requests"] for row in _rows(tmp_path / "out")] == ["2"]


def test_quantiles_of_students_t() -> None:
    """Against the distribution itself, integrated."""
    for degrees in (1, 2, 5, 10, 11, 15, 30, 100):
        quantile = t_quantile(degrees)
        x = np.linspace(0.0, quantile, 200_001)
        log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        density = (
            np.exp(log_scale) / math.sqrt(degrees * math.pi) * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        )
        below = 0.5 + float(((density[1:] + density[:-1]) / 2).sum() * (x[1] - x[0]))
        assert below == pytest.approx(0.975, abs=2e-5), degrees


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for sample in rng.normal(10.0, 3.0, (2000, 5)):
        middle, half = interval(sample.tolist())
        assert half is not None
        covered += abs(middle - 10.0) <= half
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
    assert interval([3.0]) == (3.0, None)


@pytest.mark.parametrize(
    ("flags", "workload", "message"),
    [
        (["--vary", "policy"], WORKLOAD, "vary (policy) must be NAME=V1,V2,..."),
        (["--vary", "policy=lru,"], WORKLOAD, "vary (policy=lru,) must be NAME=V1,V2,..."),
        (["--vary", "policy=lru", "--vary", "policy=fifo"], WORKLOAD, "gives policy a second time"),
        (["--vary", "policy=lru,nothing"], WORKLOAD, "policy (nothing) must be"),
        (["--seeds", "0"], WORKLOAD, "seeds (0) must be at least 1"),
        (["--seeds", "2"], ["trace.csv"], "seeds (2) must be 1 for a trace file"),
        (["--metrics", "nothing"], WORKLOAD, "metric (nothing) must be one of"),
        (["--metrics", "ttft_s"], WORKLOAD, "metric (ttft_s) must be one of ttft_s.mean"),
        ([], [*WORKLOAD, "--out", "x"], "out (after --) must not be given"),
        ([], [*WORKLOAD, "--warm-up-requests", "12"], "warm_up_requests (12) must leave some of 12 requests"),
        ([], [*WORKLOAD, "--prometheus=x"], "prometheus (after --) must not be given"),
        (["--vary", "out=a,b"], WORKLOAD, "vary (out=a,b) must name a flag that decides what comes of a run"),
        (
            ["--vary", "nope=1,2"],
            WORKLOAD,
            "vary (nope=1,2) must name a flag of sim.replay, and nope is none",
        ),
        (["--vary", "num-block=9"], WORKLOAD, "and num_block is none (did you mean num_blocks?)"),
        (
            ["--vary", "figures=yes,no"],
            WORKLOAD,
            "vary (figures=yes,no) must give figures the values True and False",
        ),
        (["--seed", "1"], WORKLOAD, "unrecognized options: --seed, 1; perhaps you meant: --seeds INT"),
        (
            [],
            [*WORKLOAD, "--seed", "1"],
            "unrecognized options: --seed, 1; perhaps you meant: --workload-seed",
        ),
        (["--vary", "policy=lru,fifo, lru"], WORKLOAD, "(policy=lru,fifo, lru) must give each value once"),
        (
            ["--vary", "workload-seed=1,2", "--seeds", "2"],
            WORKLOAD,
            "seeds (2) must be 1 where workload_seed",
        ),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], workload: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sweep(tmp_path, *flags, workload=workload) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\n" not in error.strip()


def test_flags_that_are_on_or_off_vary(tmp_path: Path) -> None:
    varied = ["--vary", "enable-partial-reuse=True,False", "--vary", "mixed_steps=False"]
    assert _sweep(tmp_path, *varied) == 0
    found = sweep.points(sweep.Config(tmp_path, vary=tuple(varied[1::2])), WORKLOAD)
    given = [(point.spec.cache.enable_partial_reuse, point.spec.engine.mixed_steps) for point in found]
    assert given == [(True, False), (False, False)]
    assert len(list((tmp_path / sweep.POINTS).iterdir())) == 2


def test_the_replays_flags_come_after_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--out", "x"]) == 2
    assert "-- must follow" in capsys.readouterr().err


def test_a_damaged_point_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _sweep(tmp_path) == 0
    (point,) = (tmp_path / sweep.POINTS).iterdir()
    point.write_text("{")
    assert _sweep(tmp_path) == 2
    assert f"point ({point}) is damaged" in capsys.readouterr().err
