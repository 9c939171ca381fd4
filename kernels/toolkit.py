"""Where things are on this machine: NVIDIA's C++ headers, and the folder that compiled kernels are kept in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

INSTALL_HINT = (
    "pip install nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12 (or nvidia-cuda-runtime nvidia-cuda-cccl)"
)


def _package_folders(name: str) -> list[Path]:
    """Return where the package `name` is installed, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or []]


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _candidates() -> list[Path]:
    """Return the folders where headers may be, those that fit the installed CuPy first."""
    folders = []
    for nvidia in _package_folders("nvidia"):
        cuda12 = [nvidia / "cuda_runtime" / "include", nvidia / "cuda_cccl" / "include"]
        cuda13 = [nvidia / "cu13" / "include", nvidia / "cu13" / "include" / "cccl"]
        folders += cuda13 + cuda12 if _is_installed("cupy-cuda13x") else cuda12 + cuda13
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders += [
                Path(os.environ[variable]) / "include",
                Path(os.environ[variable]) / "include" / "cccl",
            ]
    folders += [Path("/usr/local/cuda/include"), Path("/usr/local/cuda/include/cccl")]
    for cupy in _package_folders("cupy"):
        folders.append(cupy / "_core" / "include" / "cupy" / "_cccl" / "libcudacxx")
    return folders


@cache
def cuda_include_dirs() -> tuple[Path, ...]:
    """Return the include folders that together hold cuda_fp16.h and the nv/target it needs.

    Raises RuntimeError, saying what to install, where no such pair is found.
    """
    candidates = _candidates()
    runtime = next((folder for folder in candidates if (folder / "cuda_fp16.h").is_file()), None)
    if runtime is None:
        raise RuntimeError(f"no CUDA headers (cuda_fp16.h) found: {INSTALL_HINT}, or set CUDA_HOME")
    target = next((folder for folder in [runtime, *candidates] if (folder / "nv" / "target").is_file()), None)
    if target is None:
        raise RuntimeError(
            f"no CCCL headers (nv/target) found for {runtime}: {INSTALL_HINT}, or set CUDA_HOME"
        )
    return (runtime,) if target == runtime else (runtime, target)


_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)


class Includes(NamedTuple):
    """What a source includes, directly and through the headers it finds in its own folders."""

    files: tuple[Path, ...]
    """The headers found in those folders."""
    others: frozenset[str]
    """Names that are not there: NVIDIA's and the system's."""

    def digest(self) -> str:
        """Return a digest of the content of `files`."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


def find_includes(source: str, folders: Sequence[Path]) -> Includes:
    """Follow every #include of `source`, whatever conditional it stands in, through `folders`."""
    files: dict[Path, None] = {}
    others: set[str] = set()
    pending = [(source, list(folders))]
    while pending:
        text, places = pending.pop()
        for name in _INCLUDE.findall(text):
            path = next((folder / name for folder in places if (folder / name).is_file()), None)
            if path is None:
                others.add(name)
            elif path not in files:
                files[path] = None
                pending.append((path.read_text(), [path.parent, *folders]))
    return Includes(tuple(sorted(files)), frozenset(others))


def cache_dir() -> Path:
    """Return the folder of compiled kernels, creating it: $XDG_CACHE_HOME (or ~/.cache)/paged-kv-lab."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "paged-kv-lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
