"""Run CUDA kernels on the CPU: a source becomes a shared library, whose kernels are launched in this process."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from kernels.host.build import HOST_DIR, KERNEL_FLAGS, build, find_compiler, include_flags
from kernels.host.errors import KernelError
from kernels.host.records import FailureRecord, LaunchRecord
from kernels.host.symbols import shared_variables, source_line
from kernels.host.translate import translation_unit
from kernels.signature import (
    C_TYPES,
    Param,
    Signature,
    check_count,
    check_dimensions,
    check_element,
    convert_scalar,
    parse_signatures,
)

# Compiling with -fsanitize=thread makes the compiler call a function at each memory access. Those functions are in
# watch.cpp, so the sanitizer's own library must not be linked.
WATCH_FLAGS = ("-fsanitize=thread", "-DCUDA_HOST_WATCH")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def array_address(kernel: str, param: Param, value: object) -> int | None:
    """Return the address to pass for a pointer parameter: that of an array's first element, or None for null.

    Raises TypeError for another kind of object, ValueError for a read-only array that the kernel may write to.
    """
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{kernel}: {param.name} must be a NumPy array or None, not {type(value).__name__}")
    check_element(kernel, param, value)
    if not param.read_only and not value.flags.writeable:
        raise ValueError(f"{kernel}: {param.name} points to non-const, but the array is read-only")
    return int(value.ctypes.data)


class HostModule(ABC):
    """The kernels of one CUDA source, compiled for the CPU; the face that a GPU module has too."""

    backend = "cpu"

    def __init__(self, prelude: str, source: str, *, name: str, include_dirs: Sequence[Path] = ()) -> None:
        self.name = name
        self.signatures = parse_signatures(source)
        self.spin_seconds = 10.0
        """Processor time without any progress of a block after which a launch is an error, in seconds."""
        self.workers = available_cores()
        """How many blocks run at the same time."""
        self._unit = translation_unit(prelude, source, name, self.signatures)

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
        """Run `kernel` over `grid` blocks of `block` threads, and return when all have finished.

        Arguments are NumPy arrays (passed by the address of their first element; None is a null pointer) and numbers,
        converted by the kernel's signature. `shared_bytes` is the size of `extern __shared__` memory. Blocks and
        threads start in the order of their indices or, with `seed`, in one drawn from it.

        Raises TypeError or ValueError for arguments that do not fit, KernelError for a kernel that breaks a rule.
        """
        if kernel not in self.signatures:
            raise ValueError(
                f"{self.name} has no kernel {kernel}: it has {', '.join(self.signatures) or 'none'}"
            )
        signature = self.signatures[kernel]
        check_count(kernel, signature, args)
        check_dimensions(kernel, grid, block, shared_bytes)
        values = [
            array_address(kernel, param, value)
            if param.kind == "pointer"
            else C_TYPES[param.kind](convert_scalar(kernel, param, value).item())
            for param, value in zip(signature, args, strict=True)
        ]
        record = LaunchRecord(
            grid=(ctypes.c_uint32 * 3)(*grid),
            block=(ctypes.c_uint32 * 3)(*block),
            shared_bytes=shared_bytes,
            seed=(seed or 0) & (2**64 - 1),
            shuffled=seed is not None,
            workers=self.workers,
            spin_seconds=self.spin_seconds,
        )
        self._run(kernel, signature, record, values, args)

    @abstractmethod
    def _run(
        self,
        kernel: str,
        signature: Signature,
        record: LaunchRecord,
        values: Sequence[object],
        args: Sequence[object],
    ) -> None:
        """Run a checked launch: `values` are addresses, None and ctypes scalars; `args` what the caller gave."""


@cache
def _runtime_path(watched: bool) -> Path:
    flags = [*KERNEL_FLAGS, "-O2", "-g1", "-pthread", *include_flags()]
    if watched:
        flags.append("-DCUDA_HOST_WATCH")
    return build((HOST_DIR / "runtime.cpp").read_text(), stem="runtime", flags=flags, link=["-shared"])


@cache
def _runtime(watched: bool) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_runtime_path(watched)))
    library.cuda_host_launch.restype = None
    library.cuda_host_launch.argtypes = [ctypes.POINTER(LaunchRecord), ctypes.POINTER(FailureRecord)]
    return library


class CpuModule(HostModule):
    """Kernels that run in this process; with `watched`, each access to shared memory is checked.

    A watched read of a shared byte that no thread of the block has written is a KernelError.
    """

    def __init__(
        self,
        prelude: str,
        source: str,
        *,
        name: str,
        include_dirs: Sequence[Path] = (),
        watched: bool = False,
    ) -> None:
        super().__init__(prelude, source, name=name, include_dirs=include_dirs)
        if watched and find_compiler().family == "zig":
            raise RuntimeError(
                "sanitize (memory) needs g++ or clang++: the ziglang wheel serves the plain mode only"
            )
        flags = [*KERNEL_FLAGS, "-g1", *include_flags(include_dirs)]
        runtime = _runtime_path(watched)
        stem = Path(name).stem
        if watched:
            # -O1: from -O2 on, equal code of two lines is merged, and an access may be reported at the wrong one.
            watching = [*flags, "-O1", *WATCH_FLAGS]
            objects = build(
                self._unit, flags=watching, link=["-c"], suffix=".o", stem=stem, include_dirs=include_dirs
            )
            self._path = build("", stem=stem, flags=["-fPIC"], link=["-shared"], libraries=[objects, runtime])
        else:
            optimised = [*flags, "-O3"]
            self._path = build(
                self._unit,
                flags=optimised,
                link=["-shared"],
                libraries=[runtime],
                stem=stem,
                include_dirs=include_dirs,
            )
        self._launch = _runtime(watched).cuda_host_launch
        self._library = ctypes.CDLL(str(self._path))

    def _run(
        self,
        kernel: str,
        signature: Signature,
        record: LaunchRecord,
        values: Sequence[object],
        args: Sequence[object],
    ) -> None:
        storage = [
            value if isinstance(value, ctypes._SimpleCData) else ctypes.c_void_p(value)  # type: ignore[arg-type]
            for value in values
        ]
        pointers = (ctypes.c_void_p * max(1, len(storage)))(*[ctypes.addressof(item) for item in storage])
        record.entry = ctypes.cast(self._library[f"cuda_host_entry_{kernel}"], ctypes.c_void_p).value
        record.arguments = ctypes.addressof(pointers)
        anchor = self._library["cuda_host_shared_anchor"]
        record.shared_anchor = ctypes.cast(anchor, ctypes.c_void_p).value
        failure = FailureRecord()
        self._launch(ctypes.byref(record), ctypes.byref(failure))
        if failure.failed:
            raise self._error(kernel, failure)

    def _error(self, kernel: str, failure: FailureRecord) -> KernelError:
        if failure.line == 0 and failure.address:
            file, failure.line = source_line(self._path, failure.address)
            failure.file = file.encode()
        error = failure.error(kernel)
        if failure.space == 0:
            return error
        where = f"byte {failure.offset} of dynamic shared memory"
        if failure.space == 1:
            for variable in shared_variables(self._path):
                if variable.offset <= failure.offset < variable.offset + variable.size:
                    where = f"byte {failure.offset - variable.offset} of {variable.name}"
        return error.but(f"{error.rule} ({where})")
