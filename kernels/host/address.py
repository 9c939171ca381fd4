"""Run CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each launch in a process of its own."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels.host.build import HOST_DIR, KERNEL_FLAGS, build, find_compiler, include_flags
from kernels.host.errors import KernelError
from kernels.host.records import FailureRecord, LaunchRecord
from kernels.host.runner import HostModule
from kernels.host.symbols import is_kernel_file, section
from kernels.signature import Signature

SHARED_SECTION = ".cuda_shared"
SANITIZED = (
    "-DCUDA_HOST_ADDRESS",
    "-fsanitize=address,undefined",
    # What it finds, AddressSanitizer finds too, and names the variable.
    "-fno-sanitize=object-size",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
# A wide red zone catches indices that are further off. abort_on_error lets the program add block and thread.
ASAN_OPTIONS = "detect_leaks=0:redzone=2048:max_redzone=2048:abort_on_error=1:detect_stack_use_after_return=0"
UBSAN_OPTIONS = "abort_on_error=1:print_stacktrace=0"
ABORTED = 86
_STUMBLED, _ATTEMPTS = "nested bug in the same thread", 4
"""What the sanitizer says, once in some hundred reports, when it comes upon something to report while it ends another:
then nobody has said which thread and which array it was. A launch works on copies, so it can be made again."""


class _Request(ctypes.Structure):
    """Request in address_main.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_char * 256),
        ("launch", LaunchRecord),
        ("shared_section", ctypes.c_uint64),
        ("num_regions", ctypes.c_uint64),
        ("num_arguments", ctypes.c_uint64),
        ("failure", FailureRecord),
    )


@dataclass
class _Region:
    """Memory that one or several (overlapping) arrays of a launch lie in, copied as one allocation."""

    low: int
    high: int
    written: bool
    names: list[tuple[int, int, str]]
    """Each array's (low, high, parameter name)."""


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the first address that `array` occupies, and the first beyond it."""
    low = high = int(array.ctypes.data)
    if array.size == 0:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    return low, high + array.itemsize


def _regions(signature: Signature, args: Sequence[object]) -> list[_Region]:
    arrays = []
    for param, value in zip(signature, args, strict=True):
        if isinstance(value, np.ndarray):
            arrays.append((*_bounds(value), param))
    regions: list[_Region] = []
    for low, high, param in sorted(arrays, key=lambda found: found[:2]):
        last = regions[-1] if regions else None
        if last is not None and (low < last.high or (low, high) == (last.low, last.high)):
            last.high = max(last.high, high)
            last.written |= not param.read_only
            last.names.append((low, high, param.name))
        else:
            regions.append(_Region(low, high, not param.read_only, [(low, high, param.name)]))
    return regions


@cache
def _objects() -> list[Path]:
    """Return the runtime and the program around it, neither of them instrumented."""
    flags = [*KERNEL_FLAGS, "-O2", "-g1", "-pthread", "-DCUDA_HOST_ADDRESS", *include_flags()]
    return [
        build((HOST_DIR / f"{stem}.cpp").read_text(), stem=stem, flags=flags, link=["-c"], suffix=".o")
        for stem in ("runtime", "address_main")
    ]


class AddressModule(HostModule):
    """Kernels whose every access out of bounds is an error that names line, thread and array.

    Each launch copies its arrays into a process of its own, one exact allocation each (arrays that overlap share
    one), and back. Blocks run one at a time.
    """

    def __init__(self, prelude: str, source: str, *, name: str, include_dirs: Sequence[Path] = ()) -> None:
        super().__init__(prelude, source, name=name, include_dirs=include_dirs)
        family = find_compiler().family
        if family == "zig":
            raise RuntimeError(
                "sanitize (address) needs g++ or clang++: the ziglang wheel serves the plain mode only"
            )
        sections = [f"-fsanitize-sections={SHARED_SECTION}"] if family == "gcc" else []
        self._path = build(
            self._unit,
            stem=Path(name).stem,
            flags=[
                *KERNEL_FLAGS,
                "-O1",
                "-g",
                "-pthread",
                *SANITIZED,
                *sections,
                *include_flags(include_dirs),
            ],
            include_dirs=include_dirs,
            libraries=_objects(),
            suffix="",
        )
        self._shared = section(self._path, SHARED_SECTION)

    def _run(
        self,
        kernel: str,
        signature: Signature,
        record: LaunchRecord,
        values: Sequence[object],
        args: Sequence[object],
    ) -> None:
        record.workers = 1
        if self._shared is not None:
            record.shared_bytes_static = self._shared.size
        regions = _regions(signature, args)
        request = _Request(
            kernel=kernel.encode(),
            launch=record,
            shared_section=self._shared.address if self._shared else 0,
            num_regions=len(regions),
            num_arguments=len(values),
        )
        body = [bytes(request)]
        body += [struct.pack("<QQ", region.high - region.low, region.low % 16) for region in regions]
        for value in values:
            if value is None:
                body.append(struct.pack("<qQ", -1, 0))
            elif isinstance(value, int):
                # The last region that starts at or before it: where one array ends, the next may begin.
                index = max(i for i, region in enumerate(regions) if region.low <= value)
                body.append(struct.pack("<qQ", index, value - regions[index].low))
            else:
                body.append(struct.pack("<q", -1) + bytes(value).ljust(8, b"\0"))  # type: ignore[call-overload]
        head = sum(map(len, body))
        body += [ctypes.string_at(region.low, region.high - region.low) for region in regions]
        with tempfile.NamedTemporaryFile(prefix="launch-") as file:
            file.writelines(body)
            file.flush()
            environment = {**os.environ, "ASAN_OPTIONS": ASAN_OPTIONS, "UBSAN_OPTIONS": UBSAN_OPTIONS}
            for _ in range(_ATTEMPTS):
                done = subprocess.run([str(self._path), file.name], capture_output=True, env=environment)
                said = done.stderr.decode(errors="replace")
                if _STUMBLED not in said:
                    break
            if done.returncode != 0:
                raise _report(kernel, done.returncode, said, regions)
            answer = Path(file.name).read_bytes()
        failure = _Request.from_buffer_copy(answer).failure
        if failure.failed:
            raise failure.error(kernel)
        for region in regions:
            size = region.high - region.low
            if region.written:
                ctypes.memmove(region.low, answer[head : head + size], size)
            head += size


_FRAME = re.compile(r"^\s+#\d+ 0x[0-9a-f]+ in .*? (\S+?):(\d+)(?::\d+)?$", re.MULTILINE)
_UNDEFINED = re.compile(r"^(\S+?):(\d+):\d+: runtime error: (.*)$", re.MULTILINE)
_ACCESS = re.compile(r"^(READ|WRITE) of size (\d+) at (0x[0-9a-f]+)", re.MULTILINE)
_AT = re.compile(r"^cuda_host: at (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)$", re.MULTILINE)
_REGION = re.compile(r"^cuda_host: region (-?\d+) (0x[0-9a-f]+) (\d+)$", re.MULTILINE)
_GLOBAL = re.compile(
    r"is located (\d+) bytes (to the right of|to the left of|after|before|inside of) global variable '(\w+)'"
    r".* of size (\d+)"
)


def _report(kernel: str, status: int, text: str, regions: list[_Region]) -> KernelError:
    """Return what a sanitizer's report says, as one line."""
    where: dict[str, Any] = {}
    if at := _AT.search(text):
        numbers = [int(number) for number in at.groups()]
        where.update(block=tuple(numbers[:3]), thread=tuple(numbers[3:]))
    if undefined := _UNDEFINED.search(text):
        file, line, what = undefined.groups()
        what = re.sub(r" address 0x[0-9a-f]+", " address", what)
        return KernelError(kernel, what, file=os.path.basename(file), line=int(line), **where)
    for file, line in _FRAME.findall(text):
        if is_kernel_file(file):
            where.update(file=os.path.basename(file), line=int(line))
            break
    if "SEGV on unknown address" in text:
        verb = "writes" if "caused by a WRITE" in text else "reads"
        return KernelError(kernel, f"{verb} at an address where there is no memory", **where)
    access = _ACCESS.search(text)
    if access is None:
        summary = re.search(r"ERROR: (.*)", text)
        what = (
            summary.group(1) if summary else f"the process ended with status {status}: {text.strip()[-500:]}"
        )
        return KernelError(kernel, what, **where)
    verb = "reads" if access.group(1) == "READ" else "writes"
    did = f"{verb} {access.group(2)} bytes"
    return KernelError(kernel, f"{did} {_place(text, int(access.group(3), 16), regions)}", **where)


def _beside(distance: int, after: bool, name: str, size: int) -> str:
    if after:
        return f"{f'{distance} bytes' if distance else 'just'} past the end of {name} ({size} bytes)"
    return f"{distance} bytes before the start of {name} ({size} bytes)"


def _place(text: str, address: int, regions: list[_Region]) -> str:
    """Return where `address` lies, in the caller's terms."""
    if variables := _GLOBAL.findall(text):
        distance, side, name, size = min(variables, key=lambda found: int(found[0]))
        if side == "inside of":
            return f"across the end of {name} ({size} bytes)"
        return _beside(int(distance), side in ("to the right of", "after"), name, int(size))
    nearest: tuple[int, str] | None = None
    for index, start, length in _REGION.findall(text):
        begin, size = int(start, 16), int(length)
        beyond = address - (begin + size) if address >= begin else begin - address
        if beyond < 0:
            continue
        name = "dynamic shared memory"
        if int(index) >= 0:
            region = regions[int(index)]
            edge = region.high if address >= begin else region.low
            name = " and ".join(n for low, high, n in region.names if edge in (low, high))
        if nearest is None or beyond < nearest[0]:
            nearest = (beyond, _beside(beyond, address >= begin, name, size))
    if "stack-buffer" in text or "dynamic-stack" in text:
        return "outside of a local array"
    if nearest is None or nearest[0] > 65536:
        return f"at {address:#x}, where no argument lies"
    return nearest[1]
