"""The routing experiment: its runs, its table and picture, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import routing
from experiments.routing import Config, compare, comparison, report
from sim.style import styled

SMALL = ["--requests", "60", "--replicas", "2", "--loads", "10", "40"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing") / "out"
    routing.routing([*SMALL, "--out", str(folder)])
    return folder


def _config(out: Path) -> Config:
    return Config(out, replicas=2, requests=60, loads=(10.0, 40.0))


def test_it_leaves_a_file_a_run_and_a_picture(out: Path) -> None:
    assert len(list((out / "points").iterdir())) == 6
    assert {path.name for path in out.iterdir()} == {"points", "routing.png", "routing.svg"}


def test_what_is_there_is_not_run_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = routing.run_point
    monkeypatch.setattr(routing, "run_point", lambda *args: (ran.append(args[0].values), real(*args)))
    first = compare(_config(out))
    assert ran == []
    gone = sorted((out / "points").iterdir())[2]
    gone.unlink()
    again = compare(_config(out))
    assert len(ran) == 1
    for name, summaries in first.items():
        for one, other in zip(summaries, again[name], strict=True):
            assert {key: one[key] for key in one if "wall" not in key} == {
                key: other[key] for key in other if "wall" not in key
            }


def test_the_table_and_the_picture_say_what_the_runs_did(out: Path) -> None:
    config = _config(out)
    summaries = compare(config)
    lines = report(summaries, config).splitlines()
    assert [line.split()[0] for line in lines[-6:]] == ["10"] * 3 + ["40"] * 3
    for at in (0, 1):
        assert (
            summaries["longest_prefix"][at]["hit_rate_tokens"]
            > (summaries["round_robin"][at]["hit_rate_tokens"])
        )
        assert len(summaries["least_loaded"][at]["replicas"]) == 2
    with styled():
        hits, waits = comparison(summaries, config).axes
    for axes, names in ((hits, ("hit_rate_tokens",)), (waits, ("ttft_s", "p99"))):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for name, label in routing.LABELS.items():
            values = summaries[name]
            for key in names:
                values = [value[key] for value in values]
            assert drawn[label] == values


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"replicas": 1}, r"replicas \(1\) must be"),
        ({"requests": 0}, r"requests \(0\) must be"),
        ({"loads": (4.0, 0.0)}, r"loads \(\(4.0, 0.0\)\) must be one or more, all above 0"),
    ],
)
def test_bad_figures(fields: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Config(**fields)
