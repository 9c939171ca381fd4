"""Which constants each CUDA source is compiled with: the one place where specialisation is decided.

A kernel is specialised by what changes its registers, its shared memory or its unrolled loops: element type,
head dimension, rows and tile. Everything else (tokens_per_block, heads, layers, lengths, strides) is a
run-time argument.
"""

from __future__ import annotations

from kernels.layout import DTYPES, HEAD_DIMS

Constants = dict[str, int | bool | float | str]

THREADS = 128
# Attention blocks that share a multiprocessor, by the rows of a block: as many as the registers leave room for
# (80, 96 and 168 a thread). Left to itself the compiler may aim for more and spill, or for fewer.
_MIN_BLOCKS = {1: 6, 2: 5}
_MIN_BLOCKS_OF_MANY_ROWS = 3
# Query heads that one thread block of decode attention serves; a larger group takes several blocks.
HEAD_TILES = (1, 2, 4, 8, 16)
# Shared memory of one key tile, of one value tile, and of a prefill block's queries, in bytes. Together with
# scores and padding every specialisation stays under the 48 KiB that need no opting in.
TILE_BYTES = 8192
QUERY_BYTES = 16384

_C_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _floor_power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _rows_within(budget: int, dtype: str, head_dim: int) -> int:
    """Return how many rows of `head_dim` elements fit in `budget` bytes: a power of two, at most 64."""
    return min(64, _floor_power_of_two(budget // (head_dim * _ITEMSIZES[dtype])))


def write_kv(dtype: str, head_dim: int) -> Constants:
    """Return the constants of write_kv.cu."""
    return {"T": _C_TYPES[dtype], "HEAD_DIM": head_dim, "THREADS": THREADS}


def gather_kv(dtype: str, head_dim: int) -> Constants:
    """Return the constants of gather_kv.cu."""
    return {"T": _C_TYPES[dtype], "HEAD_DIM": head_dim, "THREADS": THREADS}


def copy_blocks() -> Constants:
    """Return the constants of copy_blocks.cu, which moves bytes of any type."""
    return {"THREADS": THREADS}


def swap_blocks() -> Constants:
    """Return the constants of swap_blocks.cu, which moves bytes of any type."""
    return {"THREADS": THREADS, "UNROLL": 4}


def paged_attention(dtype: str, head_dim: int, group: int) -> Constants:
    """Return the constants of paged_attention.cu for `group` query heads per KV head.

    ROWS is the smallest head tile that serves the group in the fewest thread blocks.
    """
    blocks = -(-group // HEAD_TILES[-1])
    rows = next(tile for tile in HEAD_TILES if tile * blocks >= group)
    return {
        "T": _C_TYPES[dtype],
        "HEAD_DIM": head_dim,
        "ROWS": rows,
        "KV_TILE": _rows_within(TILE_BYTES, dtype, head_dim),
        "THREADS": THREADS,
        "MIN_BLOCKS": _MIN_BLOCKS.get(rows, _MIN_BLOCKS_OF_MANY_ROWS),
    }


def paged_prefill(dtype: str, head_dim: int) -> Constants:
    """Return the constants of paged_prefill.cu; KV_TILE leaves a thread 4 x 4 scores at most."""
    return {
        "T": _C_TYPES[dtype],
        "HEAD_DIM": head_dim,
        "ROWS": _rows_within(QUERY_BYTES, dtype, head_dim),
        "KV_TILE": min(32, _rows_within(TILE_BYTES, dtype, head_dim)),
        "THREADS": THREADS,
        "MIN_BLOCKS": _MIN_BLOCKS_OF_MANY_ROWS,
    }


def merge_attention(dtype: str, part_dtype: str, head_dim: int) -> Constants:
    """Return the constants of merge_attention.cu: parts of `part_dtype` merged into `dtype`."""
    return {
        "T": _C_TYPES[dtype],
        "PART": _C_TYPES[part_dtype],
        "HEAD_DIM": head_dim,
        "THREADS": THREADS,
    }


def specialisations() -> list[tuple[str, Constants]]:
    """Return every (source file, constants) that the operations can ask for."""
    found: list[tuple[str, Constants]] = [
        ("copy_blocks.cu", copy_blocks()),
        ("swap_blocks.cu", swap_blocks()),
    ]
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            found.append(("write_kv.cu", write_kv(dtype, head_dim)))
            found.append(("gather_kv.cu", gather_kv(dtype, head_dim)))
            found.extend(
                ("paged_attention.cu", paged_attention(dtype, head_dim, rows)) for rows in HEAD_TILES
            )
            found.append(("paged_prefill.cu", paged_prefill(dtype, head_dim)))
            for part_dtype in dict.fromkeys(("float32", dtype)):
                found.append(("merge_attention.cu", merge_attention(dtype, part_dtype, head_dim)))
    return found
