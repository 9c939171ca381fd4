"""Run a replay for every combination of some flags' values, over several seeds, and tell what differs from what varies.

    python -m experiments.tools.sweep --out results/sweep --vary tokens_per_block=16,64,128 --vary policy=lru,fifo \\
        --seeds 5 -- synthetic --num-requests 2000 --model llama-3-8b

What follows `--` is a command line of sim.replay without --out. Each finished point is a file in OUT/points, named
by what was run, so an interrupted sweep goes on where it was, and one with more values runs only the new ones.
OUT/sweep.csv has a row a point; the table shows the mean over seeds and, after ±, half the 95% confidence interval
of that mean (Student's t); OUT/sweep.png draws the same metrics over the flag with most values.
Where requests came faster than they were served, the table has a last column with the runs of which that is true: their
latencies grow with the length of the run (see sim.overload).
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TypeAlias

import tyro
from joblib import Parallel, cpu_count, delayed
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from allocator.checks import require_int
from experiments.tools._intervals import interval
from experiments.tools._sweep_figure import MOST_LINES, Found, Values, draw
from experiments.tools._table import print_uncut
from sim import style
from sim.command_line import flags_of, parse_dataclass, run_command
from sim.manifest import RunSpec
from sim.options import Replay, parse
from sim.replay import summary_of
from sim.runner import check_classes, load_trace, run
from sim.sizing import memory_budget

POINTS, TABLE, FIGURE = "points", "sweep.csv", "sweep"

_LEFT_BY_NONE = ("out", "prometheus", "perfetto")
"""Flags of sim.replay for what a point does not leave."""


@dataclass(frozen=True)
class Config:
    """Run sim.replay for every combination of values, over seeds. The replay's own flags follow after `--`."""

    out: Path
    """Folder for the points and the table; finished points there are kept and not run again."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A flag of sim.replay and its values, NAME=V1,V2,...; may be given several times. Of one that
    is on or off, the values are True and False."""
    seeds: int = 1
    """Runs of each combination, with seeds from --workload-seed on; for synthetic workloads only."""
    metrics: tuple[str, ...] = (
        "hit_rate_tokens",
        "ttft_s.p50",
        "ttft_s.p99",
        "throughput_tokens_per_s",
        "preemptions",
    )
    """Keys of summary.json to show, with a dot before what lies deeper."""
    figures: bool = True
    """Draw sweep.png and sweep.svg."""
    jobs: int = 0
    """Processes; 0 takes all cores."""


@dataclass(frozen=True)
class Point:
    """One run of the sweep: which values were given, with which seed, and all that decides its outcome."""

    values: Values
    seed: int
    spec: RunSpec

    @property
    def key(self) -> str:
        """Return the name of the point's file: equal for equal runs. A trace file counts by its path, size and time."""
        described: dict[str, Any] = {"spec": asdict(self.spec)}
        if self.spec.trace.workload is None:
            status = os.stat(self.spec.trace.path)
            described["trace"] = [status.st_size, status.st_mtime_ns]
        text = json.dumps(described, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def combinations(vary: Sequence[str]) -> list[Values]:
    """Return every combination of the values, the last flag's varying fastest. Raises ValueError for a bad one."""
    axes = []
    names = set()
    flags = flags_of(Replay)
    for text in vary:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        given = [value.strip() for value in values.split(",")]
        if not equals or not name or not all(given):
            raise ValueError(f"vary ({text}) must be NAME=V1,V2,...")
        if name in names:
            raise ValueError(f"vary ({text}) gives {name} a second time")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"vary ({text}) must name a flag of sim.replay, and {name} is none{hint}")
        if name in _LEFT_BY_NONE:
            raise ValueError(f"vary ({text}) must name a flag that decides what comes of a run")
        if flags[name] is bool and not set(given) <= {"True", "False"}:
            raise ValueError(f"vary ({text}) must give {name} the values True and False")
        if len(set(given)) < len(given):
            raise ValueError(f"vary ({text}) must give each value once")
        names.add(name)
        axes.append([(name, value) for value in given])
    return list(itertools.product(*axes))


def _flag(name: str, value: str) -> list[str]:
    """Return the arguments that give a flag of sim.replay its value."""
    flag = name.replace("_", "-")
    if flags_of(Replay)[name] is bool:
        return [f"--{flag}" if value == "True" else f"--no-{flag}"]
    return [f"--{flag}", value]


def points(config: Config, replay: Sequence[str]) -> list[Point]:
    """Return all runs. Raises ValueError where one cannot work, before any has begun."""
    require_int("seeds", config.seeds, 1)
    require_int("jobs", config.jobs, 0)
    given = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in replay}
    for name in _LEFT_BY_NONE:
        if name in given:
            raise ValueError(
                f"{name} (after --) must not be given: each point is a file in the sweep's own folder"
            )
    found = []
    for values in combinations(config.vary):
        if config.seeds > 1 and "workload_seed" in dict(values):
            raise ValueError(f"seeds ({config.seeds}) must be 1 where workload_seed varies")
        flags = [*replay, "--out", os.devnull]
        for name, value in values:
            flags += _flag(name, value)
        options, manifest = parse(flags)
        spec = options.spec(manifest.spec if manifest else None)
        memory_budget(spec)
        check_classes(spec)
        workload = spec.trace.workload
        if workload is not None:
            for seed in range(workload.workload_seed, workload.workload_seed + config.seeds):
                trace = replace(spec.trace, workload=replace(workload, workload_seed=seed))
                found.append(Point(values, seed, replace(spec, trace=trace)))
        elif config.seeds > 1:
            raise ValueError(f"seeds ({config.seeds}) must be 1 for a trace file: nothing in it is drawn")
        else:
            found.append(Point(values, 0, spec))
    return found


def run_point(point: Point, folder: Path) -> None:
    """Run one point and leave its file, whole or not at all."""
    summary = summary_of(run(point.spec, load_trace(point.spec.trace)), perf_counter())
    document = {"values": dict(point.values), "seed": point.seed, "summary": summary}
    path = folder / f"{point.key}.json"
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        staged.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def read_point(path: Path) -> dict[str, Any]:
    """Return what a finished point left. Raises ValueError if the file is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["values"], found["seed"], found["summary"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"point ({path}) is damaged: remove it, and it is run again") from None
    return found  # type: ignore[no-any-return]


def figure(summary: Mapping[str, Any], metric: str) -> float | None:
    """Return a figure of a summary by its dotted name, None where there is none. Raises ValueError for no number."""
    value: Any = summary
    for name in metric.split("."):
        if value is None:  # of a part that this run has not, host memory for example
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"metric ({metric}) must be one of {', '.join(sorted(flat(summary)))}")
        value = value[name]
    if isinstance(value, Mapping | str):
        deeper = ", ".join(f"{metric}.{name}" for name in value) if isinstance(value, Mapping) else "a number"
        raise ValueError(f"metric ({metric}) must be one of {deeper}")
    return None if value is None else float(value)


def flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return all figures of a summary by dotted name."""
    found: dict[str, float | None] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, int | float):
            found[prefix + name] = value
    return found


def shown(values: Sequence[float | None]) -> str:
    """Return the mean and its interval as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle, half = interval(known)
    return f"{middle:.4g}" if half is None else f"{middle:.4g} ± {half:.2g}"


def write_table(done: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a row a point: the varied flags, the seed, and every figure of the summary. Wall times are left out."""
    rows = []
    for point in done:
        figures = {k: v for k, v in flat(point["summary"]).items() if k not in ("wall_s", "total_wall_s")}
        rows.append({**point["values"], "seed": point["seed"], **figures})
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    staged = path.with_suffix(".tmp")
    staged.write_text(text.getvalue(), encoding="utf-8")
    os.replace(staged, path)


Summaries: TypeAlias = Mapping[Values, Sequence[Mapping[str, Any]]]
"""For each combination, the summaries of all its runs."""


def by_combination(done: Sequence[dict[str, Any]]) -> Summaries:
    """Return the summaries of all seeds for each combination."""
    groups: dict[Values, list[Mapping[str, Any]]] = {}
    for point in done:
        groups.setdefault(tuple(point["values"].items()), []).append(point["summary"])
    return groups


def figures_of(groups: Summaries, metrics: Sequence[str]) -> Found:
    """Return the metrics of all seeds for each combination."""
    return {
        values: [[figure(summary, metric) for summary in summaries] for metric in metrics]
        for values, summaries in groups.items()
    }


def overloads(groups: Summaries) -> dict[Values, str]:
    """Return in how many of its runs each combination was overloaded, of those that ever were."""
    counts = {
        values: sum(summary.get("overload") is not None for summary in summaries)
        for values, summaries in groups.items()
    }
    return {values: f"{count} of {len(groups[values])}" for values, count in counts.items() if count}


def show(
    found: Found, metrics: Sequence[str], console: Console, overloaded: Mapping[Values, str] | None = None
) -> None:
    """Print a row a combination, with the runs in which it was overloaded where any was."""
    table = Table(box=box.SIMPLE_HEAD)
    for name, _ in next(iter(found)):
        table.add_column(name, justify="right")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    if overloaded:
        table.add_column("overloaded", justify="right", no_wrap=True)
    for values, rows in found.items():
        last = [overloaded.get(values, "")] if overloaded else []
        table.add_row(*(value for _, value in values), *map(shown, rows), *last)
    print_uncut(table, console)


def sweep(config: Config, replay: Sequence[str], console: Console) -> None:
    """Run what is missing, write the table, print it."""
    todo = points(config, replay)
    folder = config.out / POINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out ({config.out}) cannot be written: {error.strerror}") from None
    paths = [folder / f"{point.key}.json" for point in todo]
    missing = [point for point, path in zip(todo, paths, strict=True) if not path.exists()]
    if missing:
        jobs = min(config.jobs or cpu_count(), len(missing))
        running = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(run_point)(point, folder) for point in missing
        )
        for _ in track(running, "running", len(missing), console=Console(stderr=True), transient=True):
            pass
    # A point of an earlier sweep is named by what was run; it may have varied there under other names.
    done = [
        {**read_point(path), "values": dict(point.values), "seed": point.seed}
        for point, path in zip(todo, paths, strict=True)
    ]
    write_table(done, config.out / TABLE)
    groups = by_combination(done)
    found, overloaded = figures_of(groups, config.metrics), overloads(groups)
    show(found, config.metrics, console, overloaded)
    drawn = draw_figure(found, config, overloaded) if config.figures else ""
    kept = len(todo) - len(missing)
    console.print(
        f"{len(todo)} points"
        + (f", {kept} of them from before" if kept else "")
        + f"; all figures in {config.out / TABLE}{drawn}",
        highlight=False,
    )


def draw_figure(found: Found, config: Config, overloaded: Collection[Values]) -> str:
    """Draw the metrics, where that can be done, in place of an earlier figure; return what to say of it."""
    stem = config.out / FIGURE
    with style.styled():
        drawing = draw(found, config.metrics, overloaded)
        if drawing is not None:
            style.save(drawing, stem)
            return f", the metrics drawn in {stem}.png"
    for suffix in (".png", ".svg"):
        stem.with_suffix(suffix).unlink(missing_ok=True)
    return "" if len(found) < 2 else f" (a figure would have more than {MOST_LINES} lines)"


def split(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield the sweep's own arguments, then the replay's. Raises ValueError without a `--`."""
    if "--" not in arguments:
        if not {"-h", "--help"} & set(arguments):
            raise ValueError("-- must follow, and after it the command line of sim.replay, without --out")
        yield list(arguments)
        return
    at = list(arguments).index("--")
    yield list(arguments[:at])
    yield list(arguments[at + 1 :])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments

    def action() -> None:
        own, *replay = split(given)
        config = parse_dataclass(Config, "python -m experiments.tools.sweep", own)
        sweep(config, replay[0], Console())

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
