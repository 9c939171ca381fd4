"""paged_attention and merge_attention against the reference, row by row, with everything unused poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    PROPERTY_BACKENDS,
    AttentionCase,
    Fault,
    Sizes,
    assert_caught,
    assert_lse_close,
    assert_rows_close,
    cache_sizes,
    launches,
    make_case,
    make_dominate,
    poisoned,
    round_to,
    run_decode,
    seeds,
    to_backend,
    to_host,
)

from kernels import ops, reference, specialise
from kernels.compile import KernelError
from kernels.layout import DTYPES, HEAD_DIMS, CacheLayout
from kernels.ops.attention import choose_splits
from kernels.tolerance import NUMPY_DTYPES

# (dtype, head_dim, groups): every head tile, ragged ones, and groups of more than one tile.
SPECIALISATIONS = [
    ("float32", 80, (1, 2)),
    ("float16", 128, (3, 4)),
    ("float16", 64, (7, 8, 5)),
    ("bfloat16", 96, (1, 12, 16, 17)),
]


def split_edges(case: AttentionCase, num_splits: int) -> list[int]:
    """Return the first key of each split of the (only) length of a case, as the kernel cuts it."""
    group = case.query.shape[1] // case.layout.num_kv_heads
    tile = int(specialise.paged_attention(case.layout.dtype, case.layout.head_dim, group)["KV_TILE"])
    length = int(case.context_lens.max())
    tiles = -(-length // tile)
    step = -(-tiles // num_splits) * tile
    return list(range(0, length, step))


def check_edges(
    dtype: str, head_dim: int, group: int, *, backend: str = "cpu", num_splits: int = 3, length: int = 150
) -> None:
    """Let each edge key dominate in turn: first, last, both sides of each block, tile and split edge."""
    sizes = Sizes((length,), (1,), num_kv_heads=2, group=group, tokens_per_block=16)
    tile = int(specialise.paged_attention(dtype, head_dim, group)["KV_TILE"])
    starts = {*range(0, length, tile), *range(0, length, 16)}
    starts |= set(split_edges(make_case(dtype, head_dim, sizes), num_splits))
    positions = sorted({length - 1} | starts | {start - 1 for start in starts if start})
    many = Sizes(
        (length,) * len(positions), (1,) * len(positions), num_kv_heads=2, group=group, tokens_per_block=16
    )
    case = make_case(dtype, head_dim, many)
    for sequence, position in enumerate(positions):
        make_dominate(case, sequence, position)
    run_decode(case, backend, num_splits=num_splits)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@pytest.mark.parametrize(("dtype", "head_dim", "groups"), SPECIALISATIONS)
@given(data=st.data(), num_splits=st.sampled_from([None, 1, 2, 3, 7]), order=seeds)
def test_decodes_like_the_reference(
    backend: str,
    dtype: str,
    head_dim: int,
    groups: tuple[int, ...],
    data: st.DataObject,
    num_splits: int | None,
    order: int,
) -> None:
    sizes = data.draw(cache_sizes(groups=groups, max_queries=1, max_length=300))
    with launches(seed=order, on=backend):
        run_decode(make_case(dtype, head_dim, sizes), backend, num_splits=num_splits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [("float32", 64, 1), ("float16", 128, 4), ("float16", 256, 2), ("bfloat16", 80, 7)],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_every_edge_key_counts(backend: str, dtype: str, head_dim: int, group: int, num_splits: int) -> None:
    with launches(seed=num_splits):
        check_edges(dtype, head_dim, group, backend=backend, num_splits=num_splits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.slow] if g in (1, 2, 16) else []) for g in (1, 2, 4, 7, 16)]
)
def test_every_specialisation(backend: str, dtype: str, head_dim: int, group: int) -> None:
    sizes = Sizes((70, 1, 0, 33), (1, 1, 1, 1), 2, 2, group, tokens_per_block=8, extra_heads=1)
    with launches(seed=group):
        run_decode(make_case(dtype, head_dim, sizes), backend, num_splits=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens_per_block", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_every_block_size(backend: str, tokens_per_block: int) -> None:
    lengths = (1, 2, 15, 256, 514, 0, 257)
    sizes = Sizes(lengths, (1,) * 7, 2, 2, 4, tokens_per_block)
    with launches():
        run_decode(make_case("float16", 128, sizes), backend)
        run_decode(make_case("float16", 128, sizes), backend, num_splits=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_named_twice(backend: str) -> None:
    sizes = Sizes((64, 64, 40), (1, 1, 1), 1, 2, 4, 8, shared_blocks=True)
    with launches():
        run_decode(make_case("float16", 128, sizes), backend, num_splits=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_splits_than_keys_and_no_keys_at_all(backend: str) -> None:
    with launches():
        run_decode(make_case("float16", 128, Sizes((1, 0, 40), (1, 1, 1), group=4)), backend, num_splits=64)
        run_decode(make_case("float16", 128, Sizes((0, 0), (1, 1), group=4)), backend, num_splits=1)
        run_decode(make_case("float16", 128, Sizes((0,), (1,), group=4)), backend, num_splits=3)
        run_decode(make_case("float16", 128, Sizes((), (), group=4)), backend)


def check_large_scores(dtype: str, group: int, *, backend: str = "cpu", num_splits: int = 1) -> None:
    """Give every key the score −524288; of the second sequence one early key −524286, of the third one 0.

    A mask that is only a large negative number would outweigh such scores; a maximum that forgets what it saw would
    overflow.
    """
    case = make_case(dtype, 64, Sizes((150,) * 3, (1,) * 3, group=group, scale=1.0))
    case.query[:] = 1024.0
    for sequence in range(3):
        for position in range(150):
            case.put(sequence, position, key=-8.0)
    case.put(1, 17, key=np.append(np.full(63, -8.0), -8.0 + 2.0**-9))
    case.put(2, 5, key=0.0)
    run_decode(case, backend, num_splits=num_splits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16 has no such number
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_scores_of_minus_524288(backend: str, dtype: str, num_splits: int) -> None:
    with launches():
        check_large_scores(dtype, 4, backend=backend, num_splits=num_splits)


def test_offsets_past_2_to_the_31(tmp_path: Path) -> None:
    layout = CacheLayout("float16", num_layers=1, num_kv_heads=4, head_dim=128, tokens_per_block=64)
    num_blocks = 32_768 + 16  # of 2^16 elements each
    # 4 GiB of a sparse file, of which a few pages are touched; what was never written reads as 0
    pool = np.memmap(tmp_path / "pool", np.float16, "w+", shape=layout.pool_shape(num_blocks))
    rng = np.random.default_rng(0)
    slots = np.array([(32_768 + 9) * 64 + 63, 32_768 * 64, 32_767 * 64 + 5], np.int64)
    key, value = rng.standard_normal((2, 3, 4, 128)).astype(np.float16)
    query = rng.standard_normal((3, 16, 128)).astype(np.float16)
    ops.write_kv(layout, pool, 0, key, value, slots)
    tables = (slots // 64).astype(np.int32)[:, None]
    lens = (slots % 64 + 1).astype(np.int32)
    for token, slot in enumerate(slots):
        np.testing.assert_array_equal(pool[slot // 64, 0, 0, :, slot % 64], key[token])
    ops.copy_blocks(layout, pool, np.array([[32_777, 32_779, 64]], np.int32))
    np.testing.assert_array_equal(pool[32_779], pool[32_777])

    start = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    _, gathered = ops.gather_kv(layout, pool, 0, tables, start)
    np.testing.assert_array_equal(gathered[start[1:] - 1], value)
    expected, _ = reference.paged_attention(layout, pool, 0, query, tables, lens)
    assert np.abs(expected).max(axis=(1, 2)).min() > 0.01
    for out, lse in (
        ops.paged_attention(layout, pool, 0, query, tables, lens),
        ops.paged_prefill(layout, pool, 0, query, np.arange(4, dtype=np.int32), tables, lens),
    ):
        np.testing.assert_allclose(out.astype(np.float64), expected, atol=2e-3)
        assert np.isfinite(lse).all()


def test_chosen_splits_fill_the_device_and_stay_long() -> None:
    assert choose_splits(8, blocks_per_split=100, max_keys=10**6, kv_tile=32) == 1
    assert choose_splits(8, blocks_per_split=1, max_keys=31, kv_tile=32) == 1
    assert choose_splits(8, blocks_per_split=1, max_keys=32 * 4 * 3, kv_tile=32) == 3
    assert choose_splits(8, blocks_per_split=3, max_keys=10**6, kv_tile=32) == 3
    assert choose_splits(792, blocks_per_split=1, max_keys=10**6, kv_tile=32) == 128


# merge_attention


def check_merge(
    dtype: str,
    part_dtype: str,
    head_dim: int,
    lses: np.ndarray[Any, Any],
    seed: int = 0,
    backend: str = "cpu",
) -> None:
    """Merge random parts with these log-sum-exps `[parts, tokens, heads]`; parts without keys hold NaN."""
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((*lses.shape, head_dim)).astype(NUMPY_DTYPES[part_dtype])
    outs[lses == -np.inf] = np.nan
    lses = lses.astype(np.float32)
    shape = outs.shape[1:]
    out, lse = poisoned(shape, NUMPY_DTYPES[dtype]), poisoned(shape[:2], np.float32)
    device = [to_backend(array, backend) for array in (outs, lses, out, lse)]
    ops.merge_attention(device[0], device[1], out=device[2], lse=device[3])
    expected, expected_lse = reference.merge_attention(outs, lses)
    with np.errstate(invalid="ignore"):
        weights = np.exp(lses - lses.max(0))
    weights = np.where(lses == -np.inf, 0, weights).astype(np.float32)
    weights = round_to(dtype, weights / np.maximum(weights.sum(0), np.float32(1e-30)))
    products = weights[..., None] * np.where(lses[..., None] == -np.inf, 0, outs.astype(np.float32))
    assert_rows_close(dtype, to_host(device[2], dtype), expected, round_to(dtype, products.sum(0)))
    assert_lse_close(to_host(device[3], "float32"), expected_lse, np.zeros(expected_lse.shape), head_dim)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@given(
    spec=st.sampled_from(
        [("float32", "float32", 80), ("float16", "float32", 128), ("bfloat16", "bfloat16", 64)]
    ),
    parts=st.integers(1, 6),
    tokens=st.integers(0, 5),
    heads=st.integers(1, 5),
    spread=st.sampled_from([0.1, 3.0, 1000.0]),
    empty_share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=seeds,
)
def test_merges_like_the_reference(
    backend: str,
    spec: tuple[str, str, int],
    parts: int,
    tokens: int,
    heads: int,
    spread: float,
    empty_share: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    lses = spread * rng.standard_normal((parts, tokens, heads))
    lses[rng.random(lses.shape) < empty_share] = -np.inf
    with launches(seed=seed, on=backend):
        check_merge(*spec, lses, seed, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_merge_specialisation(backend: str, dtype: str, head_dim: int) -> None:
    lses = np.array([[[0.0, -np.inf]], [[2.0, -np.inf]], [[-np.inf, -np.inf]]])
    check_merge(dtype, dtype, head_dim, lses, backend=backend)
    check_merge(dtype, "float32", head_dim, lses, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_two_halves_merges_to_the_whole(backend: str) -> None:
    whole = make_case("float16", 128, Sizes((96, 64), (1, 1), num_kv_heads=2, group=4, tokens_per_block=16))
    halves = []
    for columns, lens in ((slice(0, 2), [32, 32]), (slice(2, None), [64, 32])):
        tables = np.ascontiguousarray(whole.block_tables[:, columns])
        arrays = [to_backend(x, backend) for x in (whole.pool, whole.query, tables, np.array(lens, np.int32))]
        halves.append(ops.paged_attention(whole.layout, arrays[0], 0, *arrays[1:]))
    outs = np.stack([to_host(out, "float16") for out, _ in halves]).astype(np.float32)
    lses = np.stack([to_host(lse, "float32") for _, lse in halves])
    out = to_backend(poisoned(whole.query.shape, np.float16), backend)
    _, lse = ops.merge_attention(to_backend(outs, backend), to_backend(lses, backend), out=out)
    whole.check(to_host(out, "float16"), to_host(lse, "float32"))


# Planted faults

DECODE, STAGES, MERGE, POOL = "paged_attention.cu", "attention.cuh", "merge_attention.cu", "pool.cuh"
# fmt: off
DECODE_FAULTS = [
    Fault("the last key is dropped", DECODE, "min(context_len, begin", "min(context_len - 1, begin"),
    Fault("the mask is one key late", STAGES, "= shared.limit[row] - tile", "= shared.limit[row] - tile + 1"),
    Fault("the mask is one key early", STAGES, "= shared.limit[row] - tile", "= shared.limit[row] - tile - 1"),
    Fault("a split drops its last tile", DECODE, "(tiles + num_splits - 1) / num_splits", "tiles / num_splits"),
    Fault("wrong block stride", POOL, "2ll * num_layers * num_kv_heads", "1ll * num_layers * num_kv_heads"),
    Fault("values are keys", STAGES, "load16_streaming(source + value_stride)", "load16_streaming(source)"),
    Fault("tails are not zeroed", STAGES, "= make_uint4(0, 0, 0, 0)", "= make_uint4(~0u, ~0u, ~0u, ~0u)"),
    Fault("masked scores are only large", STAGES, "score[i] = NEGATIVE_INFINITY;", "score[i] = -1e5f;"),
    Fault("sums are not rescaled", STAGES, "sum[i][e] *= factor;", "sum[i][e] *= 1.0f;"),
    Fault("the total is not rescaled", STAGES, "total = total * factor +", "total = total +"),
    Fault("the maximum forgets a tile", STAGES, "fmaxf(maximum, lanes_max", "fmaxf(NEGATIVE_INFINITY, lanes_max"),
    Fault("a slice of products is left out", STAGES, "slice = 0; slice < DIM_SLICES", "slice = 1; slice < DIM_SLICES"),
    Fault("a slice of keys is left out", STAGES, "slice = 0; slice < KEY_SLICES", "slice = 1; slice < KEY_SLICES"),
    Fault("another head of the group", DECODE, "queries + row * HEAD_DIM", "queries + (row ^ 1) * HEAD_DIM"),
    Fault("another KV head", DECODE, "head_offset(layer, kv_head)", "head_offset(layer, 0)"),
    Fault("another layer", DECODE, "head_offset(layer, kv_head)", "head_offset(0, kv_head)"),
    Fault("no scale", STAGES, "score[i] = sum * scale;", "score[i] = sum;"),
    Fault("base-2 log-sum-exp", STAGES, "logf(shared.total[row])", "log2f(shared.total[row])"),
    Fault("the output is not normalised", STAGES, "1.0f / shared.total[row]", "1.0f"),
    Fault("an empty split is read", MERGE, "== NEGATIVE_INFINITY) continue;", "== 12345.0f) continue;"),
    Fault("the last split is left out", MERGE, "part < num_parts; ++part) {", "part < num_parts - 1; ++part) {"),
    Fault("splits weigh the same", MERGE, "weight = fast_exp(part_lse - maximum)", "weight = 1.0f"),
    Fault("splits weigh by their best key alone", MERGE, "weight *= part_totals[part * rows + row]", "weight *= 1.0f"),
    Fault("the merge is not normalised", MERGE, "total > 0.0f ? 1.0f / total", "total > 0.0f ? 1.0f"),
]
# fmt: on


def battery() -> None:
    """Decode so that every one of DECODE_FAULTS shows: a key that dominates at each edge, a mixed batch, ..."""
    check_edges("float32", 64, 4, num_splits=2)
    check_large_scores("float32", 4)
    sizes = Sizes((70, 1, 129, 0, 64), (1,) * 5, 2, 2, 4, tokens_per_block=8)
    run_decode(make_case("float32", 64, sizes), "cpu", num_splits=3)


def test_the_battery_passes_without_a_fault() -> None:
    with launches():
        battery()


@pytest.mark.parametrize("fault", DECODE_FAULTS, ids=str)
def test_planted_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, battery)


def test_a_read_past_the_block_table_is_located(tmp_path: Path) -> None:
    fault = Fault(
        "tables are read past their blocks", STAGES, "row < KV_TILE && position < end", "row < KV_TILE"
    )
    case = make_case("float32", 64, Sizes((64,), (1,), group=4, tokens_per_block=16))
    case.block_tables = np.ascontiguousarray(case.block_tables[:, :4])
    message = r"attention\.cuh.*past the end of block_tables"
    with launches(on="address", load=fault.plant(tmp_path)), pytest.raises(KernelError, match=message):
        run_decode(case, "cpu", num_splits=1)


def test_refuses_in_one_line() -> None:
    layout = CacheLayout("float16", 2, 2, 64, 4)
    call: dict[str, Any] = {
        "layout": layout,
        "pool": np.zeros(layout.pool_shape(3), np.float16),
        "layer": 0,
        "query": np.zeros((2, 4, 64), np.float16),
        "block_tables": np.zeros((2, 2), np.int32),
        "context_lens": np.array([1, 8], np.int32),
    }

    def refused(message: str, **change: Any) -> None:
        with pytest.raises(ValueError) as caught:
            ops.paged_attention(**{**call, **change})
        assert str(caught.value) == message

    refused("num_heads (3) must be a multiple of num_kv_heads (2)", query=np.zeros((2, 3, 64), np.float16))
    refused("layer (-1) must be in 0..1", layer=-1)
    refused("context_lens (int64) must be int32", context_lens=np.array([1, 8]))
    refused("context_lens (1,) must have the shape [num_seqs] = (2)", context_lens=np.array([1], np.int32))
    refused(
        "a context length (9) must be in 0..8, what a block table row holds",
        context_lens=np.array([1, 9], np.int32),
    )
    refused(
        "a context length (-1) must be in 0..8, what a block table row holds",
        context_lens=np.array([1, -1], np.int32),
    )
    refused("block_tables[1, 1] (3) must be in 0..2", block_tables=np.array([[0, 3], [0, 3]], np.int32))
    refused("block_tables (int64) must be int32", block_tables=np.zeros((2, 2), np.int64))
    refused("num_splits (0) must be in 1..65535", num_splits=0)
    refused("scale (inf) must be finite", scale=float("inf"))
    refused("out (float32) must hold float16", out=np.zeros((2, 4, 64), np.float32))
    refused(
        "lse (2, 2) must have the shape [num_tokens, num_heads] = (2, 4)", lse=np.zeros((2, 2), np.float32)
    )


def test_merge_refuses_in_one_line() -> None:
    outs, lses = np.zeros((2, 3, 4, 64), np.float16), np.zeros((2, 3, 4), np.float32)

    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError) as caught:
            ops.merge_attention(*args, **options)
        assert str(caught.value) == message

    refused("head_dim (72) must be one of 64, 80, 96, 128, 256", np.zeros((2, 3, 4, 72), np.float16), lses)
    refused("num_parts (0) must be at least 1", outs[:0], lses[:0])
    refused(
        "lses (3, 3, 4) must have the shape [num_parts, num_tokens, num_heads] = (2, 3, 4)",
        outs,
        np.zeros((3, 3, 4), np.float32),
    )
    refused(
        "outs (float16) must be float32 or what out holds (float32)",
        outs,
        lses,
        out=np.zeros((3, 4, 64), np.float32),
    )
