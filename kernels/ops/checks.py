"""What an operation asks of its arguments; every check raises ValueError with the value and the rule in one
line.

Contents are checked only where that is cheap: on the host. On a GPU it would wait for the device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels.layout import CacheLayout, dtype_name
from kernels.ops.launch import Array

VECTOR_BYTES = 16


def _address(array: Array) -> int:
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.data.ptr)


def _shape(name: str, array: Array, expected: tuple[int | None, ...], axes: str) -> None:
    if array.ndim != len(expected) or any(
        want is not None and have != want for have, want in zip(array.shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} {tuple(array.shape)} must have the shape [{axes}] = ({wanted})")


def _element(name: str, array: Array, dtype: str) -> None:
    if dtype_name(array.dtype) != dtype:
        raise ValueError(f"{name} ({array.dtype}) must hold {dtype}")


def _aligned(name: str, array: Array) -> None:
    if array.size and _address(array) % VECTOR_BYTES:
        raise ValueError(f"{name} must start at a multiple of {VECTOR_BYTES} bytes")


def contiguous(name: str, array: Array, shape: tuple[int | None, ...], axes: str, dtype: str) -> None:
    """Require a C-contiguous, 16-byte-aligned array of `shape` (None: any extent) that holds `dtype`."""
    _shape(name, array, shape, axes)
    _element(name, array, dtype)
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    _aligned(name, array)


def pool(layout: CacheLayout, array: Array, name: str = "pool") -> None:
    """Require a pool of `layout`."""
    axes = "num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim"
    contiguous(name, array, (None, *layout.block_shape), axes, layout.dtype)


def apart(name: str, array: Array, other_name: str, other: Array) -> None:
    """Require two contiguous arrays that share no memory."""
    first, second = _address(array), _address(other)
    if first < second + other.nbytes and second < first + array.nbytes:
        raise ValueError(f"{name} and {other_name} must not overlap in memory")


def layer(layout: CacheLayout, index: int) -> None:
    """Require the index of one of the layout's layers."""
    if not 0 <= index < layout.num_layers:
        raise ValueError(f"layer ({index}) must be in 0..{layout.num_layers - 1}")


def token_rows(
    name: str, array: Array, num_tokens: int | None, heads: int | None, layout: CacheLayout
) -> int:
    """Require `[num_tokens, heads, head_dim]`, contiguous within a token; return the elements between tokens.

    Tokens may lie apart, as the slices of a fused query-key-value projection do.
    """
    _shape(name, array, (num_tokens, heads, layout.head_dim), "num_tokens, heads, head_dim")
    _element(name, array, layout.dtype)
    token, head, element = array.strides
    if array.shape[0] == 0:
        return 0
    if element != layout.itemsize or (array.shape[1] > 1 and head != layout.head_dim * layout.itemsize):
        raise ValueError(f"{name} must be contiguous within a token")
    if array.shape[0] == 1:
        token = 0
    elif token % VECTOR_BYTES or token < 0:
        raise ValueError(
            f"{name} has {token} bytes between tokens, which must be a multiple of {VECTOR_BYTES}"
        )
    _aligned(name, array)
    return int(token) // layout.itemsize


def integers(name: str, array: Array, shape: tuple[int | None, ...], dtype: Any, axes: str) -> None:
    """Require a C-contiguous array of `shape` (None: any extent) and exactly this integer `dtype`."""
    _shape(name, array, shape, axes)
    if array.dtype != dtype:
        raise ValueError(f"{name} ({array.dtype}) must be {np.dtype(dtype)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")


def block_tables(array: Array, num_seqs: int) -> int:
    """Require int32 `[num_seqs, max_blocks_per_seq]`, contiguous within a row; return the row stride in
    entries."""
    _shape("block_tables", array, (num_seqs, None), "num_seqs, max_blocks_per_seq")
    if array.dtype != np.int32:
        raise ValueError(f"block_tables ({array.dtype}) must be int32")
    row, entry = array.strides
    if array.shape[1] > 1 and entry != 4:
        raise ValueError("block_tables must be contiguous within a row")
    return int(row) // 4 if array.shape[0] > 1 else int(array.shape[1])


def tables_cover(layout: CacheLayout, tables: Array, lengths: Array, num_blocks: int) -> None:
    """On the host, require each sequence's blocks to be in its table's row and in the pool."""
    if not isinstance(lengths, np.ndarray) or lengths.size == 0:
        return
    capacity = tables.shape[1] * layout.tokens_per_block
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > capacity:
        worst = low if low < 0 else high
        raise ValueError(f"a context length ({worst}) must be in 0..{capacity}, what a block table row holds")
    used = np.arange(tables.shape[1]) < (-(-lengths // layout.tokens_per_block))[:, None]
    wrong = used & ((tables < 0) | (tables >= num_blocks))
    if wrong.any():
        sequence, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"block_tables[{sequence}, {column}] ({tables[sequence, column]}) must be in 0..{num_blocks - 1}"
        )


def row_starts(name: str, array: Array, total: int | None) -> None:
    """On the host, require offsets that begin at 0, never fall, and end at `total` (None: anywhere)."""
    if not isinstance(array, np.ndarray):
        return
    if array[0] != 0:
        raise ValueError(f"{name}[0] ({array[0]}) must be 0")
    falls = np.flatnonzero(np.diff(array) < 0)
    if falls.size:
        raise ValueError(
            f"{name}[{falls[0] + 1}] ({array[falls[0] + 1]}) must not be below {array[falls[0]]}"
        )
    if total is not None and array[-1] != total:
        raise ValueError(f"{name}[-1] ({array[-1]}) must be the number of tokens ({total})")


def slots(layout: CacheLayout, mapping: Array, num_blocks: int) -> None:
    """On the host, require every slot that is not negative to be in the pool, and to be named once."""
    if not isinstance(mapping, np.ndarray):
        return
    kept = mapping[mapping >= 0]
    if kept.size == 0:
        return
    end = num_blocks * layout.tokens_per_block
    if kept.max() >= end:
        raise ValueError(f"slot ({kept.max()}) must be below {end}")
    ordered = np.sort(kept)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise ValueError(f"slot ({twice[0]}) must be written by one token")


def copy_list(layout: CacheLayout, copies: Array, num_blocks: int) -> None:
    """On the host, require copies that stay in the pool and can run in parallel."""
    if not isinstance(copies, np.ndarray) or len(copies) == 0:
        return
    blocks, valid = copies[:, :2], copies[:, 2]
    if blocks.min() < 0 or blocks.max() >= num_blocks:
        worst = blocks.min() if blocks.min() < 0 else blocks.max()
        raise ValueError(f"a copy names block ({worst}), which must be in 0..{num_blocks - 1}")
    if valid.min() < 0 or valid.max() > layout.tokens_per_block:
        worst = valid.min() if valid.min() < 0 else valid.max()
        raise ValueError(f"valid tokens of a copy ({worst}) must be in 0..{layout.tokens_per_block}")
    destinations, counts = np.unique(blocks[:, 1], return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"block ({destinations[counts > 1][0]}) must be the destination of one copy only")
    both = np.intersect1d(blocks[:, 0], destinations)
    if both.size:
        raise ValueError(f"block ({both[0]}) must not be both a source and a destination of one list")


def swap_list(swaps: Array, num_source_blocks: int, num_destination_blocks: int) -> None:
    """On the host, require swaps that stay in their pools and can run in parallel."""
    if not isinstance(swaps, np.ndarray) or len(swaps) == 0:
        return
    for column, name, count in ((0, "source", num_source_blocks), (1, "destination", num_destination_blocks)):
        blocks = swaps[:, column]
        if blocks.min() < 0 or blocks.max() >= count:
            worst = blocks.min() if blocks.min() < 0 else blocks.max()
            raise ValueError(f"a swap names {name} block ({worst}), which must be in 0..{count - 1}")
    destinations, counts = np.unique(swaps[:, 1], return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"block ({destinations[counts > 1][0]}) must be the destination of one swap only")


def group_of(layout: CacheLayout, num_heads: int) -> int:
    """Return the query heads per KV head."""
    if num_heads < 1 or num_heads % layout.num_kv_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({layout.num_kv_heads})"
        )
    return num_heads // layout.num_kv_heads


def scale_or_default(layout: CacheLayout, scale: float | None) -> float:
    """Return `scale`, or 1 / sqrt(head_dim)."""
    if scale is None:
        return 1.0 / math.sqrt(layout.head_dim)
    if not math.isfinite(scale):
        raise ValueError(f"scale ({scale}) must be finite")
    return float(scale)
