"""What all command lines do alike: end in one line on Ctrl-C, however early it comes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments import routing
from experiments.bench import simulator
from sim.command_line import parse_dataclass, parse_plainly, require_writable, run_command
from sim.parser_errors import in_one_line

COMMANDS = (
    "sim.replay",
    "experiments.demo",
    "experiments.memory_savings",
    "experiments.kernel_replay",
    "experiments.bench.simulator",
    "experiments.tools.calibrate",
    "experiments.tools.fuzz",
    "experiments.tools.serial_replay",
    "experiments.tools.sweep",
    "kernels.compile",
)

INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "numpy.linalg":  # well inside the imports that take their time
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_during_the_imports_is_one_line(module: str) -> None:
    needed = {"sim.replay": ["synthetic", "--out", "unused"], "kernels.compile": ["--arch", "sm_90"]}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, *needed.get(module, [])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (130, "", 1), done.stderr
    assert done.stderr.startswith("interrupted")


@pytest.mark.parametrize(
    ("name", "status", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_a_command_that_runs_can_clean_up_when_it_has_to_end(name: str, status: int, said: str) -> None:
    script = (
        "import os, signal\n"
        "from sim.command_line import answer_interrupts, run_command\n"
        "answer_interrupts()\n"
        "def action():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "raise SystemExit(run_command(action))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "cleaned up\n")
    assert done.stderr == f"{said}: the result is not complete\n"


def test_the_outermost_dataclass_refuses_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^replicas \(0\) must be at least 2$"):
        parse_dataclass(routing.Config, "routing", ["--replicas", "0"])
    with pytest.raises(ValueError, match=r"^--replicas INT: invalid literal .* \(routing --help explains\)$"):
        parse_dataclass(routing.Config, "routing", ["--replicas", "many"])


def test_what_is_not_the_parsers_box_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def gives_up() -> None:
        print("something else", file=sys.stderr)
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        parse_plainly("program", gives_up)
    assert capsys.readouterr().err == "something else\n"
    assert in_one_line("", "program") is None
    assert in_one_line("│ a frame, but no help", "program") is None
    assert in_one_line("\x1b[31m│\x1b[0m It broke. │\n│ ── │\n│ For full helptext, see │", "program") == (
        "it broke (program --help explains)"
    )


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: bytearray(1 << 62)) == 2
    assert capsys.readouterr().err == "error: there is not enough memory\n"


def test_a_reader_that_wants_no_more_ends_a_command_in_silence() -> None:
    reader = subprocess.Popen(
        [sys.executable, "-m", "experiments"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    reader.stdout.close()
    assert reader.stderr is not None
    assert reader.stderr.read() == ""
    assert reader.wait() == 141


def test_a_file_that_cannot_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("earlier")
    require_writable("json", kept)
    require_writable("json", tmp_path / "new.json")
    for bad in (tmp_path, tmp_path / "none" / "x.json", kept / "x.json"):
        with pytest.raises(ValueError, match=r"json \(.*\) cannot be written: "):
            require_writable("json", bad)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert kept.read_text() == "earlier"


@pytest.mark.parametrize(
    ("flag", "name", "answer"),
    [
        ("--json", "no/x.json", r"json \(.*/no/x.json\) cannot be written: No such file or directory"),
        ("--trace", "no.jsonl", ".*/no.jsonl: cannot be read: No such file or directory"),
        ("--trace", "bad.jsonl", ".*/bad.jsonl:2: .*"),
    ],
)
def test_the_bench_finds_out_before_it_times_anything(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flag: str,
    name: str,
    answer: str,
) -> None:
    row = '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n'
    (tmp_path / "bad.jsonl").write_text(row + row.replace("5", "0"))
    monkeypatch.setattr(simulator, "cases", lambda config: pytest.fail("it has begun to time"))
    assert simulator.main([flag, str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {answer}\n", err), err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
def test_the_bench_names_the_file_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "cases", lambda config: [])
    with pytest.raises(ValueError, match=r"^json \(/dev/full\) cannot be written: No space left on device$"):
        simulator.run(simulator.Config(json=Path("/dev/full"), modes="interpreted"), Console())
