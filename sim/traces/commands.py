"""The commands of `python -m sim.traces`, each a dataclass of its options."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sim.command_line import parse_dataclass, parse_plainly
from sim.target import check_target, same_file
from sim.traces.describe import describe, render
from sim.traces.reader import FORMATS, read_trace
from sim.traces.reading import ReadOptions
from sim.traces.trace import Trace
from sim.traces.writer import write_trace
from sim.workload import WorkloadConfig, generate


@dataclass(frozen=True)
class Describe:
    """Print what a trace is made of: rate, lengths, sessions, and how much of its content repeats.

    arrivals: requests/s is one over the mean gap between arrivals. CV is the standard deviation of those gaps over
    their mean: 0 for a metronome, 1 for a Poisson process, more for bursts.

    prompt tokens, output tokens: p90 is the smallest length that 90 in 100 do not exceed (nearest rank, nothing
    interpolated), p50 and p99 likewise; so are all percentiles here and in the summary of a run.

    sessions: requests that go on from one another, as the turns of a chat; the time to think is what passes between
    an answer's end and the next turn. It is not known of traces that do not say when answers end (Bailian).

    content: what the trace tells of what the prompts say, in chunks of so many tokens. Chunks are distinct if they
    differ, or anything before them does: a cache can reuse a chunk only behind the same beginning.

    infinite-cache hit: what a prefix cache that never evicts would find, serving one request after the other and
    counting the last chunk of a prompt like any other. A smaller cache finds less.

    time between uses: since a chunk that is found again was used last.

    chunks between uses: distinct other chunks used since then. A cache that evicts the least recently used finds
    those again that have fewer chunks between their uses than it has room for.
    """

    trace: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TRACE")]
    """Trace file."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    """How the trace file is read, and which part of it."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        figures = describe(read_trace(self.trace, **asdict(self.reading)))
        print(json.dumps(figures, indent=2) if self.json else render(figures))


@dataclass(frozen=True)
class Convert:
    """Write a trace of any format, or a part of it, as native Parquet."""

    trace: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TRACE")]
    """Trace file."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    """How the trace file is read, and which part of it."""

    def run(self) -> None:
        _write(lambda: read_trace(self.trace, **asdict(self.reading)), self.out, self.trace)


@dataclass(frozen=True)
class Generate:
    """Draw a synthetic workload and write it as native Parquet."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)

    def run(self) -> None:
        _write(lambda: generate(self.workload), self.out)


COMMANDS: dict[str, type[Any]] = {"describe": Describe, "convert": Convert, "generate": Generate}


def run(program: str, description: str, arguments: list[str]) -> None:
    """Parse a command line and do what it says. Raises ValueError, one line, for whatever cannot be done."""
    try:
        try:
            _parse(program, description, arguments).run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        # What is left in standard output's buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ValueError(f"standard output cannot be written: {error.strerror}") from None


def _parse(program: str, description: str, arguments: list[str]) -> Describe | Convert | Generate:
    command: Describe | Convert | Generate
    if arguments and arguments[0] in COMMANDS:
        name, *options = arguments
        kind = COMMANDS[name]
        about = _with_formats(kind) if kind is Convert and {"-h", "--help"} & set(options) else None
        command = parse_dataclass(kind, f"{program} {name}", options, description=about)
    else:
        command = parse_plainly(
            program,
            lambda: tyro.extras.subcommand_cli_from_dict(
                dict(COMMANDS), prog=program, description=description, args=arguments
            ),
        )
    return command


def _with_formats(kind: type[Any]) -> str:
    """Return a command's docstring and, behind it, what files of each format hold."""
    formats = [f"{name}: {each.explained()}" for name, each in FORMATS.items()]
    return "\n\n".join([inspect.cleandoc(kind.__doc__ or ""), *formats])


def _write(make: Callable[[], Trace], out: Path, source: Path | None = None) -> None:
    try:
        check_target(out)  # found out before the trace is made, which may take long
        if source is not None and same_file(out, source):
            raise ValueError(f"OUT ({out}) must not be the trace that is read")
        trace = make()
        count = write_trace(trace, out)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from None
    skipped = f" ({trace.skipped:,} malformed rows skipped)" if trace.skipped else ""
    print(f"{count:,} requests{skipped} written to {' '.join(str(out).splitlines())}")
