"""Replay a request trace through a serving engine with a real paged KV cache: `python -m sim.replay TRACE --out DIR`.

Everything beyond the standard library is imported where it is used: the help comes up at once, and Ctrl-C is
answered in one line however early it comes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from sim.command_line import begin_command, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from sim.export import ResultFolder
    from sim.manifest import RunSpec
    from sim.runner import Run
    from sim.traces import Trace


def replay(arguments: list[str]) -> None:
    """Do what the command line says. Raises ValueError, one line, for whatever cannot be done."""
    began = time.perf_counter()
    from sim.options import parse

    options, manifest = parse(arguments)
    spec = options.spec(manifest.spec if manifest else None)

    from sim.export import ResultFolder
    from sim.prometheus import check_place, prometheus_text, write_whole
    from sim.report import print_report, report_rows
    from sim.runner import check_classes, load_trace
    from sim.sizing import memory_budget

    memory_budget(spec)  # an impossible configuration is found out before a long trace is read
    check_classes(spec)
    with ResultFolder(options.out) as folder:
        if options.prometheus is not None:
            check_place(options.prometheus, options.trace, options.out)
        trace = load_trace(spec.trace)
        if manifest and spec.trace.workload is None and trace.sha256 != manifest.trace_sha256:
            raise ValueError(
                f"trace ({options.trace}) has SHA-256 {trace.sha256}, "
                f"but the manifest was made with {manifest.trace_sha256}"
            )
        with folder.scratch() as scratch:
            finished = _simulate(spec, trace, scratch)
            summary = write_run(
                finished, folder, draw=options.figures, began=began, perfetto=options.perfetto
            )
            report = report_rows(finished, summary)
            counters = None if options.prometheus is None else prometheus_text(finished.result, spec)
        paths = folder.publish()  # what the run recorded may have gone with the scratch folder
        if options.prometheus is not None and counters is not None:
            write_whole(counters, options.prometheus)
    print_report(report, paths)


def _simulate(spec: RunSpec, trace: Trace, scratch: Path) -> Run:
    from sim.report import progress_bar
    from sim.runner import run

    with progress_bar(len(trace)) as progress:
        return run(spec, trace, progress, scratch)


def write_run(
    finished: Run, folder: ResultFolder, *, draw: bool, began: float, perfetto: bool = False
) -> dict[str, Any]:
    """Stage all files of a run in a result folder and return its summary; `began` is a perf_counter reading."""
    from sim.export import FIGURES, PERFETTO
    from sim.manifest import Manifest

    folder.write_tables(finished.result)
    if draw:
        from sim.figures import write_figures

        write_figures(finished.result, finished.spec.engine, folder.staging / FIGURES)
    if perfetto:
        from sim.perfetto import write_perfetto

        write_perfetto(finished.result, folder.staging / PERFETTO)
    folder.write_manifest(
        Manifest(finished.spec, finished.trace.sha256).document(
            num_requests=len(finished.trace),
            skipped_rows=finished.trace.skipped,
            budget=dataclasses.asdict(finished.budget),
        )
    )
    summary = summary_of(finished, began)
    folder.write_summary(summary)
    return summary


def summary_of(finished: Run, began: float) -> dict[str, Any]:
    """Return the summary of a run; `began` is a perf_counter reading, of when it was started."""
    from sim.metrics import summarise
    from sim.overload import Overload
    from sim.runner import cache_bound

    bound = cache_bound(finished)
    return summarise(
        finished.result,
        finished.spec.engine,
        total_wall_s=round(time.perf_counter() - began, 6),
        bound=bound,
        overload=Overload.of(finished.result, finished.trace.last_arrival_ps),
        skipped_rows=finished.trace.skipped,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: replay(given))


if __name__ == "__main__":
    begin_command(__spec__)
    sys.exit(main())
