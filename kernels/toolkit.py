"""Where NVIDIA's C++ headers are on this machine: a runtime wheel, CuPy's bundle, or a CUDA toolkit."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

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


def _candidates() -> list[Path]:
    folders = []
    for nvidia in _package_folders("nvidia"):
        folders += [nvidia / "cuda_runtime" / "include", nvidia / "cuda_cccl" / "include"]
        folders += [nvidia / "cu13" / "include", nvidia / "cu13" / "include" / "cccl"]
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
