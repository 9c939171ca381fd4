"""`python -m sim.traces`: describe a trace, convert it to the native format, or generate a synthetic one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sim.traces.describe import describe, render
from sim.traces.native import write_trace
from sim.traces.reader import read_trace
from sim.traces.trace import Trace
from sim.workload import WorkloadConfig, generate


@dataclass(frozen=True)
class ReadOptions:
    """How to read a trace file."""

    trace: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TRACE")]
    """Trace file."""
    format: str | None = None
    """azure, burstgpt, mooncake, bailian, sharegpt, csv or native; told from the content if not given."""
    columns: str | None = None
    """Columns of any other CSV file: arrival=NAME,prompt=NAME,output=NAME. Arrivals are seconds or timestamps;
    arrival_ms=NAME, arrival_us=NAME, arrival_ns=NAME for other units."""
    limit: int | None = None
    """Read only so many requests."""
    time_scale: float = 1.0
    """Multiply all times: 0.5 doubles the rate."""
    skip_bad: bool = False
    """Count malformed rows and go on, instead of stopping at the first."""

    def read(self) -> Trace:
        """Return the trace. Raises ValueError."""
        return read_trace(
            self.trace,
            format=self.format,
            columns=self.columns,
            limit=self.limit,
            time_scale=self.time_scale,
            skip_bad=self.skip_bad,
        )


@dataclass(frozen=True)
class Describe(ReadOptions):
    """Print what a trace is made of: rate, lengths, sessions, and how much of its content repeats."""

    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        figures = describe(self.read())
        print(json.dumps(figures, indent=2) if self.json else render(figures))


@dataclass(frozen=True)
class Convert(ReadOptions):
    """Write a trace of any format as native Parquet."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """File to write."""

    def run(self) -> None:
        _write(self.read(), self.out)


@dataclass(frozen=True)
class Generate:
    """Draw a synthetic workload and write it as native Parquet."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write."""
    workload: tyro.conf.OmitArgPrefixes[WorkloadConfig] = field(default_factory=WorkloadConfig)

    def run(self) -> None:
        _write(generate(self.workload), self.out)


def _write(trace: Trace, out: Path) -> None:
    write_trace(trace, out)
    skipped = f" ({trace.skipped:,} malformed rows skipped)" if trace.skipped else ""
    print(f"{len(trace):,} requests{skipped} written to {out}")


_PROGRAM = "python -m sim.traces"
_COMMANDS: dict[str, Callable[..., Describe | Convert | Generate]] = {
    "describe": Describe,
    "convert": Convert,
    "generate": Generate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit status: 2, after one line on stderr, for input that is no good."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command: Describe | Convert | Generate
    if arguments and arguments[0] in _COMMANDS:
        # Parsed on its own, so that tyro's message for a refused value names the options it was in.
        name, *options = arguments
        command = tyro.cli(_COMMANDS[name], prog=f"{_PROGRAM} {name}", args=options)
    else:
        command = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog=_PROGRAM, description=__doc__, args=arguments
        )
    try:
        command.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
