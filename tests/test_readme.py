"""The README: what it says that commands print is what they print, and what it tells people to write works."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

import allocator
import sim.style
from allocator.fuzz import run_machine
from experiments import __main__ as experiments_main
from experiments import demo, memory_savings
from experiments.tools import sweep
from sim.replay import main as replay
from sim.style import words

README = Path(__file__).parent.parent / "README.md"

if not README.exists():
    pytest.skip("the README is not here: the tests run apart from the sources", allow_module_level=True)

TEXT = README.read_text(encoding="utf-8")
PICTURES = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)


def block(name: str) -> str:
    """Return the code block behind the comment of that name."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```", TEXT, flags=re.DOTALL)
    assert found, f"README has no block {name}"
    return found[1]


def test_the_demo_prints_and_draws_this(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: dict[str, list[str]] = {}

    def look(figure: Figure, stem: Path) -> list[Path]:
        drawn.setdefault(stem.name, []).append(words(figure))
        return []

    monkeypatch.setattr(sim.style, "save", look)  # pixels differ between fonts and take their time
    # What the kernels compute, and so the last line, is compared in test_experiments_kernel_replay.
    monkeypatch.setattr(demo, "kernel_line", lambda: block("demo").splitlines()[-1])
    demo.demo(["--out", str(tmp_path)])
    printed = capsys.readouterr().out.replace(str(tmp_path), "results/demo")
    printed, shown = (re.sub(r"[\d.]+ s in all", "N s in all", text) for text in (printed, block("demo")))
    assert printed.split() == shown.split()
    for path in PICTURES:
        with Image.open(README.parent / path) as picture:
            assert picture.text["Description"] in drawn[Path(path).stem], f"{path} is of another run"


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

    tally = run_machine(MRUMachine, steps=600, seed_=1)
    assert tally.evictions > 0


def test_the_policy_simulates(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = policy_folder / "results"
    arguments = ["synthetic", "--num-requests", "50", "--num-blocks", "200", "--policy", "my_policy:MRU"]
    assert replay([*arguments, "--no-figures", "--out", str(out)]) == 0
    assert (out / "summary.json").exists()


def test_the_routing_policy_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_routing.py").write_text(block("routing"))
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["synthetic", "--num-requests", "50", "--num-replicas", "4", "--no-figures"]
    routing = ["--routing", "my_routing:SharedFirst"]
    assert replay([*arguments, *routing, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "summary.json").exists()


def test_the_cost_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_cost.py").write_text(block("cost"))
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["synthetic", "--num-requests", "50", "--no-figures"]
    for name, cost in (("slow", ["--cost", "my_cost:SlowHost"]), ("plain", [])):
        assert replay([*arguments, *cost, "--out", str(tmp_path / name)]) == 0
    slow, plain = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("slow", "plain"))
    gain = slow["tpot_s"]["p50"] - plain["tpot_s"]["p50"]
    assert gain == pytest.approx(200e-6, rel=0.5)


def test_the_policy_is_compared_from_a_folder_of_ones_own(policy_folder: Path) -> None:
    """With nothing but the README's file there, by the README's command."""
    (policy_folder / "test_my_policy.py").unlink()
    rows = [[i % 5, 5 + i % 3, 9 + i % 2] for i in range(60)]
    (policy_folder / "trace.jsonl").write_text(
        "".join(
            json.dumps({"timestamp": i, "input_length": 1500, "output_length": 5, "hash_ids": ids}) + "\n"
            for i, ids in enumerate(rows)
        )
    )
    (command,) = re.findall(r"\.venv/bin/python -m (experiments\.tools\.serial_replay) TRACE (.*)", TEXT)
    flags = ["trace.jsonl", *command[1].split(), "--num-blocks", "6"]
    done = subprocess.run(
        [sys.executable, "-m", command[0], *flags],
        capture_output=True,
        text=True,
        cwd=policy_folder,
        env=os.environ | {"PYTHONPATH": str(Path(allocator.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("─") + 1 :].strip().splitlines()
    hits = {" ".join(row[:-1]): float(row[-1]) for row in map(str.split, table)}
    assert list(hits) == ["lru", "my_policy:MRU", "belady", "weighted_belady", "offline bound"]
    assert 0 < hits["my_policy:MRU"] <= hits["offline bound"]
    assert hits["lru"] < hits["my_policy:MRU"]  # prefixes that come round in a fixed order


def swept(flag: str, folder: str, out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the sweep whose first flag varies this, and return the words that it prints."""
    (command,) = re.findall(rf"-m experiments\.tools\.sweep (--vary {flag}.*?)\n```", TEXT, flags=re.DOTALL)
    arguments = shlex.split(command.replace("\\\n", " ").replace(folder, str(out)))
    assert sweep.main(["--jobs", "1", "--no-figures", *arguments]) == 0
    return capsys.readouterr().out.split()


def test_a_sweep_prints_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = swept("tokens_per_block", "results/sweep", tmp_path, capsys)
    shown = block("sweep").split()
    assert [word for word in printed if word in shown] == shown
    # What it is to show: no two combinations could be mistaken for each other.
    rates = [re.findall(r"[\d.]+", line)[1:3] for line in block("sweep").splitlines()[1:]]
    spans = sorted((float(mean) - float(half), float(mean) + float(half)) for mean, half in rates)
    assert all(below[1] < above[0] for below, above in pairwise(spans))


def test_what_keeping_system_prompts_brings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = swept("head_priority", "results/kept", tmp_path, capsys)
    shown = block("retention").split()
    assert [word for word in printed if word in shown] == shown


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_blocks_are_rebuilt_from_the_table_of_events(
    replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["synthetic", "--num-requests", "50", "--num-blocks", "64", "--num-replicas", str(replicas)]
    assert replay([*flags, "--events", "--no-figures", "--out", "results/mine"]) == 0
    capsys.readouterr()
    code = block("events")
    if replicas > 1:
        assert "`read_events(path, replica=1)`" in TEXT
        code = code.replace('.parquet")', '.parquet"), replica=1')
    exec(compile(code, "README.md", "exec"), {})
    counts = ast.literal_eval(capsys.readouterr().out)
    assert sum(counts.values()) == 64
    assert counts["free"] < 64, "ten seconds into the run, blocks hold something"


def test_what_a_manifest_does_not_hold_has_to_be_asked_for_again(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    asked = ["--perfetto", "--prometheus", str(tmp_path / "counters.prom")]
    flags = ["synthetic", "--num-requests", "20", "--no-figures", "--events"]
    assert replay([*flags, *asked, "--out", str(first)]) == 0
    (tmp_path / "counters.prom").unlink()
    manifest = ["--from-manifest", str(first / "manifest.json"), "--no-figures"]
    assert replay([*manifest, "--out", str(again)]) == 0
    assert "what `--perfetto` and `--prometheus` add has to be asked for again" in " ".join(TEXT.split())
    names = [{path.name for path in folder.iterdir()} for folder in (first, again)]
    assert names[0] - names[1] == {"timeline.perfetto-trace"}
    assert not (tmp_path / "counters.prom").exists()


def test_the_keys_of_the_summary_are_explained() -> None:
    (name,) = re.findall(r"`\.venv/bin/python -m pydoc ([\w.]+)`", TEXT)
    done = subprocess.run(
        [sys.executable, "-m", "pydoc", name],
        capture_output=True,
        text=True,
        cwd=Path(allocator.__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for key in ("requests", "ttft_s", "goodput", "miss_blocks", "internal_fragmentation", "replicas"):
        assert re.search(rf"^    (\w+, )*{key}\b", done.stdout, re.MULTILINE), key


@pytest.mark.parametrize("name", ["requests", "timeline"])
def test_the_tables_have_these_columns(name: str, tmp_path: Path) -> None:
    flags = [
        "synthetic",
        "--num-requests",
        "20",
        "--num-replicas",
        "2",
        "--prefill-replicas",
        "1",
        "--no-figures",
    ]
    assert replay([*flags, "--out", str(tmp_path)]) == 0
    table = re.search(rf"\| column of `{name}\.parquet` .*?\n\n", TEXT, flags=re.DOTALL)
    assert table
    first_cells = [row.split("|")[1] for row in table[0].strip().splitlines()[2:]]
    explained = [column for cell in first_cells for column in re.findall(r"`(\w+)`", cell)]
    assert sorted(explained) == sorted(pl.read_parquet_schema(tmp_path / f"{name}.parquet"))


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
