"""The README: what it says that commands print is what they print, and what it tells people to write works."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import allocator
from allocator.fuzz import run_machine
from experiments import __main__ as experiments_main
from experiments import demo, memory_savings
from sim.replay import main as replay

README = Path(__file__).parent.parent / "README.md"

if not README.exists():
    pytest.skip("the README is not here: the tests run apart from the sources", allow_module_level=True)

TEXT = README.read_text(encoding="utf-8")


def block(name: str) -> str:
    """Return the code block behind the comment of that name."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```", TEXT, flags=re.DOTALL)
    assert found, f"README has no block {name}"
    return found[1]


def test_the_demo_prints_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.demo(["--out", str(tmp_path / "demo"), "--no-figures"])
    printed = capsys.readouterr().out.replace(str(tmp_path / "demo"), "results/demo")
    # Wall time differs, and so may the last digit of a rounding error on another processor.
    varying = [
        (r"[\d.]+ s in all", "N s in all"),
        (r"error [\d.e-]+", "error E"),
        (r"comparison\.png, and ", ""),
    ]
    shown = block("demo")
    for pattern, constant in varying:
        printed, shown = (re.sub(pattern, constant, text) for text in (printed, shown))
    assert printed.split() == shown.split()


def test_the_experiments_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    experiments_main.main()
    assert capsys.readouterr().out.split() == block("experiments").split()


def test_memory_savings_begins_like_this() -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=120)
    memory_savings.print_example(console)
    assert printed.getvalue().split() == block("memory_savings").split()


@pytest.mark.parametrize("name", ["allocator", "allocator more"])
def test_the_allocator_examples_print_this(name: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block(name), "README.md", "exec"), {})
    assert printed.getvalue() == block(f"{name} output")


def test_the_kernel_example_prints_this() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block("kernel"), "README.md", "exec"), {})
    assert printed.getvalue() == block("kernel output")


@pytest.fixture
def policy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_policy.py").write_text(block("policy"))
    (tmp_path / "test_my_policy.py").write_text(block("fuzz"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_policy_survives_the_machine(policy_folder: Path) -> None:
    from test_my_policy import MRUMachine  # the README's own file

    tally = run_machine(MRUMachine, steps=2000, seed_=1)
    assert tally.evictions > 0


def test_the_policy_simulates(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = policy_folder / "results"
    arguments = ["synthetic", "--num-requests", "50", "--num-blocks", "200", "--policy", "my_policy:MRU"]
    assert replay([*arguments, "--no-figures", "--out", str(out)]) == 0
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(
    "module",
    sorted({m.strip(".") for m in re.findall(r"python -m ((?:sim|experiments|kernels)[a-z_.]*)", TEXT)}),
)
def test_every_command_explains_itself(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        cwd=Path(allocator.__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", re.findall(r"`((?:allocator|sim|kernels|experiments)/[\w./]+)`", TEXT))
def test_every_path_exists(path: str) -> None:
    assert (README.parent / path).exists()


@pytest.mark.parametrize("picture", re.findall(r"!\[.*?\]\((.*?)\)", TEXT))
def test_every_picture_exists(picture: str) -> None:
    assert (README.parent / picture).read_bytes().startswith(b"\x89PNG")
