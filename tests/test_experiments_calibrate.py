"""The calibration command: it finds the times that a machine has, and what it writes is what a replay reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.tools import calibrate
from experiments.tools.calibrate import Config, Heads, Point, fit_linear
from sim.calibration import Calibration
from sim.cost import causal_scores

coefficients = st.tuples(*[st.floats(0.0, 100.0), st.floats(0.001, 1.0), st.floats(1e-6, 1e-2)])


def decode_points(base: float, sequence: float, key: float) -> list[Point]:
    return [
        Point("decode", n, 0, c, base + sequence * n + key * n * c)
        for n in (1, 8, 64)
        for c in (100, 1000, 10_000)
    ]


@given(coefficients)
def test_the_fit_finds_a_linear_machine(true: tuple[float, float, float]) -> None:
    points = decode_points(*true)
    found, error = fit_linear(points)
    assert (found >= 0).all()
    assert error < 1e-6
    for point in points:
        assert np.dot(found, point.features()) == pytest.approx(point.us, rel=1e-6)


def test_no_coefficient_is_negative() -> None:
    # time falls with the number of sequences: the best line would, too
    points = [Point("decode", n, 0, 1000, 100.0 - n) for n in (1, 2, 4, 8, 16)]
    found, _ = fit_linear(points)
    assert (found >= 0).all()
    assert found.sum() > 0


def test_a_prefill_point_counts_pairs_and_keys() -> None:
    pairs, keys = causal_scores(10, 40)
    assert Point("prefill", 1, 10, 40, 1.0).features() == (1.0, float(pairs), float(keys))


def test_the_command_measures_and_writes_what_a_replay_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fit.json"
    flags = ["--out", str(file), "--backend", "cpu", "--dtype", "float32", "--tokens-per-block", "16"]
    flags += ["--sequences", "1", "2", "--contexts", "16", "64", "--chunks", "8", "--repeats", "1"]
    launched = []
    real = calibrate.Stopwatch.__call__

    def counting(self: calibrate.Stopwatch, launch: Callable[[], object]) -> float:
        launched.append(launch())
        return real(self, launch)

    monkeypatch.setattr(calibrate.Stopwatch, "__call__", counting)
    assert calibrate.main([*flags, "--model", "llama-3-8b", "--tensor-parallel-size", "8"]) == 0
    fit = Calibration.read(file)
    assert (fit.calibrated_heads, fit.calibrated_kv_heads, fit.calibrated_head_dim) == (4, 1, 128)
    assert fit.device == "CPU runner"
    points = json.loads(file.read_text())["points"]
    assert len(points) == len(launched) == 4 + 3
    assert all(point["us"] > 0 for point in points)
    assert [point["context"] for point in points if point["kind"] == "prefill"] == [8, 24, 72]
    for out, _ in launched:
        assert np.isfinite(np.asarray(out, np.float64)).all()
    assert "mean error" in capsys.readouterr().out


def test_points_beyond_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_MOST_POOL_BYTES", 2 * 64 * 4 * 100)
    config = Config(Path("x"), dtype="float32", sequences=(1, 2), contexts=(64, 128), chunks=(8,))
    points = calibrate.measure(config, Heads(1, 1, 64), "cpu", time=lambda launch: 1.0)
    assert [(p.kind, p.sequences, p.context) for p in points] == [
        ("decode", 1, 64),
        ("prefill", 1, 8),
        ("prefill", 1, 72),
    ]
    with pytest.raises(ValueError, match=r"^decode points \(1\) must be at least 3"):
        calibrate.calibrate(config, points, Heads(1, 1, 64), "d", "1")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (["--repeats", "0"], "repeats (0) must be at least 1"),
        (["--contexts", "0"], "contexts (0) must be at least 1"),
        (["--model", "nothing"], "nothing"),
        (["--out", "/nonexistent/x.json"], "out (/nonexistent/x.json) cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    change: list[str], rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path / "fit.json"), "--backend", "cpu"]
    assert calibrate.main([*given, *change]) == 2
    error = capsys.readouterr().err
    assert rule in error
    assert error.count("\n") == 1
    assert not (tmp_path / "fit.json").exists()


def test_the_calibration_names_every_field_it_fits() -> None:
    names = {field.name for field in dataclasses.fields(Calibration)}
    assert {f"{kind}_{part}_us" for kind, part in [("decode", "base"), ("prefill", "pair")]} <= names
