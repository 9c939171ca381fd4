"""The compiled modules: found by content, complete or not there, with the results of those they are made from."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console
from user_classes import CLASSES

from experiments.tools import compiled
from sim.compiled import build
from sim.compiled.build import MODULES, compiled_packages, opened
from sim.compiled.packages import INTERPRETED_VARIABLE, digest, environment, find, folder, seal, sources

QUIET = Console(quiet=True)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the sources."""
    for package in ("allocator", "sim"):
        shutil.copytree(
            sources() / package, tmp_path / "copy" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "copy"


@pytest.mark.parametrize("module", MODULES)
def test_every_class_is_open_to_subclasses_that_are_not_compiled(module: str) -> None:
    """But protocols, which nobody makes instances of, and tuples with names, which are none of mypyc's classes."""
    found = 0
    for node in ast.parse(opened((sources() / module).read_text())).body:
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            decorators = {ast.unparse(each) for each in node.decorator_list}
            is_open = "mypyc_attr(allow_interpreted_subclasses=True)" in decorators
            assert is_open != bool(bases & {"Protocol", "NamedTuple"}), node.name
            found += is_open
    assert found or module in ("allocator/births.py", "allocator/manager.py")


@pytest.mark.parametrize("module", MODULES)
def test_lines_keep_their_numbers(module: str) -> None:
    """So that a traceback names the right ones."""
    before = (sources() / module).read_text().splitlines()
    after = opened("\n".join(before)).splitlines()
    different = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    assert {a for a, _ in different} <= {"", "from __future__ import annotations", "@with_field_docs"}
    assert len(after) >= len(before)


def test_the_digest_follows_every_source(copy: Path) -> None:
    before = digest(copy)
    assert digest(copy) == before == digest(sources())
    path = copy / "sim" / "hardware.py"  # not compiled itself, but compiled modules go by its types
    path.write_text(path.read_text() + "\n")
    changed = digest(copy)
    assert changed != before
    path.rename(path.with_name("other.py"))
    assert digest(copy) not in (before, changed)


def test_mypyc_takes_every_module(copy: Path) -> None:
    """It makes C of them; that C is compiled, and run, with --run-slow."""
    for module in MODULES:
        (copy / module).write_text(opened((copy / module).read_text()))
    code = f"from mypyc.build import mypycify; mypycify({['--ignore-missing-imports', *MODULES]})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(path.stat().st_size for path in (copy / "build").glob("__native*.c")) > 10**6


def test_nothing_is_left_of_what_does_not_compile(cache: Path, copy: Path) -> None:
    (copy / "allocator" / "ring.py").write_text("class LastSlots(:\n")
    with pytest.raises(
        ValueError, match=r"^allocator and sim do not compile: allocator/ring.py:\d+: error: "
    ):
        compiled_packages(copy, QUIET)
    assert list(cache.iterdir()) == []


def test_what_was_compiled_is_not_compiled_again(
    cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def compile_nothing(where: Path) -> None:
        made.append(where)
        (where / "build").mkdir()

    monkeypatch.setattr(build, "_compile", compile_nothing)
    assert find(copy) is None
    first = compiled_packages(copy, QUIET)
    assert find(copy) == first
    assert (first / "sim" / "replica.py").exists()
    assert not (first / "build").exists()
    assert compiled_packages(copy, QUIET) == first
    (copy / "allocator" / "more.py").touch()
    assert find(copy) is None
    assert compiled_packages(copy, QUIET) != first
    assert len(made) == 2
    assert len(list(cache.iterdir())) == 2


def test_what_is_damaged_is_compiled_again(cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda where: (where / "build").mkdir())
    made = compiled_packages(copy, QUIET)
    (made / "sim" / "replay.py").unlink()
    assert compiled_packages(copy, QUIET) == made == find(copy)
    assert list(cache.iterdir()) == [made]


def test_a_cache_that_cannot_be_written_is_named(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"^the cache \(.*/file/paged-kv-lab/compiled\) cannot be written: Not a "
    ):
        compiled_packages(copy, QUIET)


def test_a_machine_without_a_c_compiler_is_told(
    cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-compiler -O2")
    with pytest.raises(ValueError, match=r"^no-compiler is not installed, and compiling needs a C compiler"):
        compiled_packages(copy, QUIET)


def test_what_nobody_has_used_for_a_month_is_removed(
    cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compile", lambda where: (where / "build").mkdir())
    first = compiled_packages(copy, QUIET)
    (copy / "sim" / "more.py").touch()
    second = compiled_packages(copy, QUIET)
    for made in (first, second):
        os.utime(made, (0, 0))
    assert find(copy) == second  # it is used
    (copy / "sim" / "other.py").touch()
    assert {*cache.iterdir(), compiled_packages(copy, QUIET)} - {*cache.iterdir()} == {first}


def test_mypyc_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValueError, match=r"^mypy is not installed, and compiling needs it: pip install "):
        compiled_packages(sources(), QUIET)


@pytest.mark.parametrize("module", ["sim.nothing", "nothing.at.all", "-c", "sim..replay"])
def test_a_command_that_is_none_is_refused_before_anything_is_compiled(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compiled_packages", None)
    with pytest.raises(ValueError, match=rf"^module \({module}\) must be one that python -m can run"):
        compiled.main([module])


def test_the_compiled_packages_are_found_first_and_the_users_modules_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, and by whatever it starts."""
    (tmp_path / "made" / "sim").mkdir(parents=True)
    (tmp_path / "made" / "sim" / "__init__.py").write_text("mine = 1")
    (tmp_path / "my_policy.py").touch()
    monkeypatch.chdir(tmp_path)
    code = (
        "import subprocess, sys; again = [sys.executable, '-P', '-c', 'import sim, my_policy; print(sim.mine)'];"
        "import sim, my_policy, experiments; print(sim.mine, flush=True); subprocess.run(again, check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(tmp_path / "made", sources()),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n1\n", done.stderr


INTERPRETED_ANSWER = "error: missing from python -m sim.replay: --out PATH"
RUNS_COMPILED = "import os, sys; print(sys.argv[1:], os.environ['PAGED_KV_LAB_SOURCES'])"


@pytest.fixture
def made(cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the sources of which there are compiled packages, whose sim.replay says how it was called."""
    target = cache / digest(copy)
    (target / "allocator").mkdir(parents=True)
    (target / "sim").mkdir()
    for name, text in (("__init__", ""), ("replay", RUNS_COMPILED), ("command_line", "raise AssertionError")):
        (target / "sim" / f"{name}.py").write_text(text)
    seal(target)
    monkeypatch.delenv(INTERPRETED_VARIABLE)
    return copy


def outcome(copy: Path, *arguments: str) -> str:
    """Return what Python says when called from another folder, where it finds a copy of the sources first."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": f"{copy}:{sources()}"},
        cwd=copy.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_commands_run_what_has_been_compiled(made: Path) -> None:
    assert outcome(made, "-m", "sim.replay", "a", "b c") == f"['a', 'b c'] {made}\n"
    assert outcome(made, "-W", "ignore", "-m", "sim.replay") == f"[] {made}\n"


def test_commands_run_the_sources_once_they_have_changed(made: Path) -> None:
    path = made / "sim" / "report.py"
    path.write_text(path.read_text() + "\n")
    assert outcome(made, "-m", "sim.replay", "a").startswith(INTERPRETED_ANSWER)


def test_commands_run_the_sources_if_told_to(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for told, obeyed in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(INTERPRETED_VARIABLE, told)
        assert outcome(made, "-m", "sim.replay", "a").startswith(INTERPRETED_ANSWER) == obeyed


@pytest.mark.parametrize("damage", ["gone", "cut short", "not sealed"])
def test_commands_run_the_sources_where_something_compiled_is_damaged(made: Path, damage: str) -> None:
    target = find(made)
    assert target is not None
    if damage == "gone":
        (target / "sim" / "command_line.py").unlink()
    elif damage == "cut short":
        (target / "sim" / "replay.py").write_text("")
    else:
        (target / "contents").unlink()
    assert find(made) is None
    assert outcome(made, "-m", "sim.replay", "a").startswith(INTERPRETED_ANSWER)


@pytest.mark.parametrize("runner", ["cProfile", "pdb"])
def test_what_looks_at_a_command_sees_the_sources(made: Path, runner: str) -> None:
    options = ["-c", "continue", "-c", "quit"] if runner == "pdb" else []
    assert INTERPRETED_ANSWER in outcome(made, "-m", runner, *options, "-m", "sim.replay", "a")


def test_the_fuzzer_sees_the_sources(made: Path) -> None:
    assert outcome(made, "-m", "experiments.tools.fuzz", "--help").startswith("usage: ")


def test_a_machine_without_mypy_has_no_compiled_packages(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert find(made) is not None
    monkeypatch.setattr(metadata, "version", missing)
    assert find(made) is None


def test_compiling_alone_says_what_follows(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "compiled_packages", lambda root, console: cache / "made")
    compiled.main([])
    said = capsys.readouterr().out
    assert said == f"compiled in {cache}/made: commands run it from now on, until the sources change\n"


def test_a_folder_that_path_variables_cannot_name_keeps_to_the_sources(made: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "a:b"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "sim.replay", "a"],
        env=os.environ | {"PYTHONPATH": f"{made}:{sources()}"},
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith(INTERPRETED_ANSWER)


WORKLOAD = ["--num-requests", "400", "--turns-mean", "2", "--sampling-share", "0.1", "--beam-share", "0.1"]
RUNS = """

--policy s3fifo --admission max_utilization --num-blocks 600
--window 256 --num-sinks 16 --no-event-skipping
--host-cache-bytes 2000000000 --num-blocks 400 --preemption swap --admission max_utilization
--enable-partial-reuse --num-blocks 500 --events --block-map-samples 20
--policy priority --head-tokens 64 --head-priority 90 --prompt-priority 10 --prompt-duration-s 5 --num-blocks 500
--policy mine:Mine --num-blocks 400 --cost mine:Slower
--policy gdsf --queue-order longest_prefix --protect-waiting-hits --num-blocks 400
--queue-order shortest --no-mixed-steps --victim cheapest --admission max_utilization --num-blocks 300
--num-replicas 3 --routing longest_prefix --policy sieve --num-blocks 300
--prefill-replicas 1 --num-replicas 3
""".splitlines()[1:]
MINE = """
from allocator.eviction.lru import LRU
from sim.cost import RooflineCost

class Mine(LRU):
    def hit(self, extent):
        super().hit(extent)
        self.hits = getattr(self, "hits", 0) + 1

class Slower(RooflineCost):
    def __init__(self, setting):
        super().__init__(setting.model, setting.gpu)

    def step(self, batch):
        return super().step(batch) + 10**9

    def decode_affine(self, decode_sequences):
        base, slope = super().decode_affine(decode_sequences)
        return base + 10**9, slope
"""
"""Classes of a user, interpreted, of which the second is derived from a compiled one."""


REGISTERS = """
from allocator.batch import Batch
from allocator.content import Content, TokenContent, UniqueContent
from allocator.content_base import History

assert isinstance(TokenContent([1]), Content) and not isinstance(TokenContent([1]), History)
assert not isinstance(UniqueContent(1), TokenContent) and not isinstance([], Batch)
assert type(Batch.add).__name__ == "method_descriptor"  # compiled
"""


@pytest.mark.slow
def test_abstract_classes_know_their_own_instances_alone(tmp_path: Path) -> None:
    """mypyc's would share one register of subclasses."""
    target = compiled_packages(sources(), QUIET)
    done = subprocess.run(
        [sys.executable, "-P", "-c", REGISTERS],
        env=environment(target, sources()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_results_are_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what ran, as the manifest says, and how long that took."""
    trace = tmp_path / "trace.parquet"
    monkeypatch.setenv("PYTHONPATH", str(sources()))
    command = [sys.executable, "-m", "sim.traces", "generate", str(trace), *WORKLOAD]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "mine.py").write_text(MINE)
    for number, options in enumerate(RUNS):
        found = []
        for kind in ([], ["experiments.tools.compiled"]):
            out = tmp_path / f"{number}-{len(kind)}"
            command = [sys.executable, "-m", *kind, "sim.replay", str(trace), "--out", str(out)]
            done = subprocess.run([*command, *options.split()], capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, (options, done.stderr)
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["compiled"] == bool(kind)
            assert manifest["git_revision"] is not None or not (sources() / ".git").exists()
            found.append(
                {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
            )
            del found[-1][Path("manifest.json")]
            summary = json.loads(found[-1].pop(Path("summary.json")))
            found[-1][Path("summary")] = json.dumps(
                {name: value for name, value in summary.items() if not name.endswith("wall_s")}
            ).encode()
        assert found[0].keys() == found[1].keys()
        different = [str(path) for path in found[0] if found[0][path] != found[1][path]]
        assert not different, (options, different)


ANSWERS = {
    "--policy theirs:Stops": "policy (theirs:Stops) failed in victim: StopIteration",
    "--policy theirs:StopsSplitting": "policy (theirs:StopsSplitting) failed in split: StopIteration",
    "--policy theirs:Answers": "policy Answers chose (",
    "--policy theirs:Drains": "",
    "--cost theirs:Short": "cost (theirs:Short): step must take (batch), as sim.cost.StepCost.step does",
    "--cost theirs:Unmade": "cost (theirs:Unmade) failed in step: AttributeError: ",
    "--num-replicas 2 --policy theirs:Stops": "policy (theirs:Stops) failed in victim: StopIteration",
    "--num-replicas 2 --routing theirs:StopsRouting": "routing (theirs:StopsRouting) failed in choose: Stop",
    "--num-replicas 2 --routing theirs:Copies": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["experiments.tools.compiled"]], ids=["interpreted", "compiled"])
@pytest.mark.parametrize("options", ANSWERS)
def test_what_a_user_does_wrong_is_told_in_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, kind: list[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(sources()))
    (tmp_path / "theirs.py").write_text(CLASSES)
    replay = "sim.replay synthetic --num-requests 60 --num-blocks 40 --no-figures --out out"
    replay += " --system-prompts 3 --system-prompt-tokens 128"
    command = [sys.executable, "-m", *kind, *replay.split(), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    answer = ANSWERS[options]
    if answer:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {answer}"), done.stderr
    else:
        assert done.returncode == 0, done.stderr
