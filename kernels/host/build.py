"""Compile C++ for the CPU runner: find a compiler, build shared libraries, keep them on disk.

A library is named by the hash of everything that decides its content (source, headers, flags, compiler and
processor), written under a temporary name and renamed, so that processes that build the same one do not disturb each
other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from kernels.toolkit import cache_dir, cuda_include_dirs, find_includes

HOST_DIR = Path(__file__).parent


class CompileError(ValueError):
    """A CUDA source that the host compiler rejects; the message is the compiler's."""


@dataclass(frozen=True)
class Compiler:
    """A C++17 compiler: the words that call it, what it is, and whether it brings the sanitizers."""

    command: tuple[str, ...]
    version: str
    family: str
    """"gcc", "clang" or "zig"."""


def _probe(command: Sequence[str]) -> Compiler | None:
    try:
        shown = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=120, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version = shown.stdout.splitlines()[0] if shown.stdout else ""
    family = "zig" if "ziglang" in command else "clang" if "clang" in version.lower() else "gcc"
    return Compiler(tuple(command), version, family)


@cache
def find_compiler() -> Compiler:
    """Return the compiler to use: $CXX, g++, clang++, else the ziglang wheel.

    Raises RuntimeError where there is none.
    """
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        found = _probe(command)
        if found is None:
            raise RuntimeError(f"CXX ({os.environ['CXX']}) is not a C++ compiler that runs")
        return found
    candidates = [[name] for name in ("g++", "clang++") if shutil.which(name)]
    if find_spec("ziglang") is not None:
        candidates.append([sys.executable, "-m", "ziglang", "c++"])
    for command in candidates:
        found = _probe(command)
        if found is not None:
            return found
    raise RuntimeError("no C++17 compiler for the CPU runner: install g++ or clang++, or pip install ziglang")


@cache
def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


@cache
def _host_headers() -> str:
    """Return the digest of the runner's own headers."""
    digest = hashlib.sha256()
    for path in sorted([*HOST_DIR.glob("*.h"), *HOST_DIR.glob("*.cpp"), *HOST_DIR.glob("crt/*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def include_flags(include_dirs: Sequence[str | Path] = ()) -> list[str]:
    """Return the flags for a kernel's own headers, the runner's, and NVIDIA's, searched in that order."""
    flags = [f"-I{folder}" for folder in include_dirs]
    flags.append(f"-I{HOST_DIR}")
    for folder in cuda_include_dirs():
        flags += ["-isystem", str(folder)]
    return flags


# What kernels and runtime are compiled with. CUDA lets pointers of different types alias, and its multiply-adds are
# only those that a kernel asks for or the GPU's compiler chooses: on the CPU, products round.
KERNEL_FLAGS = (
    "-std=c++17",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
)


# NVIDIA's half-precision headers take half of a kernel's compilation, so g++ precompiles them.
_SLOW_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h")


def _run(command: Sequence[str], folder: str, what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise CompileError(f"{what} does not compile for the CPU:\n{done.stderr.strip()}")


def _key(*parts: object) -> str:
    """Return a name for what the compiler makes of `parts`, on this machine with these headers."""
    digest = hashlib.sha256()
    for part in (*parts, find_compiler(), _processor(), _host_headers(), cuda_include_dirs()):
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:32]


def _precompiled(headers: tuple[str, ...], flags: tuple[str, ...]) -> list[str]:
    """Return the flags that put the runner's header and `headers` in front of a source, precompiled by g++."""
    folder = cache_dir() / f"headers-{_key(headers, flags)}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="build-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            (made / "all.h").write_text("".join(f"#include <{name}>\n" for name in ("cuda_host.h", *headers)))
            _run(
                [*find_compiler().command, *flags, "-x", "c++-header", "all.h"],
                str(made),
                "the runner's header",
            )
            # Where another process was quicker, its folder stays.
            with contextlib.suppress(OSError):
                made.rename(folder)
    return ["-include", str(folder / "all.h")]


def build(
    source: str,
    *,
    stem: str,
    flags: Sequence[str],
    link: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
    libraries: Sequence[Path] = (),
    suffix: str = ".so",
) -> Path:
    """Return what the compiler makes of the C++ `source`, from the disk cache where it is there.

    `flags` decide how the source is compiled, `link` what the result is; `include_dirs` hold the headers that it
    includes besides the runner's and NVIDIA's. Raises CompileError with the compiler's own words.
    """
    compiler = find_compiler()
    if compiler.family == "zig":
        flags = [*flags, "-fno-sanitize=undefined"]  # zig's default
    includes = find_includes(source, include_dirs)
    # What is in the kernel's own headers matters, not where they lie; to NVIDIA's headers neither does, so that all
    # kernels share what is precompiled.
    own = {f"-I{folder}" for folder in include_dirs}
    anywhere = tuple(flag for flag in flags if flag not in own)
    target = cache_dir() / f"{stem}-{_key(source, includes.digest(), anywhere, link, libraries)}{suffix}"
    if target.is_file():
        return target
    front: list[str] = []
    slow = tuple(name for name in _SLOW_HEADERS if name in includes.others)
    if slow and compiler.family == "gcc":
        front = _precompiled(slow, anywhere)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="build-") as scratch:
        unit = Path(scratch) / f"{stem}.cpp"
        unit.write_text(source)
        output = Path(scratch) / target.name
        if compiler.family == "zig" and "-shared" in link:
            # Linked as C: as C++, zig first builds a C++ library that nothing here needs.
            _run([*compiler.command, *flags, "-c", str(unit), "-o", f"{unit}.o"], scratch, stem)
            c_compiler = [*compiler.command[:-1], "cc"]
            _run([*c_compiler, *link, f"{unit}.o", "-o", str(output), *map(str, libraries)], scratch, stem)
        else:
            inputs = [str(unit), "-o", str(output), *map(str, libraries)]
            _run([*compiler.command, *flags, *link, *front, *inputs], scratch, stem)
        os.replace(output, target)
    return target
