"""python -m sim.traces: describe, convert, generate; one line and exit status 2 for what is no good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from trace_cases import ANY_CSV, MOONCAKE, TEXTS, same_requests, write

import sim.traces.commands
from sim.traces import read_trace
from sim.traces.__main__ import main
from sim.traces.native import REQUIRED, SCHEMA, NativeFormat
from sim.traces.reader import CSV_FORMATS, FORMATS, JSON_FORMATS
from sim.workload import WorkloadConfig, generate


def test_describe_prints_text_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, MOONCAKE))
    assert main(["describe", path]) == 0
    shown = capsys.readouterr().out
    assert "0.429 of chunks, 0.598 of tokens" in shown
    assert "1.02 / 0 / 3.05 / 3.05 / 3.05 s (mean / p50 / p90 / p99 / max)" in shown
    assert main(["describe", path, "--json", "--num-requests", "2"]) == 0
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
    for flag, value, rule in [
        ("--turns-mean", "0.5", "turns_mean (0.5) must be "),
        ("--num-requests", "0", "num_requests (0) must be "),
    ]:
        assert main(["generate", str(out), flag, value]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {rule}")
        assert said.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/absent: cannot be read: No such file or directory\n"
    source = write(tmp_path, MOONCAKE)
    assert main(["convert", str(source), str(tmp_path / "no" / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/no/out cannot be written: No such file or directory\n"
    )
    assert main(["describe", str(source), "--num-request", "3"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        "error: unrecognized options: --num-request, 3; perhaps you meant: --num-requests "
    )
    assert main(["describ", str(source)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: unrecognized options: describ, {source}; available subcommands: describe, convert, generate "
        "(python -m sim.traces --help explains)"
    )


def test_an_empty_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write(tmp_path, MOONCAKE))
    for arguments, name in [
        (["describe", ""], "trace"),
        (["convert", "", "."], "trace"),
        (["convert", ".", ""], "out"),
        (["convert", source, ""], "out"),
        (["generate", ""], "out"),
    ]:
        assert main(arguments) == 2
        rule = "must name a place: an empty path is the working directory"
        assert capsys.readouterr().err == f"error: {name} ('') {rule}\n"


def test_a_name_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, MOONCAKE)
    odd = source.rename(tmp_path / os.fsdecode(b"r\xff"))
    shown = f"{tmp_path}/r\\udcff"
    for arguments, name in [
        (["describe", odd], "trace"),
        (["convert", odd, tmp_path / "out"], "trace"),
        (["convert", tmp_path / "none", odd], "out"),
        (["generate", odd], "out"),
    ]:
        assert main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err == f"error: {name} ({shown}) must be UTF-8 text\n"
    assert odd.read_text() == MOONCAKE


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("describe", "convert", "generate"))


def test_help_of_convert_says_what_each_format_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, kind in FORMATS.items():
        assert f"{name}: {' '.join(kind.explained().split())}" in shown
    for kind in JSON_FORMATS:
        needed, _, optional = kind.explained().partition("; if it is there, ")
        assert all(f"{key} (" in needed for key in kind.needs)
        assert all(f"{key} (" in optional for key in kind.takes)
    for csv in CSV_FORMATS:
        assert all(column in csv.describes for column in csv.columns)
    required, _, optional = NativeFormat.explained().partition("Columns that may be absent:")
    assert all(f"{name} (" in (required if name in REQUIRED else optional) for name in SCHEMA)


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_what_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the trace must not be made")

    for name in ("read_trace", "generate"):
        monkeypatch.setattr(sim.traces.commands, name, never)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading, writing = os.pipe()
    source = [str(write(tmp_path, MOONCAKE))] if command == "convert" else []
    for out, reason in [
        (pipe, "it exists and is not a regular file"),
        (Path(f"/dev/fd/{writing}"), "it exists and is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "out", "No such file or directory"),
        (tmp_path / ("n" * 256), "File name too long"),
    ]:
        assert main([command, *source, str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out} cannot be written: {reason}\n"
    os.close(reading)
    os.close(writing)


def test_a_trace_is_not_converted_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, link, hard = write(tmp_path, MOONCAKE), tmp_path / "link", tmp_path / "hard"
    link.symlink_to(source)
    hard.hardlink_to(source)
    before = source.read_bytes()
    for trace, out in [
        (source, source),
        (source, link),
        (source, hard),
        (hard, link),
        (link, tmp_path / ".." / tmp_path.name / source.name),
    ]:
        assert main(["convert", str(trace), str(out)]) == 2
        assert capsys.readouterr().err == f"error: OUT ({out}) must not be the trace that is read\n"
    assert source.read_bytes() == before
    assert hard.samefile(source)


def test_a_line_end_in_a_name_does_not_break_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two\nlines.parquet"
    assert main(["generate", str(out), "--num-requests", "1"]) == 0
    assert capsys.readouterr().out == f"1 requests written to {tmp_path}/two lines.parquet\n"
    assert main(["describe", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["trace", "two", "lines", "(native)"]


def program(*arguments: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sim.traces", *arguments], stderr=subprocess.PIPE, text=True, **streams
    )


@pytest.mark.parametrize("options", [[], ["--help"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, options: list[str]) -> None:
    kept, closed = os.pipe()
    os.close(kept)
    with program("describe", str(write(tmp_path, MOONCAKE)), *options, stdout=closed) as running:
        os.close(closed)
        assert running.communicate() == (None, "")
    assert running.returncode == 141  # as a command that SIGPIPE ended


def test_output_that_finds_no_room_is_one_line(tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("w") as full,
        program("describe", str(write(tmp_path, MOONCAKE)), stdout=full) as running,
    ):
        error = "error: standard output cannot be written: No space left on device\n"
        assert running.communicate() == (None, error)
    assert running.returncode == 2


def test_an_interrupt_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sim.traces.commands, "read_trace", interrupted)
    assert main(["describe", str(write(tmp_path, MOONCAKE))]) == 130
    assert capsys.readouterr().err == "interrupted: the result is not complete\n"


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    options = ["--num-requests", "100000000", "--requests-per-s", "1000"]
    with program("generate", str(tmp_path / "out"), *options) as running:
        while running.poll() is None and not any(
            file.stat().st_size for file in tmp_path.glob(".unfinished-*")
        ):
            sleep(0.01)
        running.send_signal(signal.SIGINT)
        assert running.communicate() == (None, "interrupted: the result is not complete\n")
    assert running.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_import_is_one_line() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sim.traces", "describe", "absent"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:  # one for each module: the first of numpy's is early among all
            if "numpy" in line:
                break
        running.send_signal(signal.SIGINT)
        last = [line for line in running.stderr if not line.startswith("import time:")]
    assert last == ["interrupted: the result is not complete\n"]
    assert running.returncode == 130


def test_the_program_starts_without_the_libraries() -> None:
    check = "import sys, sim.traces.__main__; print({'numpy', 'polars', 'tyro'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "set()\n"
