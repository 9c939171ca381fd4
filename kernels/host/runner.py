"""Run CUDA kernels on the CPU: translate a source into a shared library and launch what is in it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from kernels.host.build import BASE_FLAGS, HOST_DIR, build_library, include_flags
from kernels.host.errors import KernelError
from kernels.signature import (
    C_TYPES,
    Signature,
    blank_comments,
    check_count,
    check_dimensions,
    convert_scalar,
    parse_signatures,
)


class _Launch(ctypes.Structure):
    """CudaHostLaunch in runtime.cpp."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("shared_anchor", ctypes.c_void_p),
        ("shared_begin", ctypes.c_void_p),
        ("shared_bytes_static", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("shuffled", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("spin_seconds", ctypes.c_double),
    )


class _Failure(ctypes.Structure):
    """CudaHostFailure in runtime.cpp."""

    _fields_ = (
        ("failed", ctypes.c_uint32),
        ("line", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("block_number", ctypes.c_uint64),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("file", ctypes.c_char * 512),
        ("message", ctypes.c_char * 1024),
    )


_EXTERN_SHARED = re.compile(
    r"\bextern\s+(?:(?:__align__|alignas)\s*\([^)]*\)\s*)*__shared__\s+(?:(?:__align__|alignas)\s*\([^)]*\)\s*)*"
    r"(?P<type>[A-Za-z_][\w:<>,\s]*?)\s*\b(?P<name>[A-Za-z_]\w*)\s*\[\s*\]\s*;"
)


def dynamic_shared_as_pointer(source: str) -> str:
    """Return `source` with each `extern __shared__ T name[];` made a pointer, which C++ can express.

    This is the one change made to a CUDA source; lines stay where they are. Raises ValueError for such a declaration
    outside a function.
    """
    text = blank_comments(source)
    pieces, position = [], 0
    for match in _EXTERN_SHARED.finditer(text):
        before = text[: match.start()]
        if before.count("{") == before.count("}"):
            raise ValueError(
                f"extern __shared__ {match['name']}[] must be declared inside the kernel that uses it"
            )
        kind = " ".join(match["type"].split())
        lines = "\n" * match.group().count("\n")
        pieces += [
            source[position : match.start()],
            f"{kind}* const {match['name']} = ::cuda_host::dynamic_shared<{kind}>();{lines}",
        ]
        position = match.end()
    return "".join([*pieces, source[position:]])


def _entry(name: str, signature: Signature) -> str:
    """Return the C++ function that calls kernel `name` with arguments by address, checked against the table."""
    count = len(signature)
    types = ", ".join(f"class A{i}" for i in range(count))
    names = ", ".join(f"A{i}" for i in range(count))
    values = ", ".join(f"*static_cast<A{i}*>(arguments[{i}])" for i in range(count))
    checks = []
    for i, param in enumerate(signature):
        size = 8 if param.kind == "pointer" else np.dtype(param.kind).itemsize
        checks.append(f'static_assert(sizeof(A{i}) == {size}, "{name}: {param.name} is not {param.kind}");')
    template = f"template <{types}>\n" if count else ""
    return (
        f"{template}static void cuda_host_call_{name}(void (*kernel)({names}), void* const* arguments) {{\n"
        f"    {' '.join(checks)}\n    (void)arguments;\n    kernel({values});\n}}\n"
        f'extern "C" __attribute__((visibility("default"))) void cuda_host_entry_{name}(void* const* arguments) {{\n'
        f"    cuda_host_call_{name}({name}, arguments);\n}}\n"
    )


def translation_unit(prelude: str, source: str, name: str, signatures: dict[str, Signature]) -> str:
    """Return the C++ that the host compiler sees for a CUDA source called `name`."""
    entries = "".join(_entry(kernel, signature) for kernel, signature in signatures.items())
    return (
        f'#include "cuda_host.h"\n{prelude}#line 1 "{name}"\n{dynamic_shared_as_pointer(source)}\n'
        f'#line 1 "entries"\n{entries}'
    )


@cache
def _runtime_path(mode_flags: tuple[str, ...] = ()) -> Path:
    source = (HOST_DIR / "runtime.cpp").read_text()
    flags = [*BASE_FLAGS, "-O2", "-g1", "-shared", "-pthread", *mode_flags, *include_flags()]
    return build_library(source, stem="runtime", flags=flags)


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_runtime_path()), mode=ctypes.RTLD_GLOBAL)
    library.cuda_host_launch.restype = None
    library.cuda_host_launch.argtypes = [ctypes.POINTER(_Launch), ctypes.POINTER(_Failure)]
    return library


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class CpuModule:
    """The kernels of one CUDA source, compiled for the CPU; the face that a GPU module has too."""

    backend = "cpu"

    def __init__(self, prelude: str, source: str, *, name: str, include_dirs: Sequence[Path] = ()) -> None:
        self.name = name
        self.signatures = parse_signatures(source)
        self.spin_seconds = 10.0
        """Processor time without any progress of a block after which a launch is an error, in seconds."""
        self.workers = available_cores()
        """How many blocks run at the same time."""
        unit = translation_unit(prelude, source, name, self.signatures)
        headers = [path for folder in include_dirs for path in sorted(Path(folder).glob("*.cuh"))]
        flags = [*BASE_FLAGS, "-O2", "-g1", "-shared", *include_flags(include_dirs)]
        _runtime()
        path = build_library(
            unit, stem=Path(name).stem, flags=flags, inputs=headers, libraries=[_runtime_path()]
        )
        self._library = ctypes.CDLL(str(path))

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

        Arguments are NumPy arrays (passed by their base address; None is a null pointer) and numbers, converted by
        the kernel's signature. `shared_bytes` is the size of `extern __shared__` memory. With `seed`, blocks and
        threads run in an order drawn from it.

        Raises TypeError or ValueError for arguments that do not fit, KernelError for a kernel that breaks a rule.
        """
        signature = self._signature(kernel)
        check_count(kernel, signature, args)
        check_dimensions(kernel, grid, block, shared_bytes)
        storage: list[object] = []
        for param, value in zip(signature, args, strict=True):
            if param.kind == "pointer":
                storage.append(ctypes.c_void_p(array_address(kernel, param.name, param.read_only, value)))
            else:
                storage.append(C_TYPES[param.kind](convert_scalar(kernel, param, value).item()))
        pointers = (ctypes.c_void_p * max(1, len(storage)))(*[ctypes.addressof(item) for item in storage])  # type: ignore[arg-type]
        launch = _Launch(
            entry=ctypes.cast(self._library[f"cuda_host_entry_{kernel}"], ctypes.c_void_p),
            arguments=ctypes.addressof(pointers),
            shared_anchor=ctypes.cast(self._library["cuda_host_shared_anchor"], ctypes.c_void_p),
            grid=(ctypes.c_uint32 * 3)(*grid),
            block=(ctypes.c_uint32 * 3)(*block),
            shared_bytes=shared_bytes,
            seed=(seed or 0) & (2**64 - 1),
            shuffled=seed is not None,
            workers=self.workers,
            spin_seconds=self.spin_seconds,
        )
        failure = _Failure()
        _runtime().cuda_host_launch(ctypes.byref(launch), ctypes.byref(failure))
        if failure.failed:
            raise self._error(kernel, failure)

    def _signature(self, kernel: str) -> Signature:
        if kernel not in self.signatures:
            raise ValueError(
                f"{self.name} has no kernel {kernel}: it has {', '.join(self.signatures) or 'none'}"
            )
        return self.signatures[kernel]

    def _error(self, kernel: str, failure: _Failure) -> KernelError:
        x, y, z = failure.block
        i, j, k = failure.thread
        return KernelError(
            kernel,
            failure.message.decode(),
            block=(x, y, z),
            thread=(i, j, k),
            file=os.path.basename(failure.file.decode()),
            line=failure.line,
        )


def array_address(kernel: str, name: str, read_only: bool, value: object) -> int | None:
    """Return the address to pass for a pointer parameter: that of an array's first element, or None for null."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{kernel}: {name} must be a NumPy array or None, not {type(value).__name__}")
    if not read_only and not value.flags.writeable:
        raise ValueError(f"{kernel}: {name} is written through, but the array is read-only")
    return int(value.ctypes.data)
