"""Operations that move keys and values: into the pool, within it, and out of it."""

from __future__ import annotations

import numpy as np

from kernels import specialise
from kernels.layout import CacheLayout
from kernels.ops import checks
from kernels.ops.launch import MAX_GRID_YZ, Array, backend_of, blocks_to_fill, empty, launch

# Thread blocks a multiprocessor that swap blocks: the bus is full long before the multiprocessors are.
_BLOCKS_FOR_THE_BUS = 1


def _log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def write_kv(
    layout: CacheLayout, pool: Array, layer: int, key: Array, value: Array, slot_mapping: Array
) -> None:
    """Store each token's key and value in its slot of `layer`; skip tokens whose slot is negative.

    `key`, `value`: `[num_tokens, num_kv_heads, head_dim]` of the pool's dtype, contiguous within a token.
    `slot_mapping`: int64 `[num_tokens]`, slot = block · tokens_per_block + offset; no slot appears twice.
    Raises ValueError for arrays that do not fit the layout, and on the host for slots outside the pool.
    """
    backend = backend_of(pool=pool, key=key, value=value, slot_mapping=slot_mapping)
    checks.pool(layout, pool)
    checks.layer(layout, layer)
    num_tokens = int(key.shape[0])
    key_stride = checks.token_rows("key", key, None, layout.num_kv_heads, layout)
    value_stride = checks.token_rows("value", value, num_tokens, layout.num_kv_heads, layout)
    checks.integers("slot_mapping", slot_mapping, (num_tokens,), np.int64, "num_tokens")
    checks.slots(layout, slot_mapping, int(pool.shape[0]))
    if num_tokens == 0:
        return
    launch(
        backend,
        "write_kv",
        specialise.write_kv(layout.dtype, layout.head_dim),
        (num_tokens, 1, 1),
        [
            pool,
            key,
            value,
            key_stride,
            value_stride,
            slot_mapping,
            layout.num_layers,
            layer,
            layout.num_kv_heads,
            _log2(layout.tokens_per_block),
        ],
    )


def copy_blocks(layout: CacheLayout, pool: Array, copies: Array) -> None:
    """Copy the first `valid` tokens of each source block to its destination, in every layer, all in parallel.

    `copies`: int32 `[num_copies, 3]` of (source block, destination block, valid tokens). Within one list no
    block is both a source and a destination, and no destination appears twice.
    Raises ValueError for arrays that do not fit the layout, and on the host for a list that breaks these
    rules.
    """
    backend = backend_of(pool=pool, copies=copies)
    checks.pool(layout, pool)
    checks.integers("copies", copies, (None, 3), np.int32, "num_copies, 3")
    checks.copy_list(layout, copies, int(pool.shape[0]))
    num_copies = int(copies.shape[0])
    if num_copies == 0:
        return
    planes = layout.num_layers * 2 * layout.num_kv_heads
    launch(
        backend,
        "copy_blocks",
        specialise.copy_blocks(),
        (num_copies, min(planes, MAX_GRID_YZ), 1),
        [
            pool,
            copies,
            planes,
            layout.tokens_per_block,
            layout.head_dim * layout.itemsize // checks.VECTOR_BYTES,
        ],
    )


def swap_blocks(layout: CacheLayout, source: Array, destination: Array, swaps: Array) -> None:
    """Copy whole blocks of one pool to blocks of another, in every layer, all in parallel.

    `source` and `destination`: two pools of `layout`, of any numbers of blocks, that share no memory. One of them
    is as a rule the host's, see `CacheLayout.empty_host_pool`. `swaps`: int32 `[num_swaps, 2]` of (source block,
    destination block); no destination appears twice. What KVCacheManager.pending_swaps hands out is executed as

        swap_blocks(layout, pool, host_pool, transfers.swap_outs)
        swap_blocks(layout, host_pool, pool, transfers.swap_ins)

    in this order, before the step's copies and writes. On a GPU it is one launch on the current stream, which
    reads or writes the host's memory through the bus; a copy engine (one cudaMemcpyAsync a block) would leave the
    multiprocessors alone, but costs the host a call for each block, and there is no such path here.
    Raises ValueError for arrays that do not fit the layout, and on the host for a list that breaks these rules.
    """
    backend = backend_of(source=source, destination=destination, swaps=swaps)
    checks.pool(layout, source, "source")
    checks.pool(layout, destination, "destination")
    checks.apart("source", source, "destination", destination)
    checks.integers("swaps", swaps, (None, 2), np.int32, "num_swaps, 2")
    checks.swap_list(swaps, int(source.shape[0]), int(destination.shape[0]))
    num_swaps = int(swaps.shape[0])
    if num_swaps == 0:
        return
    constants = specialise.swap_blocks()
    vectors = layout.bytes_per_block // checks.VECTOR_BYTES
    parts = -(-vectors // (int(constants["THREADS"]) * int(constants["UNROLL"])))
    parts = min(parts, max(1, blocks_to_fill(backend, _BLOCKS_FOR_THE_BUS) // num_swaps), MAX_GRID_YZ)
    launch(
        backend,
        "swap_blocks",
        constants,
        (num_swaps, parts, 1),
        [destination, source, swaps, vectors],
    )


def gather_kv(
    layout: CacheLayout,
    pool: Array,
    layer: int,
    block_tables: Array,
    token_start: Array,
    *,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Return the sequences' keys and values of `layer`, contiguous and one sequence after the other.

    `block_tables`: int32 `[num_seqs, max_blocks_per_seq]`; entries past a sequence's blocks are not read.
    `token_start`: int32 `[num_seqs + 1]`: sequence s fills the tokens [token_start[s], token_start[s + 1]).
    `out`: key and value `[total_tokens, num_kv_heads, head_dim]` of the pool's dtype; without it, on a GPU,
    the call waits for the device to learn the total.
    Raises ValueError for arrays that do not fit the layout, and on the host for block ids outside the pool.
    """
    backend = backend_of(pool=pool, block_tables=block_tables, token_start=token_start)
    checks.pool(layout, pool)
    checks.layer(layout, layer)
    num_seqs = int(block_tables.shape[0])
    table_stride = checks.block_tables(block_tables, num_seqs)
    checks.integers("token_start", token_start, (num_seqs + 1,), np.int32, "num_seqs + 1")
    checks.row_starts("token_start", token_start, None)
    if backend == "cpu":
        checks.tables_cover(layout, block_tables, np.diff(token_start), int(pool.shape[0]))
    if out is None:
        shape = (int(token_start[-1]), layout.num_kv_heads, layout.head_dim)
        key, value = empty(backend, shape, pool.dtype), empty(backend, shape, pool.dtype)
    else:
        key, value = out
        backend_of(pool=pool, out_key=key, out_value=value)
        total = int(token_start[-1]) if backend == "cpu" else None
        for name, array in (("out key", key), ("out value", value)):
            axes = "total_tokens, num_kv_heads, head_dim"
            checks.contiguous(name, array, (total, layout.num_kv_heads, layout.head_dim), axes, layout.dtype)
    columns = min(int(block_tables.shape[1]), MAX_GRID_YZ)
    if num_seqs == 0 or columns == 0 or key.shape[0] == 0:
        return key, value
    launch(
        backend,
        "gather_kv",
        specialise.gather_kv(layout.dtype, layout.head_dim),
        (num_seqs, columns, 1),
        [
            key,
            value,
            pool,
            block_tables,
            token_start,
            table_stride,
            layout.num_layers,
            layer,
            layout.num_kv_heads,
            _log2(layout.tokens_per_block),
        ],
    )
    return key, value
