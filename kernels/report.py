"""`python -m kernels.compile --arch sm_90 ...`: what every specialised kernel uses on each architecture."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from kernels.compile import CUDA_DIR, Constants, compile_offline
from kernels.host.runner import available_cores
from kernels.offline import Resources, check_arch
from kernels.specialise import specialisations

Job = tuple[str, dict[str, int | bool | float | str], str]


def _describe(constants: Constants) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


def _resources(job: Job) -> dict[str, Resources]:
    file, constants, arch = job
    source = (CUDA_DIR / file).read_text()
    return compile_offline(source, arch, constants=constants, name=file, include_dirs=[CUDA_DIR]).kernels


def resource_rows(jobs: Sequence[Job]) -> Iterator[tuple[Job, str, Resources]]:
    """Compile every job, on all cores, and yield (job, kernel, resources) in the order given."""
    workers = min(available_cores(), len(jobs))
    if workers <= 1:
        results: Iterator[dict[str, Resources]] = map(_resources, jobs)
        for job, kernels in zip(jobs, results, strict=True):
            yield from ((job, kernel, used) for kernel, used in kernels.items())
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: this process alone answers Ctrl-C
        try:
            results = pool.map(_resources, jobs, chunksize=4)
        finally:
            signal.signal(signal.SIGINT, answer)
        try:
            for job, kernels in zip(jobs, results, strict=True):
                yield from ((job, kernel, used) for kernel, used in kernels.items())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Print registers, spills and shared memory of the specialised kernels; return 0, or 1 if any spills.

    Bad arguments end with one line and status 2, Ctrl-C with one line and status 130.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile",
        description="Compile every specialised kernel, without a GPU, and print what it uses.",
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE.cu", help="only these sources (default: all); before --arch"
    )
    parser.add_argument(
        "--arch", nargs="+", required=True, metavar="sm_XX", help="architectures to compile for"
    )
    options = parser.parse_args(arguments)
    known = specialisations()
    unknown = [file for file in options.files if file not in {name for name, _ in known}]
    try:
        if unknown:
            raise ValueError(
                f"file ({unknown[0]}) must be one of {' '.join(sorted({name for name, _ in known}))}"
            )
        for arch in options.arch:
            check_arch(arch)
        chosen = [
            (file, dict(values)) for file, values in known if not options.files or file in options.files
        ]
        jobs = [(file, values, arch) for file, values in chosen for arch in options.arch]
        width = max(len("constants"), *(len(_describe(values)) for _, values in chosen))
        print(
            f"{'kernel':<18}{'constants':<{width + 2}}{'arch':<8}{'registers':>9}{'spills B':>10}{'shared B':>10}"
        )
        spilling = count = 0
        for (_, values, arch), kernel, used in resource_rows(jobs):
            print(
                f"{kernel:<18}{_describe(values):<{width + 2}}{arch:<8}"
                f"{used.registers:>9}{used.spill_bytes:>10}{used.shared_bytes:>10}"
            )
            count += 1
            spilling += used.spill_bytes > 0
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{count} kernels compiled for {', '.join(options.arch)}: {spilling} with spills")
    return 1 if spilling else 0
