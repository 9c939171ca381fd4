"""What every kernel computes, said in NumPy float64: the oracle, one sequence and one query at a time.

The functions mirror `kernels.ops`; array contracts are stated there. Outputs of attention are float64 and are
never written to a caller's buffer. Nothing here knows of tiles, splits, warps or vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.layout import CacheLayout

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def sequence_kv(
    layout: CacheLayout, pool: Array, layer: int, table: Array, length: int
) -> tuple[Array, Array]:
    """Return one sequence's keys and values `[length, num_kv_heads, head_dim]`, in the pool's own dtype."""
    key = np.empty((length, layout.num_kv_heads, layout.head_dim), pool.dtype)
    value = np.empty_like(key)
    for token in range(length):
        block, offset = table[token // layout.tokens_per_block], token % layout.tokens_per_block
        key[token] = pool[block, layer, 0, :, offset]
        value[token] = pool[block, layer, 1, :, offset]
    return key, value


def attend(query: Array, key: Array, value: Array, scale: float) -> tuple[Float64, Float64]:
    """Return out `[num_heads, head_dim]` and natural log-sum-exp `[num_heads]` of one query token.

    `query` is `[num_heads, head_dim]`; `key` and `value` are `[num_keys, num_kv_heads, head_dim]`, all of
    which the query sees. Without keys the output is 0 and the log-sum-exp −inf.
    """
    out, lse = np.zeros(query.shape), np.full(len(query), -np.inf)
    if len(key) == 0:
        return out, lse
    group = len(query) // key.shape[1]
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        scores = scale * (query[heads].astype(np.float64) @ key[:, kv_head].astype(np.float64).T)
        largest = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=1, keepdims=True)
        out[heads] = weights / total @ value[:, kv_head].astype(np.float64)
        lse[heads] = (largest + np.log(total))[:, 0]
    return out, lse


def write_kv(
    layout: CacheLayout, pool: Array, layer: int, key: Array, value: Array, slot_mapping: Array
) -> None:
    """Store each token's key and value in its slot; skip tokens whose slot is negative."""
    for token, slot in enumerate(slot_mapping):
        if slot >= 0:
            block, offset = divmod(int(slot), layout.tokens_per_block)
            pool[block, layer, 0, :, offset] = key[token]
            pool[block, layer, 1, :, offset] = value[token]


def paged_attention(
    layout: CacheLayout,
    pool: Array,
    layer: int,
    query: Array,
    block_tables: Array,
    context_lens: Array,
    *,
    scale: float | None = None,
) -> tuple[Float64, Float64]:
    """Attend one query per sequence to all of that sequence's keys."""
    query_start = np.arange(len(query) + 1)
    return paged_prefill(layout, pool, layer, query, query_start, block_tables, context_lens, scale=scale)


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
) -> tuple[Float64, Float64]:
    """Attend query i of a sequence's n to the first context_len − n + i + 1 of its keys."""
    scale = layout.head_dim**-0.5 if scale is None else scale
    out, lse = np.empty(query.shape), np.empty(query.shape[:2])
    for sequence, length in enumerate(context_lens):
        key, value = sequence_kv(layout, pool, layer, block_tables[sequence], int(length))
        first, end = int(query_start[sequence]), int(query_start[sequence + 1])
        for token in range(first, end):
            visible = max(0, int(length) - (end - token) + 1)
            out[token], lse[token] = attend(query[token], key[:visible], value[:visible], scale)
    return out, lse


def merge_attention(outs: Array, lses: Array) -> tuple[Float64, Float64]:
    """Merge outputs over disjoint sets of keys `[parts, tokens, heads, dim]` by their log-sum-exps."""
    lses = lses.astype(np.float64)
    lse = np.logaddexp.reduce(lses, axis=0)
    with np.errstate(invalid="ignore"):  # −inf − −inf: a row that no part has keys for
        weights = np.where(lses == -np.inf, 0.0, np.exp(lses - lse))[..., None]
    return np.sum(np.where(weights == 0, 0.0, outs.astype(np.float64)) * weights, axis=0), lse


def copy_blocks(layout: CacheLayout, pool: Array, copies: Array) -> None:
    """Copy the first `valid` tokens of each source block to its destination, in every layer."""
    for source, destination, valid in copies:
        pool[destination, :, :, :, :valid] = pool[source, :, :, :, :valid]


def swap_blocks(layout: CacheLayout, source: Array, destination: Array, swaps: Array) -> None:
    """Copy each source block, whole, to its destination block in another pool."""
    for from_block, to_block in swaps:
        destination[to_block] = source[from_block]


def gather_kv(
    layout: CacheLayout, pool: Array, layer: int, block_tables: Array, token_start: Array
) -> tuple[Array, Array]:
    """Return the sequences' keys and values one after the other, `[total_tokens, num_kv_heads, head_dim]`."""
    parts = [
        sequence_kv(layout, pool, layer, table, int(end) - int(start))
        for table, start, end in zip(block_tables, token_start[:-1], token_start[1:], strict=True)
    ]
    return np.concatenate([key for key, _ in parts]), np.concatenate([value for _, value in parts])
