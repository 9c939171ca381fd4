"""python -m sim.traces: describe, convert, generate; one line and exit status 2 for what is no good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trace_cases import ANY_CSV, MOONCAKE, TEXTS, same_requests, write

from sim.traces import read_trace
from sim.traces.__main__ import main
from sim.workload import WorkloadConfig, generate


def test_describe_prints_text_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, MOONCAKE))
    assert main(["describe", path]) == 0
    shown = capsys.readouterr().out
    assert "0.429 of chunks, 0.598 of tokens" in shown
    assert "1.02 / 0 / 2.44 / 2.99 / 3.05 s (mean / p50 / p90 / p99 / max)" in shown
    assert main(["describe", path, "--json", "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 2


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_convert_writes_the_native_format(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path, TEXTS[name]), tmp_path / "out.parquet"
    assert main(["convert", str(source), str(out), "--time-scale", "0.5"]) == 0
    count = len(read_trace(source))
    assert capsys.readouterr().out == f"{count} requests written to {out}\n"
    assert same_requests(read_trace(out), read_trace(source, time_scale=0.5))


def test_convert_with_columns_and_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path, ANY_CSV + "12,x,y,3,0\n"), tmp_path / "out.parquet"
    arguments = ["convert", str(source), str(out), "--columns", "arrival=when,prompt=in,output=out"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {source}:4: field 'in' ('x') must be an integer\n"
    assert not out.exists()
    assert main([*arguments, "--skip-bad"]) == 0
    assert capsys.readouterr().out == f"2 requests (1 malformed rows skipped) written to {out}\n"


def test_generate_writes_the_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.parquet"
    assert (
        main(["generate", str(out), "--num-requests", "50", "--turns-mean", "3", "--system-prompts", "2"])
        == 0
    )
    expected = generate(WorkloadConfig(num_requests=50, turns_mean=3.0, system_prompts=2))
    assert same_requests(read_trace(out), expected)
    assert capsys.readouterr().out == f"50 requests written to {out}\n"
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(out), "--turns-mean", "0.5"])
    assert "Error parsing workload: turns_mean (0.5) must be at least 1" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/absent: cannot be read: No such file or directory\n"
    source = write(tmp_path, MOONCAKE)
    assert main(["convert", str(source), str(tmp_path / "no" / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/no/out cannot be written: No such file or directory\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["describe", str(source), "--limmit", "3"])
    assert "--limit" in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("describe", "convert", "generate"))
