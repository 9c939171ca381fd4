"""Attention over a paged KV cache: decode, prefill, and the merge of partial results."""

from __future__ import annotations

import numpy as np

from kernels import specialise
from kernels.compile import Backend
from kernels.layout import HEAD_DIMS, CacheLayout, dtype_name
from kernels.ops import checks
from kernels.ops.launch import MAX_GRID_YZ, Array, backend_of, blocks_to_fill, empty, launch

# A split shorter than this costs more in its partial output than it gains in parallelism.
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 128


def _outputs(backend: Backend, query: Array, out: Array | None, lse: Array | None) -> tuple[Array, Array]:
    """Return the caller's output buffers, checked, or fresh ones."""
    if out is None:
        out = empty(backend, query.shape, query.dtype)
    if lse is None:
        lse = empty(backend, query.shape[:2], np.float32)
    backend_of(query=query, out=out, lse=lse)
    checks.contiguous("out", out, query.shape, "num_tokens, num_heads, head_dim", dtype_name(query.dtype))
    checks.contiguous("lse", lse, query.shape[:2], "num_tokens, num_heads", "float32")
    return out, lse


def _head_tiles(group: int, rows: int) -> int:
    return -(-group // rows)


def choose_splits(blocks_wanted: int, blocks_per_split: int, max_keys: int, kv_tile: int) -> int:
    """Return how many parts to cut each context into, so that the device is full and no part is tiny.

    Lengths live on the device, so `max_keys` is what the block table can hold.
    """
    wanted = -(-blocks_wanted // blocks_per_split)
    return max(1, min(wanted, max_keys // (kv_tile * _MIN_TILES_PER_SPLIT), _MAX_SPLITS))


def paged_attention(
    layout: CacheLayout,
    pool: Array,
    layer: int,
    query: Array,
    block_tables: Array,
    context_lens: Array,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Array, Array]:
    """Attend one query per sequence to all of that sequence's keys in `layer`; return (out, lse).

    `query`: `[num_seqs, num_heads, head_dim]` of the pool's dtype, contiguous within a token; num_heads is
    any multiple of num_kv_heads. `block_tables`: int32 `[num_seqs, max_blocks_per_seq]`, entries past a
    sequence's blocks are not read. `context_lens`: int32 `[num_seqs]`. `scale` defaults to 1 /
    sqrt(head_dim). Each context is cut into `num_splits` parts (default: as many as fill the device), merged
    by a second kernel.
    `out` like `query`; `lse` float32 `[num_seqs, num_heads]`, natural. Without keys: output 0, lse −inf.
    Raises ValueError for arrays that do not fit the layout, and on the host for block ids outside the pool.
    """
    backend = backend_of(pool=pool, query=query, block_tables=block_tables, context_lens=context_lens)
    checks.pool(layout, pool)
    checks.layer(layout, layer)
    query_stride = checks.token_rows("query", query, None, None, layout)
    num_seqs, num_heads, head_dim = (int(extent) for extent in query.shape)
    group = checks.group_of(layout, num_heads)
    scale = checks.scale_or_default(layout, scale)
    table_stride = checks.block_tables(block_tables, num_seqs)
    checks.integers("context_lens", context_lens, (num_seqs,), np.int32, "num_seqs")
    checks.tables_cover(layout, block_tables, context_lens, int(pool.shape[0]))
    out, lse = _outputs(backend, query, out, lse)
    if num_seqs == 0:
        return out, lse

    constants = specialise.paged_attention(layout.dtype, head_dim, group)
    head_blocks = layout.num_kv_heads * _head_tiles(group, int(constants["ROWS"]))
    if num_splits is None:
        max_keys = int(block_tables.shape[1]) * layout.tokens_per_block
        wanted = blocks_to_fill(backend, int(constants["MIN_BLOCKS"]))
        num_splits = choose_splits(wanted, num_seqs * head_blocks, max_keys, int(constants["KV_TILE"]))
    elif not 1 <= num_splits <= MAX_GRID_YZ:
        raise ValueError(f"num_splits ({num_splits}) must be in 1..{MAX_GRID_YZ}")
    part_outs = part_maxima = part_totals = None
    if num_splits > 1:
        part_outs = empty(backend, (num_splits, *query.shape), np.float32)
        part_maxima = empty(backend, (num_splits, *query.shape[:2]), np.float32)
        part_totals = empty(backend, (num_splits, *query.shape[:2]), np.float32)
    launch(
        backend,
        "paged_attention",
        constants,
        (num_seqs, head_blocks, num_splits),
        [
            out,
            lse,
            part_outs,
            part_maxima,
            part_totals,
            query,
            query_stride,
            pool,
            block_tables,
            context_lens,
            table_stride,
            layout.num_layers,
            layer,
            layout.num_kv_heads,
            group,
            layout.tokens_per_block.bit_length() - 1,
            scale,
        ],
    )
    if num_splits > 1:
        _launch_merge(backend, part_outs, part_maxima, part_totals, out, lse)
    return out, lse


def paged_prefill(
    layout: CacheLayout,
    pool: Array,
    layer: int,
    query: Array,
    query_start: Array,
    block_tables: Array,
    context_lens: Array,
    *,
    scale: float | None = None,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Array, Array]:
    """Attend ragged runs of queries causally to their sequences' keys in `layer`; return (out, lse).

    `query`: `[num_tokens, num_heads, head_dim]`; `query_start`: int32 `[num_seqs + 1]`, sequence s has the
    tokens [query_start[s], query_start[s + 1]), possibly none. Query i of n sees the first context_len − n +
    i + 1 keys (none if that is not positive): `context_lens` counts this step's tokens, whose keys write_kv
    stored before. Other arrays, results and errors as in `paged_attention`.
    """
    backend = backend_of(
        pool=pool,
        query=query,
        query_start=query_start,
        block_tables=block_tables,
        context_lens=context_lens,
    )
    checks.pool(layout, pool)
    checks.layer(layout, layer)
    query_stride = checks.token_rows("query", query, None, None, layout)
    num_tokens, num_heads, head_dim = (int(extent) for extent in query.shape)
    group = checks.group_of(layout, num_heads)
    scale = checks.scale_or_default(layout, scale)
    checks.integers("context_lens", context_lens, (None,), np.int32, "num_seqs")
    num_seqs = int(context_lens.shape[0])
    checks.integers("query_start", query_start, (num_seqs + 1,), np.int32, "num_seqs + 1")
    checks.row_starts("query_start", query_start, num_tokens)
    table_stride = checks.block_tables(block_tables, num_seqs)
    checks.tables_cover(layout, block_tables, context_lens, int(pool.shape[0]))
    out, lse = _outputs(backend, query, out, lse)
    if num_tokens == 0:
        return out, lse

    constants = specialise.paged_prefill(layout.dtype, head_dim)
    tiles = num_tokens * group // int(constants["ROWS"]) + num_seqs
    launch(
        backend,
        "paged_prefill",
        constants,
        (tiles, layout.num_kv_heads, 1),
        [
            out,
            lse,
            query,
            query_stride,
            query_start,
            pool,
            block_tables,
            context_lens,
            num_seqs,
            table_stride,
            layout.num_layers,
            layer,
            layout.num_kv_heads,
            group,
            layout.tokens_per_block.bit_length() - 1,
            scale,
        ],
    )
    return out, lse


def merge_attention(
    outs: Array, lses: Array, *, out: Array | None = None, lse: Array | None = None
) -> tuple[Array, Array]:
    """Merge attention outputs over disjoint sets of keys into the output over all of them; return (out, lse).

    `outs`: `[num_parts, num_tokens, num_heads, head_dim]`; `lses`: float32 `[num_parts, num_tokens,
    num_heads]`, natural. The output of a part whose lse is −inf is not read. `out` has the dtype of `outs`,
    or any other if `outs` is float32.
    Raises ValueError for arrays that do not fit each other.
    """
    backend = backend_of(outs=outs, lses=lses)
    axes = "num_parts, num_tokens, num_heads, head_dim"
    part_dtype = dtype_name(outs.dtype)
    checks.contiguous("outs", outs, (None, None, None, None), axes, part_dtype)
    num_parts, num_tokens, num_heads, head_dim = (int(extent) for extent in outs.shape)
    checks.contiguous("lses", lses, outs.shape[:3], "num_parts, num_tokens, num_heads", "float32")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim ({head_dim}) must be one of {', '.join(map(str, HEAD_DIMS))}")
    if num_parts < 1:
        raise ValueError(f"num_parts ({num_parts}) must be at least 1")
    if out is None:
        out = empty(backend, outs.shape[1:], outs.dtype)
    if lse is None:
        lse = empty(backend, outs.shape[1:3], np.float32)
    backend_of(outs=outs, out=out, lse=lse)
    dtype = dtype_name(out.dtype)
    if part_dtype not in ("float32", dtype):
        raise ValueError(f"outs ({part_dtype}) must be float32 or what out holds ({dtype})")
    checks.contiguous("out", out, outs.shape[1:], "num_tokens, num_heads, head_dim", dtype)
    checks.contiguous("lse", lse, outs.shape[1:3], "num_tokens, num_heads", "float32")
    if num_tokens * num_heads:
        _launch_merge(backend, outs, lses, None, out, lse)
    return out, lse


def _launch_merge(
    backend: Backend, outs: Array, lses: Array, totals: Array | None, out: Array, lse: Array
) -> None:
    """Merge checked arrays; with `totals`, each part's log-sum-exp is lses + log(totals)."""
    num_parts, num_tokens, num_heads, head_dim = (int(extent) for extent in outs.shape)
    constants = specialise.merge_attention(dtype_name(out.dtype), dtype_name(outs.dtype), head_dim)
    rows = num_tokens * num_heads
    vectors = rows * (head_dim * out.dtype.itemsize // checks.VECTOR_BYTES)
    grid = (-(-vectors // int(constants["THREADS"])), 1, 1)
    launch(backend, "merge_attention", constants, grid, [out, lse, outs, lses, totals, rows, num_parts])
