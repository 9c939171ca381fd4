"""Fuzz the block manager, or one of your own, and say what was exercised.

    python -m experiments.tools.fuzz --steps 1000000
    python -m experiments.tools.fuzz --policy my_policies:MyPolicy --steps 20000
    python -m experiments.tools.fuzz --machine my_machines:MyManagerMachine

The steps are cut into runs of some thousands, each with a seed of its own, spread over the cores. What a run does
depends on its seed, and on the version and the sources that Hypothesis draws constants from. A failure ends everything,
and is printed as the shortest program that still fails, ready to paste into a test.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import answer_interrupts

    answer_interrupts()

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro
from joblib import Parallel, cpu_count, delayed
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import allocator
from allocator import fuzz
from allocator.checks import require_int
from allocator.eviction import make_policy
from allocator.fuzz import ManagerMachine, Tally, run_machine
from experiments.tools._program import as_test, shorter
from experiments.tools._progress import progress
from sim.command_line import Terminated, parse_dataclass, require_writable, run_command, when_ended

RUN_STEPS = 5_000
"""Steps of one run: some seconds."""

RARE = 0.01
"""An operation with a smaller share of the steps is pointed out: it is hardly fuzzed."""


@dataclass(frozen=True)
class Config:
    """Run the fuzz machine of the block manager, and count what it did.

    Prints how often each operation, eviction, copy and refusal happened, and how much of the allocator's branches
    that covered. Ends with status 1, and the program, when something is wrong.
    """

    steps: int = 100_000
    """Steps to run in all."""
    policy: str | None = None
    """Eviction policy to fuzz, by name or as package.module:Class; default: all that are known, in turn."""
    machine: str = "AllocatorMachine"
    """A machine of allocator.fuzz, or one of yours as package.module:Class."""
    program_steps: int = 80
    """Most steps of one program: long ones reach further, short ones are explained faster."""
    seed: int = 0
    """The same seed runs the same programs."""
    jobs: int = 0
    """Processes; 0 takes all cores."""
    coverage_steps: int = 20_000
    """Measure the branch coverage of allocator/ over so many of the steps, done once more for that, by one process and
    more slowly: it can take longer than all else. 0 for none."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the counts to this file, too."""


@dataclass
class Outcome:
    """What one run did, and the program it failed with; its steps and seed, to run it again."""

    run: tuple[int, int]
    tally: Tally = field(default_factory=Tally)
    failure: str | None = None


def find_machine(name: str) -> type[ManagerMachine]:
    """Return a machine by its name in allocator.fuzz, or as package.module:Class.

    Raises ValueError if there is no such class, or if it is no machine.
    """
    module_name, _, class_name = name.rpartition(":")
    try:
        found = getattr(import_module(module_name) if module_name else fuzz, class_name)
    except Exception as error:  # whatever a user's module does when imported
        raise ValueError(f"machine ({name}) cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, ManagerMachine)):
        raise ValueError(f"machine ({name}) must be a subclass of allocator.fuzz.ManagerMachine")
    return found


def one_run(
    machine: str,
    policy: str | None,
    steps: int,
    seed: int,
    program_steps: int,
    *,
    tally: Tally | None = None,
) -> Outcome:
    """Run a machine for about `steps` steps, or until it fails. `tally`, if given, counts them as they are done."""
    outcome = Outcome((steps, seed), Tally() if tally is None else tally)
    try:
        run_machine(
            _with_policy(machine, policy), steps, seed, steps_per_program=program_steps, tally=outcome.tally
        )
    except Exception as found:
        outcome.failure = as_test(found, machine, policy)
    return outcome


def _with_policy(machine: str, policy: str | None) -> type[ManagerMachine]:
    kind = find_machine(machine)
    if policy is None:
        return kind
    chosen = policy if ":" not in policy else type(make_policy(policy))
    return type(kind.__name__, (kind,), {"policies": (chosen,)})


def runs(config: Config) -> Iterator[tuple[int, int]]:
    """Yield (steps, seed) of each run."""
    for number, first in enumerate(range(0, config.steps, RUN_STEPS)):
        yield min(RUN_STEPS, config.steps - first), config.seed * 1_000_003 + number


def merge(total: Tally, part: Tally) -> None:
    """Add what a run did to the total."""
    for name in ("steps", "programs", "evictions", "copies", "refusals", "hit_blocks", "seconds"):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    total.operations.update(part.operations)
    total.outcomes.update(part.outcomes)


def show(tally: Tally, console: Console) -> None:
    """Print the counts, each with its share of the steps."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("times", justify="right")
    table.add_column("of the steps", justify="right")
    for name, count in sorted(tally.operations.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}", f"{count / tally.steps:.2%}")
    table.add_section()
    for name in ("evictions", "copies", "refusals", "hit_blocks"):
        table.add_row(name.replace("_", " "), f"{getattr(tally, name):,}", "")
    for name, count in sorted(tally.outcomes.items()):
        table.add_row(name, f"{count:,}", "")
    console.print(table)
    for line in rare(tally):
        console.print(line, highlight=False)


def rare(tally: Tally) -> list[str]:
    """Return a line for each operation that had less than RARE of the steps."""
    return [
        f"{name} was done in {count / tally.steps:.2%} of the steps, less than {RARE:.0%}"
        for name, count in sorted(tally.operations.items())
        if count < RARE * tally.steps
    ]


# -------------------------------------------------------- coverage


def measure_coverage(config: Config, console: Console) -> dict[str, float]:
    """Run the first steps once more in a process that counts branches; return per cent by module, "total" too."""
    if find_spec("coverage") is None:
        console.print("Branch coverage is left out: pip install coverage to see it.", highlight=False)
        return {}
    steps = min(config.steps, config.coverage_steps)
    package = Path(allocator.__file__).parent
    first_seed = next(runs(config))[1]
    code = (
        "from experiments.tools.fuzz import counted_aloud\n"
        f"counted_aloud{(config.machine, config.policy, steps, first_seed, config.program_steps)!r}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script, data, report = (Path(folder) / name for name in ("run.py", "data", "report.json"))
        script.write_text(code)
        common = [sys.executable, "-m", "coverage"]
        options = ["--rcfile=", f"--data-file={data}"]
        environment = _with_path(package.parent)
        with progress("measuring coverage", steps, "steps") as tell:
            for arguments in (
                ["run", *options, "--branch", f"--source={package}", str(script)],
                ["json", *options, "-q", "-o", str(report)],
            ):
                status, said = _listened_to(
                    [*common, *arguments], environment, lambda line: tell(int(line), "")
                )
                if status:
                    raise ValueError(f"coverage ({arguments[0]}) failed: {said.strip()[-300:]}")
        measured = json.loads(report.read_text())
    shares = {
        Path(name).resolve().relative_to(package.resolve()).as_posix(): float(
            each["summary"]["percent_covered"]
        )
        for name, each in measured["files"].items()
        if each["summary"]["num_statements"]
    }
    return shares | {"total": float(measured["totals"]["percent_covered"])}


def counted_aloud(machine: str, policy: str | None, steps: int, seed: int, program_steps: int) -> None:
    """Do `one_run`, and print every second how many steps are done. Raises SystemExit with the program that fails.

    What else is printed meanwhile goes to stderr.
    """
    tally, over, out = Tally(), threading.Event(), sys.stdout

    def count() -> None:
        while not over.wait(1.0):
            print(tally.steps, file=out, flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = one_run(machine, policy, steps, seed, program_steps, tally=tally)
    finally:
        over.set()
        thread.join()
    raise SystemExit(outcome.failure)


def _listened_to(
    command: list[str], environment: dict[str, str], hear: Callable[[str], None]
) -> tuple[int, str]:
    """Run a command, tell each line of its stdout as it comes, and return its exit status and its stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                hear(line)
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()
        errors.seek(0)
        return status, errors.read()


def _with_path(folder: Path) -> dict[str, str]:
    import os

    path = os.pathsep.join(filter(None, [str(folder), *sys.path]))
    return os.environ | {"PYTHONPATH": path}


def show_coverage(shares: dict[str, float], steps: int, console: Console) -> None:
    """Print the total, and the modules that are covered least."""
    if not shares:
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("module of allocator/")
    table.add_column("covered", justify="right")
    for name, share in sorted(shares.items(), key=lambda item: (item[0] == "total", item[1], item[0])):
        if name == "total":
            table.add_section()
        table.add_row(name, f"{share:.1f}%")
    console.print(table)
    console.print(f"Statements and branches that {steps:,} of the steps ran.", highlight=False)


# -------------------------------------------------------- the command


def write_counts(total: Tally, shares: dict[str, float], file: Path | None) -> None:
    """Write the counts to a file, if one is asked for."""
    if file is None:
        return
    names = ("steps", "programs", "evictions", "copies", "refusals")
    counts = {name: getattr(total, name) for name in names}
    text = json.dumps(counts | {"operations": dict(total.operations), "coverage": shares}, indent=2)
    file.write_text(text + "\n")


def shorten(failed: Outcome) -> str:
    """Return a failure's program, as short as it can be made unless that is interrupted."""
    assert failed.failure is not None
    notice = Console(stderr=True)
    notice.print("Making it shorter takes a minute at most; Ctrl-C prints it as it is.", highlight=False)
    try:
        return shorter(failed.failure)
    except KeyboardInterrupt:
        return failed.failure


def watched(outcomes: Iterable[Outcome], num_runs: int, total: Tally) -> Iterator[Outcome]:
    """Yield the outcomes, and say how far it is: by a bar on a terminal, elsewhere by a line after every tenth."""
    notice = Console(stderr=True)
    if notice.is_terminal:
        yield from track(outcomes, "fuzzing", num_runs, console=notice, transient=True)
        return
    for done, outcome in enumerate(outcomes, start=1):
        yield outcome
        if done * 10 // num_runs > (done - 1) * 10 // num_runs and done < num_runs:
            notice.print(f"{total.steps:,} steps clean, {done / num_runs:.0%}", highlight=False)


def run(config: Config, console: Console) -> int:
    """Fuzz, print, and return the exit status."""
    for name, least in (("steps", 1), ("program_steps", 2), ("seed", 0), ("jobs", 0), ("coverage_steps", 0)):
        require_int(name, getattr(config, name), least)
    if config.json is not None:
        require_writable("json", config.json)
    find_machine(config.machine)
    if config.policy is not None:
        make_policy(config.policy)
    total = Tally()
    todo = list(runs(config))
    jobs = min(config.jobs or cpu_count(), len(todo))
    outcomes = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(one_run)(config.machine, config.policy, steps, seed, config.program_steps)
        for steps, seed in todo
    )
    failed = None
    try:
        for outcome in watched(outcomes, len(todo), total):
            merge(total, outcome.tally)
            if outcome.failure is not None:
                failed = outcome
                break
    except (KeyboardInterrupt, Terminated):
        if total.steps:
            show(total, console)
            console.print(f"{total.steps:,} of {config.steps:,} steps, all clean so far.", highlight=False)
        raise
    if failed is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that runs which are still going on are given up
            outcomes.close()
        console.print(f"Found after {total.steps:,} steps:\n", highlight=False)
        print(shorten(failed))
        return 1
    show(total, console)
    console.print(f"{total.steps:,} steps in {total.programs:,} programs, all clean.", highlight=False)
    write_counts(total, {}, config.json)
    if config.coverage_steps:
        with when_ended("the steps and their counts are complete, coverage is not measured"):
            shares = measure_coverage(config, console)
        show_coverage(shares, min(config.steps, config.coverage_steps), console)
        write_counts(total, shares, config.json)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    status = 0

    def action() -> None:
        nonlocal status
        status = run(parse_dataclass(Config, "python -m experiments.tools.fuzz", given), Console())

    return run_command(action) or status


if __name__ == "__main__":
    sys.exit(main())
