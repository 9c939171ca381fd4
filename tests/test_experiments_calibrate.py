"""The calibration command: it finds the times that a machine has, and what it writes is what a replay reads."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import kernels.compile
from experiments.tools import _progress, calibrate
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


def test_without_a_gpu_it_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes days, and says nothing of a GPU, is only done when it is asked for."""
    monkeypatch.setattr(kernels.compile, "_gpu_problem", lambda: "CuPy finds no GPU")
    file = tmp_path / "fit.json"
    assert calibrate.main(["--out", str(file)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "error: backend gpu: CuPy finds no GPU; a calibration is measured on a GPU "
        "(--backend cpu tries the command out, on the CPU runner)\n",
    )
    assert not file.exists()


def test_says_what_is_being_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines come while a point takes its time, not only after it."""
    monkeypatch.setattr(_progress, "EVERY_S", 0.01)
    config = Config(Path("x"), dtype="float32", sequences=(2,), contexts=(1024,), chunks=(8,))
    said = ""

    def slowly(launch: Callable[[], object]) -> float:
        nonlocal said
        seen, deadline = "", monotonic() + 30
        while seen.count("\n") < 2 and monotonic() < deadline:
            sleep(0.005)
            seen += capsys.readouterr().err
        said += seen
        return 1.0

    calibrate.measure(config, Heads(1, 1, 64), "cpu", time=slowly)
    lines = list(dict.fromkeys(said.splitlines()))
    assert lines[0] == "measuring: 0 of 3 points"
    assert lines[-3:] == [
        "measuring: 0 of 3 points; decode of 2 × 1,024 keys",
        "measuring: 1 of 3 points; prefill of 8 tokens, 8 keys",
        "measuring: 2 of 3 points; prefill of 8 tokens, 1,032 keys",
    ]


def test_on_a_terminal_a_bar_names_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)
    monkeypatch.setattr(_progress, "Console", lambda stderr: console)
    with _progress.progress("measuring", 3, "points") as tell:
        tell(2, "decode of 2 × 64 keys")
    assert re.search(r"measuring decode of 2 × 64 keys .*2/3.* points", drawn.getvalue())


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
