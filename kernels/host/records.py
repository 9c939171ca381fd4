"""The structures that Python and the runtime exchange, as machine.h declares them."""

from __future__ import annotations

import ctypes
import os

from kernels.host.errors import KernelError

MESSAGE_BYTES = 1024
FILE_BYTES = 512


class LaunchRecord(ctypes.Structure):
    """CudaHostLaunch: what a launch asks for."""

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


class FailureRecord(ctypes.Structure):
    """CudaHostFailure: where and why a launch failed."""

    _fields_ = (
        ("failed", ctypes.c_uint32),
        ("line", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("space", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("block_number", ctypes.c_uint64),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("file", ctypes.c_char * FILE_BYTES),
        ("message", ctypes.c_char * MESSAGE_BYTES),
    )

    def error(self, kernel: str) -> KernelError:
        """Return the exception that says it."""
        return KernelError(
            kernel,
            self.message.decode(errors="replace"),
            block=tuple(self.block),
            thread=tuple(self.thread),
            file=os.path.basename(self.file.decode(errors="replace")),
            line=self.line,
        )
