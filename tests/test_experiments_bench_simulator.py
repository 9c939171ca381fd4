"""The simulator's benchmark: what it times, in which mode, and what it writes of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import simulator
from experiments.bench.simulator import Case, Config
from sim.compiled.packages import sources

CASE = Case("a few", 30, 10.0, output_tokens=8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "cases", lambda config: [CASE])


def test_what_is_interpreted_is_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    (timing,) = simulator.run(Config(runs=2, modes="interpreted", json=path), Console(width=200))
    assert (timing.workload, timing.requests, timing.compiled) == ("a few", 30, False)
    assert 0 < timing.wall_s_min <= timing.wall_s <= timing.wall_s_max
    assert timing.ms_per_request == pytest.approx(timing.wall_s / 30 * 1e3)
    assert timing.us_per_step == pytest.approx(timing.wall_s / timing.steps * 1e6)
    (written,) = json.loads(path.read_text())
    assert written["workload"] == "a few"
    assert written["compiled"] is False
    out = capsys.readouterr().out
    assert out.split("\n")[0].strip() == "interpreted"
    assert f"{timing.steps:,}" in out


def test_every_case_runs_from_each_folder_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiled packages' here are copies that say of themselves that they are compiled."""
    made = tmp_path / "made"
    for package in ("allocator", "sim"):
        shutil.copytree(sources() / package, made / package, ignore=shutil.ignore_patterns("__pycache__"))
    info = made / "sim" / "build_info.py"
    info.write_text(info.read_text().replace('suffix != ".py"', 'suffix == ".py"'))
    monkeypatch.setattr(simulator, "compiled_packages", lambda root, console: made)
    first, second = simulator.run(Config(runs=1), Console(width=200))
    assert (first.compiled, second.compiled) == (True, False)
    assert first.steps == second.steps
    titles = [
        line.strip()
        for line in capsys.readouterr().out.split("\n")
        if "compiled" in line or "interpr" in line
    ]
    ratio = first.wall_s / second.wall_s
    assert titles == [
        "compiled",
        "interpreted",
        f"Compiled takes {ratio:.2f} to {ratio:.2f} of the interpreted time.",
    ]


def test_without_a_compiler_the_sources_are_timed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(root: Path, console: Console) -> Path:
        raise ValueError("mypyc is not installed")

    monkeypatch.setattr(simulator, "compiled_packages", refuse)
    (timing,) = simulator.run(Config(runs=1), Console(width=200))
    assert not timing.compiled
    assert "compiled: not timed, as mypyc is not installed\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^mypyc is not installed$"):
        simulator.run(Config(runs=1, modes="compiled"), Console())
