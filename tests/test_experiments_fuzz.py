"""The fuzzing command: what it counts, and how it tells what it found."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator.eviction import LRU
from allocator.fuzz import SharingMachine, Tally
from allocator.manager import KVCacheManager, KVSequence
from allocator.prefix import Extent
from experiments.tools import _program, _progress, fuzz
from sim.command_line import Terminated


class Greedy(LRU):
    """A policy with a bug: it takes a block more than it may."""

    def victim(self, wanted: int) -> tuple[Extent, int]:
        return super().victim(wanted)[0], wanted + 1


def test_a_clean_run_counts_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "RUN_STEPS", 500)
    counts = []
    for name in ("once", "again"):
        file = tmp_path / f"{name}.json"
        flags = ["--steps", "1000", "--coverage-steps", "0", "--jobs", "2", "--json", str(file)]
        assert fuzz.main(flags) == 0
        counts.append(json.loads(file.read_text()))
    assert counts[0] == counts[1]
    assert counts[0]["steps"] >= 1000
    assert counts[0]["operations"]["admit"] > 0
    out, notices = capsys.readouterr()
    assert "all clean" in out
    assert "admit" in out
    assert re.fullmatch(r"(5\d\d steps clean, 50%\n){2}", notices)


@pytest.mark.parametrize(
    ("end", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)], ids=["interrupted", "terminated"]
)
def test_an_interrupted_run_shows_what_it_did(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: type[BaseException],
    status: int,
    request: pytest.FixtureRequest,
) -> None:
    def interrupted(*runs: object, **options: object) -> Callable[[object], Iterator[fuzz.Outcome]]:
        def outcomes(_: object) -> Iterator[fuzz.Outcome]:
            yield fuzz.Outcome((5000, 0), Tally(steps=5004, operations=Counter({"admit": 700})))
            raise end

        return outcomes

    monkeypatch.setattr(fuzz, "Parallel", interrupted)
    assert fuzz.main(["--steps", "20000"]) == status
    out, notices = capsys.readouterr()
    assert "5,004 of 20,000 steps, all clean so far." in out
    assert re.search(r"admit +700 ", out)
    assert notices.splitlines()[-1].startswith(f"{request.node.callspec.id}: ")


def test_the_program_that_is_printed_fails_when_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    policy = f"{__name__}:Greedy"
    flags = ["--steps", "3000", "--coverage-steps", "0", "--jobs", "1", "--machine", "ReuseMachine"]
    flags += ["--program-steps", "12"]
    assert fuzz.main([*flags, "--policy", policy]) == 1
    out = capsys.readouterr().out
    head, _, program = out.partition("\n\n")
    assert head.startswith("Found after ")
    assert "policies = (Greedy,)" in program
    pasted: dict[str, object] = {}
    exec(program, pasted)
    test = pasted["test_found_by_fuzzing"]
    assert callable(test)
    with pytest.raises((ValueError, AssertionError)):
        test()


def test_what_is_hardly_done_is_pointed_out() -> None:
    tally = Tally(steps=1000, operations=Counter({"admit": 10, "swap in": 9}))
    assert fuzz.rare(tally) == ["swap in was done in 0.90% of the steps, less than 1%"]


def test_coverage_is_reported_by_module() -> None:
    flags = ["--steps", "80", "--coverage-steps", "80", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tools.fuzz", *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.split() for line in done.stdout.splitlines() if ".py " in line or " total " in line)
    assert 30 < float(rows["total"].rstrip("%")) < 100
    assert float(rows["fuzz.py"].rstrip("%")) > 50


def test_the_progress_of_measuring_coverage_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "EVERY_S", 0.2)
    assert fuzz.main(["--steps", "400", "--coverage-steps", "400", "--jobs", "1"]) == 0
    counted = [
        int(found[1])
        for found in re.finditer(r"^measuring coverage: (\d+) of 400 steps$", capsys.readouterr().err, re.M)
    ]
    assert counted[0] == 0
    assert counted == sorted(counted)
    assert counted[-1] > 0


@pytest.mark.parametrize(
    ("name", "status", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_who_ends_it_while_coverage_is_measured_learns_what_is_complete(
    name: str, status: int, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "counts.json"
    flags = ["--steps", "100", "--jobs", "1", "--json", str(file)]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.tools.fuzz", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "measuring coverage: 0 of 100 steps\n"
        process.send_signal(getattr(signal, name))
        out, notices = process.communicate(timeout=60)
    assert process.returncode == status
    assert "all clean." in out
    assert notices == f"{said}: the steps and their counts are complete, coverage is not measured\n"
    counts = json.loads(file.read_text())
    assert counts["steps"] >= 100
    assert counts["coverage"] == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps (0) must be at least 1"),
        (["--policy", "nothing"], "policy (nothing) must be one of"),
        (["--policy", "no_module:X"], "policy (no_module:X) cannot be imported"),
        (["--machine", "NoMachine"], "machine (NoMachine) cannot be imported"),
        (["--machine", "Tally"], "machine (Tally) must be a subclass of allocator.fuzz.ManagerMachine"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(flags) == 2
    assert message in capsys.readouterr().err


def test_statements_that_are_broken_into_lines_are_joined() -> None:
    notes = [
        "Failing test case:\nstate = M()",
        "state.start(without=('a',\n 'b'), log=8)",
        "state.do(call=x(\n))",
    ]
    assert _program.statements(notes) == [
        "state = M()",
        "state.start(without=('a', 'b'), log=8)",
        "state.do(call=x( ))",
    ]


def test_programs_can_be_pasted_whatever_they_do() -> None:
    """With the machine that has every operation, whose arguments are longest."""
    outcomes = [fuzz.one_run("AllocatorMachine", f"{__name__}:Greedy", 300, seed, 30) for seed in range(4)]
    programs = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    assert programs
    for program in programs:
        compile(program, "program", "exec")


def test_a_failure_that_is_not_made_shorter_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(program: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "shorter", interrupted)
    flags = ["--steps", "3000", "--coverage-steps", "0", "--jobs", "1", "--machine", "ReuseMachine"]
    assert fuzz.main([*flags, "--policy", f"{__name__}:Greedy"]) == 1
    said = capsys.readouterr()
    assert "Ctrl-C prints it as it is" in said.err
    assert said.out.startswith("Found after ")
    assert "def test_found_by_fuzzing() -> None:" in said.out


class Lossy(KVCacheManager):
    """Keeps one token too many."""

    def truncate(self, sequence: KVSequence, num_tokens: int) -> None:
        super().truncate(sequence, min(num_tokens + 1, sequence.num_tokens))


class LossyMachine(SharingMachine):
    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> KVCacheManager:
        return Lossy(num_blocks, tokens_per_block)


LONG = """from allocator.shadow import PromptSpec
from test_experiments_fuzz import LossyMachine

def test_found_by_fuzzing() -> None:
    state = LossyMachine()
    state.start(num_blocks=7, tokens_per_block=1, reuse=True, policy=0, ghosts=None, log=0, host_blocks=4)
    state.check()
    state.admit(prompt=PromptSpec(kind='runs', symbols=[0], cut=0, named=False, granularity=1), salt='', chunk=1)
    state.check()
    state.admit(prompt=PromptSpec(kind='runs', symbols=[0], cut=0, named=False, granularity=1), salt='', chunk=1)
    state.check()
    state.admit(prompt=PromptSpec(kind='runs', symbols=[0], cut=0, named=False, granularity=1), salt='', chunk=1)
    state.check()
    state.admit(prompt=PromptSpec(kind='runs', symbols=[1], cut=0, named=False, granularity=1), salt='', chunk=1)
    state.append(chosen=1, count=1, bits=None, wait=0)
    state.check()
    state.truncate(index=0, keep=1)
    state.check()
    state.teardown()
# AssertionError: what it was"""


def test_programs_are_cut_down_to_what_fails() -> None:
    lines = _program.shorter(LONG).splitlines()
    assert lines[:5] == LONG.splitlines()[:5]
    assert lines[-1] == "# AssertionError: what it was"
    operations = [line.strip().partition("(")[0] for line in lines[5:-1]]
    assert operations == ["state.start", "state.admit", "state.append", "state.truncate", "state.check"]
    assert "host_blocks=0" in lines[5]
    namespace: dict = {}
    exec("\n".join(lines), namespace)
    with pytest.raises(AssertionError):
        namespace["test_found_by_fuzzing"]()


def test_a_program_that_does_not_fail_again_is_left_as_it_is() -> None:
    good = LONG.replace("LossyMachine", "SharingMachine").replace("test_experiments_fuzz", "allocator.fuzz")
    assert _program.shorter(good) == good


def test_an_assertion_without_words_is_explained() -> None:
    def failing() -> None:
        found, wanted = [1, 2], [1, 3]
        assert found == wanted

    def worded() -> None:
        raise AssertionError("in so many words\nand more")

    def bare() -> None:
        assert not [1]

    said = []
    for fails in (failing, worded, bare):
        with pytest.raises(AssertionError) as caught:
            fails()
        error = AssertionError() if fails is failing else caught.value
        said.append(_program.explained(error.with_traceback(caught.value.__traceback__)))
    assert re.fullmatch(
        r"test_experiments_fuzz.py:\d+: assert found == wanted \(\[1, 2\], \[1, 3\]\)", said[0]
    )
    assert said[1] == "in so many words"
