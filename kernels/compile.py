r"""Compile CUDA sources, for a GPU through CuPy or for the CPU through a C++ compiler.

A kernel file is plain CUDA. What specialises it (types, head dim, tile sizes) is put in front of the untouched text
as a few `constexpr` and `using` lines, so specialisation is visible in one place and the file reads as it is run.

A kernel of your own, run without a GPU:

>>> import numpy as np
>>> from kernels.compile import KernelError, compile_source
>>> source = r'''
... extern "C" __global__ void block_sum(const float* x, float* sums, int n) {
...     __shared__ float part[THREADS];
...     const int i = blockIdx.x * THREADS + threadIdx.x;
...     part[threadIdx.x] = i < n ? x[i] : 0.0f;
...     for (int half = THREADS / 2; half > 0; half /= 2) {
...         __syncthreads();
...         if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
...     }
...     if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
... }
... '''
>>> def total(source, sanitize=None, seed=None):
...     x, sums = np.arange(1000, dtype=np.float32), np.full(8, np.nan, np.float32)
...     module = compile_source(
...         source, constants={"THREADS": 128}, backend="cpu", sanitize=sanitize, name="block_sum.cu"
...     )
...     try:
...         module.launch("block_sum", (8, 1, 1), (128, 1, 1), [x, sums, x.size], seed=seed)
...     except KernelError as error:
...         return str(error)
...     return float(sums.sum())
>>> total(source)
499500.0

Broken, it says where. A read beyond the array, under AddressSanitizer:

>>> print(total(source.replace("i < n ? x[i] : 0.0f", "x[i]"), sanitize="address"))
kernel block_sum, block (7, 0, 0), thread (104, 0, 0), block_sum.cu:5: reads 4 bytes just past the end of x (4000 bytes)

Shared memory that no thread wrote: NaN in the plain mode, located in the mode that watches it:

>>> unwritten = source.replace("part[threadIdx.x] = i < n ? x[i] : 0.0f;", "if (i < n) part[threadIdx.x] = x[i];")
>>> total(unwritten)
nan
>>> print(total(unwritten, sanitize="memory"))
kernel block_sum, block (7, 0, 0), thread (40, 0, 0), block_sum.cu:8: reads 4 bytes of shared memory that no thread of the block has written (byte 416 of part)

A barrier that some threads skip, in every mode:

>>> print(total(source.replace("        __syncthreads();", "        if (threadIdx.x < 2 * half) __syncthreads();")))
kernel block_sum, block (0, 0, 0), thread (0, 0, 0), block_sum.cu:7: __syncthreads is not reached by every thread: thread (96, 0, 0) has exited

No barrier at all breaks no rule that these modes check, but the answer now depends on the order of threads, which a
seed shuffles:

>>> racy = source.replace("__syncthreads();", "")
>>> len({total(racy, seed=seed) for seed in range(5)}), {total(source, seed=seed) for seed in range(5)}
(5, {499500.0})
"""  # noqa: E501  what the runner prints is one line

from __future__ import annotations

if __name__ == "__main__":
    import os
    import signal

    def _leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)  # what a shell reports for a command that Ctrl-C ended

    signal.signal(signal.SIGINT, _leave)  # ahead of the imports below, which take a while

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

from kernels.gpu import GpuModule
from kernels.host.address import AddressModule
from kernels.host.errors import KernelError
from kernels.host.runner import CpuModule
from kernels.offline import CubinReport, compile_cubin
from kernels.signature import Param, Signature, parse_signatures

__all__ = [
    "Constants",
    "CubinReport",
    "KernelError",
    "Module",
    "Param",
    "Signature",
    "backend_available",
    "compile_offline",
    "compile_source",
    "constants_prelude",
    "load",
    "parse_signatures",
    "resolve_backend",
]

CUDA_DIR = Path(__file__).parent / "cuda"

Backend = Literal["auto", "gpu", "cpu"]
Constants = Mapping[str, int | bool | float | str]


class Module(Protocol):
    """The compiled kernels of one source. `CpuModule.launch` and `GpuModule.launch` document the contract."""

    backend: str
    name: str
    signatures: dict[str, Signature]

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[object],
        *,
        shared_bytes: int = 0,
        seed: int | None = None,
    ) -> None:
        """Run one kernel."""


# The header that declares each type a constant may name.
_TYPE_HEADERS = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h", "__nv_fp8": "cuda_fp8.h"}


def constants_prelude(constants: Constants) -> str:
    """Return the lines that define `constants` in front of a source.

    An int becomes a `constexpr int` (`long long` where it does not fit), a bool a `constexpr bool`, a float a
    `constexpr float` of exactly that value rounded to float, and a str names a type: `using NAME = value;`.
    """
    includes, lines = [], []
    for name, value in constants.items():
        if not name.isidentifier():
            raise ValueError(f"constant name {name!r} must be a C++ identifier")
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {'true' if value else 'false'};")
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"constant {name} ({value}) must fit in 64 bits")
            wide = not -(2**31) <= value < 2**31
            text = f"{value}ll" if value > -(2**63) else "-9223372036854775807ll - 1"
            lines.append(f"constexpr {'long long' if wide else 'int'} {name} = {text if wide else value};")
        elif isinstance(value, float):
            if value - value != 0:
                raise ValueError(f"constant {name} ({value}) must be finite")
            lines.append(f"constexpr float {name} = {value.hex()}f;")
        elif isinstance(value, str):
            includes += [header for start, header in _TYPE_HEADERS.items() if value.startswith(start)]
            lines.append(f"using {name} = {value};")
        else:
            raise TypeError(f"constant {name} must be an int, bool, float or str, not {type(value).__name__}")
    return "".join(
        [*(f"#include <{header}>\n" for header in dict.fromkeys(includes)), *(f"{s}\n" for s in lines)]
    )


@cache
def _gpu_problem() -> str | None:
    """Return why no GPU can be used, or None where one can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error})"
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU ({error})"
    return None if devices else "CuPy finds no GPU"


def backend_available(backend: str) -> bool:
    """Return whether `backend` ("gpu" or "cpu") can run kernels on this machine."""
    if backend == "gpu":
        return _gpu_problem() is None
    if backend == "cpu":
        from kernels.host.build import find_compiler
        from kernels.toolkit import cuda_include_dirs

        try:
            find_compiler()
            cuda_include_dirs()
        except RuntimeError:
            return False
        return True
    raise ValueError(f"backend ({backend}) must be gpu or cpu")


def resolve_backend(backend: str = "auto") -> str:
    """Return "gpu" or "cpu": as asked, or for "auto" the GPU if there is one.

    Raises RuntimeError, saying why, where the one asked for cannot run.
    """
    if backend == "auto":
        return "gpu" if backend_available("gpu") else "cpu"
    if backend not in ("gpu", "cpu"):
        raise ValueError(f"backend ({backend}) must be auto, gpu or cpu")
    if backend == "gpu" and (problem := _gpu_problem()) is not None:
        raise RuntimeError(f"backend gpu: {problem}")
    return backend


def compile_source(
    source: str,
    *,
    constants: Constants | None = None,
    backend: Backend = "auto",
    sanitize: str | None = None,
    name: str = "source.cu",
    include_dirs: Sequence[str | os.PathLike[str]] = (),
) -> Module:
    """Compile any CUDA source and return its kernels.

    `name` is what errors call the source. `include_dirs` are searched for the headers it includes, before NVIDIA's.

    Raises ValueError for a kernel whose parameters are not supported or, on the CPU, a source that does not compile
    (kernels.host.build.CompileError); RuntimeError where the backend cannot run.
    """
    chosen = resolve_backend(backend)
    folders = [Path(folder) for folder in include_dirs]
    prelude = constants_prelude(constants or {})
    if chosen == "gpu":
        if sanitize is not None:
            raise ValueError(f"sanitize ({sanitize}) needs the cpu backend")
        return GpuModule(prelude, source, name=name, include_dirs=folders)
    if sanitize == "address":
        return AddressModule(prelude, source, name=name, include_dirs=folders)
    if sanitize in (None, "memory"):
        return CpuModule(prelude, source, name=name, include_dirs=folders, watched=sanitize == "memory")
    raise ValueError(f"sanitize ({sanitize}) must be address, memory or None")


@cache
def _load(
    file: str, constants: tuple[tuple[str, type, object], ...], backend: str, sanitize: str | None
) -> Module:
    source = (CUDA_DIR / file).read_text()
    values = {name: value for name, _, value in constants}
    return compile_source(
        source,
        constants=values,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        sanitize=sanitize,
        name=file,
        include_dirs=[CUDA_DIR],
    )


def load(
    file: str, constants: Constants, *, backend: Backend = "auto", sanitize: str | None = None
) -> Module:
    """Compile kernels/cuda/`file` with `constants`, once a process: a second call returns the same module."""
    key = tuple((name, type(value), value) for name, value in constants.items())
    return _load(file, key, resolve_backend(backend), sanitize)


def compile_offline(
    source: str,
    arch: str,
    *,
    constants: Constants | None = None,
    name: str = "source.cu",
    include_dirs: Sequence[str | os.PathLike[str]] = (),
) -> CubinReport:
    """Compile a CUDA source to machine code for `arch` ("sm_90"), without a GPU, and report what its kernels use.

    Raises ValueError for an architecture that NVRTC does not know or a source that does not compile, RuntimeError
    where CuPy or NVRTC is missing.
    """
    folders = [Path(folder) for folder in include_dirs]
    return compile_cubin(constants_prelude(constants or {}), source, arch, name=name, include_dirs=folders)


if __name__ == "__main__":
    from kernels.report import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(main())
