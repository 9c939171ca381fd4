"""Where the arrays of a call live, and the one way from there to a compiled kernel."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kernels.compile import Backend, load

# A numpy.ndarray or a cupy.ndarray.
Array = Any

MAX_GRID_YZ = 65535

# The same number on every machine, so that a run on the CPU does not depend on its cores.
_BLOCKS_ON_CPU = 8


def backend_of(**arrays: Array) -> Backend:
    """Return "cpu" if all arrays are NumPy's, "gpu" if all are CuPy's on one device.

    Raises ValueError that names the first array which is neither, or lives elsewhere than the first one.
    """
    where: dict[str, str] = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            where[name] = "cpu"
        elif hasattr(array, "__cuda_array_interface__") and hasattr(array, "device"):
            where[name] = f"gpu {int(array.device)}"
        else:
            raise ValueError(f"{name} ({type(array).__name__}) must be a numpy or a cupy array")
    first_name, first = next(iter(where.items()))
    for name, place in where.items():
        if place != first:
            raise ValueError(f"{name} ({place}) must be on the same device as {first_name} ({first})")
    return "gpu" if first.startswith("gpu") else "cpu"


def empty(backend: Backend, shape: Sequence[int], dtype: Any) -> Array:
    """Return an uninitialised array on `backend`; kernels write every element that a caller may read."""
    if backend == "gpu":
        import cupy  # a GPU is optional

        return cupy.empty(tuple(shape), dtype)
    return np.empty(tuple(shape), dtype)


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


def blocks_to_fill(backend: Backend, per_multiprocessor: int) -> int:
    """Return how many thread blocks keep the whole of the current device busy."""
    if backend == "gpu":
        import cupy

        return _multiprocessors(int(cupy.cuda.Device().id)) * per_multiprocessor
    return _BLOCKS_ON_CPU


def launch(
    backend: Backend,
    kernel: str,
    constants: Mapping[str, int | bool | float | str],
    grid: tuple[int, int, int],
    args: Sequence[Any],
) -> None:
    """Run `kernel` of the source of that name; a block has `constants["THREADS"]` threads."""
    module = load(f"{kernel}.cu", constants, backend=backend)
    module.launch(kernel, grid, (int(constants["THREADS"]), 1, 1), args)
