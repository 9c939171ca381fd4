"""How the pool lays keys and values out in memory: shapes, strides and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_TOKENS_PER_BLOCK = 256

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES = tuple(_NUMPY_DTYPES)


@dataclass(frozen=True)
class CacheLayout:
    """Describe a pool array `[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]`.

    Index 0 of axis 2 holds keys, index 1 values; one block id covers all layers. `dtype` is a name, not an
    array's dtype: CuPy has no bfloat16 of its own, so a "bfloat16" pool is `ml_dtypes.bfloat16` in NumPy and
    the same bits as uint16 in CuPy.

    Raises ValueError for a dtype, a head_dim or a tokens_per_block that the kernels are not built for.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int

    def __post_init__(self) -> None:
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"dtype ({self.dtype}) must be one of {', '.join(DTYPES)}")
        for name in ("num_layers", "num_kv_heads", "head_dim", "tokens_per_block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} ({value}) must be a positive integer")
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim ({self.head_dim}) must be one of {', '.join(map(str, HEAD_DIMS))}")
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise ValueError(f"tokens_per_block ({self.tokens_per_block}) must be a power of two")
        if self.tokens_per_block > MAX_TOKENS_PER_BLOCK:
            raise ValueError(
                f"tokens_per_block ({self.tokens_per_block}) must be at most {MAX_TOKENS_PER_BLOCK}"
            )

    @property
    def itemsize(self) -> int:
        """Return the bytes of one stored element."""
        return _NUMPY_DTYPES[self.dtype].itemsize

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes one token occupies over all layers: 2 · layers · KV heads · head_dim ·
        itemsize."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def bytes_per_block(self) -> int:
        """Return the bytes of one block over all layers."""
        return self.bytes_per_token * self.tokens_per_block

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Return the shape of one block: `[num_layers, 2, num_kv_heads, tokens_per_block, head_dim]`."""
        return (self.num_layers, 2, self.num_kv_heads, self.tokens_per_block, self.head_dim)

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Return the shape of a pool of `num_blocks` blocks."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks ({num_blocks}) must be a positive integer")
        return (num_blocks, *self.block_shape)

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """Return the strides of the pool's six axes, in elements."""
        strides = [1]
        for extent in reversed(self.block_shape):
            strides.append(strides[-1] * extent)
        block, layer, kv, head, token, element = reversed(strides)
        return (block, layer, kv, head, token, element)

    def array_dtype(self, backend: str) -> np.dtype[Any]:
        """Return the dtype of this pool's arrays on `backend` ("cpu" for NumPy, "gpu" for CuPy)."""
        if backend not in ("cpu", "gpu"):
            raise ValueError(f"backend ({backend}) must be cpu or gpu")
        if backend == "gpu" and self.dtype == "bfloat16":
            return np.dtype(np.uint16)
        return _NUMPY_DTYPES[self.dtype]

    def empty_pool(self, num_blocks: int, backend: str = "cpu") -> Any:
        """Return an uninitialised pool: a NumPy array on "cpu", a CuPy array on "gpu".

        No kernel reads a slot that was never written, so there is nothing to clear.
        """
        dtype = self.array_dtype(backend)
        if backend == "gpu":
            import cupy  # a GPU is optional

            return cupy.empty(self.pool_shape(num_blocks), dtype)
        return np.empty(self.pool_shape(num_blocks), dtype)

    def empty_host_pool(self, num_blocks: int, backend: str = "cpu") -> Any:
        """Return an uninitialised pool in host memory, for `swap_blocks` beside a pool on `backend`.

        On "cpu" that is a NumPy array like any other. On "gpu" it is a CuPy array over pinned host memory, at which
        kernels arrive through the bus; the memory is given back with the array.
        """
        if backend != "gpu":
            return self.empty_pool(num_blocks, backend)
        import cupy  # a GPU is optional

        shape, dtype = self.pool_shape(num_blocks), self.array_dtype(backend)
        size = num_blocks * self.bytes_per_block
        pinned = cupy.cuda.PinnedMemory(size, cupy.cuda.runtime.hostAllocMapped)
        memory = cupy.cuda.UnownedMemory(pinned.ptr, size, pinned, cupy.cuda.Device().id)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def dtype_name(array_dtype: Any) -> str:
    """Return the name of the type that an array of `array_dtype` holds: uint16 stands for bfloat16 bits.

    Raises ValueError for a dtype that no pool can have.
    """
    dtype = np.dtype(array_dtype)
    if dtype == np.uint16:
        return "bfloat16"
    for name, candidate in _NUMPY_DTYPES.items():
        if dtype == candidate:
            return name
    raise ValueError(f"dtype ({dtype}) must be one of {', '.join(DTYPES)} (or uint16 holding bfloat16 bits)")
