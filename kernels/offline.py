"""Compile CUDA sources to machine code for any architecture, on a machine without a GPU, and read what they use."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels.gpu import compiler_options, full_source
from kernels.signature import parse_signatures
from kernels.toolkit import cache_dir

INSTALL_HINT = "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 (or cupy-cuda13x nvidia-cuda-nvrtc)"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor, as ptxas reports it."""

    registers: int
    """Registers a thread."""
    spill_bytes: int
    """Bytes a thread stores to local memory, and loads from it, for want of registers."""
    stack_bytes: int
    """Bytes of local memory a thread: spills, and arrays indexed by what is not a constant."""
    shared_bytes: int
    """Static shared memory a block, in bytes."""
    barriers: int


@dataclass(frozen=True)
class CubinReport:
    """Machine code for one architecture, and the resources of each kernel in it."""

    arch: str
    cubin: bytes
    kernels: dict[str, Resources]


@cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(f"offline compilation needs CuPy and NVRTC ({error}): {INSTALL_HINT}") from None
    return nvrtc


def check_arch(arch: str) -> None:
    """Raise ValueError unless the installed NVRTC compiles for `arch` ("sm_90", "sm_90a", ...).

    Raises RuntimeError, saying what to install, where there is no NVRTC.
    """
    supported = _nvrtc().getSupportedArchs()
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if match is None or int(match[1]) not in supported:
        known = " ".join(f"sm_{number}" for number in supported)
        raise ValueError(f"arch ({arch}) must be one of {known}")


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def parse_resources(log: str) -> dict[str, Resources]:
    """Return each kernel's resources from what `ptxas -v` prints."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        found[name] = Resources(
            registers=_number(r"Used (\d+) registers", part),
            spill_bytes=_number(r"(\d+) bytes spill stores", part)
            + _number(r"(\d+) bytes spill loads", part),
            stack_bytes=_number(r"(\d+) bytes stack frame", part),
            shared_bytes=_number(r"(\d+) bytes smem", part),
            barriers=_number(r"used (\d+) barriers", part),
        )
    return found


def _compile(text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Return (cubin, log). Raises ValueError with NVRTC's own words for a source that does not compile."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise ValueError(f"{name} does not compile:\n{nvrtc.getProgramLog(program).strip()}") from None
        # getCUBIN takes the last byte for a string's terminator.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def compile_cubin(
    prelude: str, source: str, arch: str, *, name: str, include_dirs: Sequence[Path] = ()
) -> CubinReport:
    """Compile `source` behind `prelude` for `arch`, or take it from the disk cache.

    Raises ValueError for an unknown architecture or a source that does not compile, RuntimeError without NVRTC.
    """
    check_arch(arch)
    text = full_source(prelude, source, name, include_dirs)
    # The options that CuPy adds when it compiles for a device, and a report.
    options = (
        *compiler_options(include_dirs),
        f"-arch={arch}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    )
    key = hashlib.sha256(repr((text, options, _nvrtc().getVersion())).encode())
    cubin_path = cache_dir() / f"{Path(name).stem}-{arch}-{key.hexdigest()[:32]}.cubin"
    log_path = cubin_path.with_suffix(".log")
    if not cubin_path.is_file():
        cubin, log = _compile(text, name, options)
        _replace(log_path, log.encode())
        _replace(cubin_path, cubin)
    resources = parse_resources(log_path.read_text())
    missing = [kernel for kernel in parse_signatures(source) if kernel not in resources]
    if missing:
        raise RuntimeError(f"{name}: ptxas reports nothing of {', '.join(missing)}:\n{log_path.read_text()}")
    return CubinReport(arch, cubin_path.read_bytes(), resources)
