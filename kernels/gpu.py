"""Run CUDA kernels on a GPU through CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.signature import (
    Signature,
    check_count,
    check_dimensions,
    check_element,
    convert_scalar,
    parse_signatures,
)
from kernels.toolkit import cuda_include_dirs, find_includes


def compiler_options(include_dirs: Sequence[Path] = ()) -> tuple[str, ...]:
    """Return NVRTC's options for the project's kernels; CuPy adds the architecture and -ftz=true."""
    folders = [*include_dirs, *cuda_include_dirs()]
    return ("-std=c++17", "-lineinfo", *(f"-I{folder}" for folder in folders))


def full_source(prelude: str, source: str, name: str, include_dirs: Sequence[Path]) -> str:
    """Return the text that NVRTC compiles for a CUDA source called `name`.

    CuPy keeps compiled code by the text and the options alone, so the text names the content of its headers too.
    """
    return f'// headers {find_includes(source, include_dirs).digest()}\n{prelude}#line 1 "{name}"\n{source}'


def convert_arguments(kernel: str, signature: Signature, args: Sequence[object]) -> tuple[object, ...]:
    """Return the arguments as CuPy passes them in the signature's own widths.

    A device array stays as it is (CuPy passes its base address), None becomes a null pointer, and a number becomes a
    NumPy scalar of the parameter's type: a bare Python int or float would travel as 8 bytes.
    """
    check_count(kernel, signature, args)
    converted: list[object] = []
    for param, value in zip(signature, args, strict=True):
        if param.kind != "pointer":
            converted.append(convert_scalar(kernel, param, value))
        elif value is None:
            converted.append(np.uint64(0))
        elif hasattr(value, "__cuda_array_interface__"):
            check_element(kernel, param, value)
            converted.append(value)
        else:
            raise TypeError(
                f"{kernel}: {param.name} must be a device array or None, not {type(value).__name__}"
            )
    return tuple(converted)


class GpuModule:
    """The kernels of one CUDA source, compiled by CuPy for the current device."""

    backend = "gpu"

    def __init__(self, prelude: str, source: str, *, name: str, include_dirs: Sequence[Path] = ()) -> None:
        import cupy

        self.name = name
        self.signatures = parse_signatures(source)
        text = full_source(prelude, source, name, include_dirs)
        self._module: Any = cupy.RawModule(code=text, options=compiler_options(include_dirs), backend="nvrtc")
        self._functions: dict[str, Any] = {}

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
        """Launch `kernel` on CuPy's current stream, and return without waiting for it.

        Arguments are CuPy arrays (passed by their base address; None is a null pointer) and numbers. `seed` has no
        meaning here: the GPU chooses the order of blocks and threads.

        Raises TypeError or ValueError for arguments that do not fit the signature.
        """
        if kernel not in self.signatures:
            raise ValueError(
                f"{self.name} has no kernel {kernel}: it has {', '.join(self.signatures) or 'none'}"
            )
        check_dimensions(kernel, grid, block, shared_bytes)
        converted = convert_arguments(kernel, self.signatures[kernel], args)
        function = self._functions.get(kernel)
        if function is None:
            function = self._functions[kernel] = self._module.get_function(kernel)
        # A kernel may use 48 KiB unless the driver is asked for more.
        if shared_bytes > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        function(grid, block, converted, shared_mem=shared_bytes)
