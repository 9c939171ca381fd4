"""paged_prefill against the reference: ragged, causal, on top of cached context, everything unused poisoned."""

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
    cache_sizes,
    launches,
    make_case,
    make_dominate,
    run_prefill,
    seeds,
    to_backend,
    to_host,
)

from kernels import ops, specialise
from kernels.layout import DTYPES, HEAD_DIMS, CacheLayout

SPECIALISATIONS = [
    ("float32", 128, (1, 2, 5)),
    ("float16", 64, (1, 4, 7)),
    ("bfloat16", 80, (3, 8, 17)),
]


def check_edges(dtype: str, head_dim: int, group: int, *, backend: str = "cpu") -> None:
    """Let one key dominate in turn: the first, the last, both sides of each block, key tile and query edge.

    Each sequence has as many queries as fill two row tiles and a bit, on top of some cached context: the queries
    from the dominating key's position on must see it, those before it must not.
    """
    constants = specialise.paged_prefill(dtype, head_dim)
    tile, rows = int(constants["KV_TILE"]), int(constants["ROWS"])
    queries = -(-2 * rows // group) + 3
    cached = 21
    length = cached + queries
    starts = {0, cached, *range(0, length, tile), *range(0, length, 16)}
    starts |= {cached + row // group for row in range(0, queries * group, rows)}
    positions = sorted({length - 1} | {start - 1 for start in starts if start} | starts)
    sizes = Sizes(
        (length,) * len(positions),
        (queries,) * len(positions),
        group=group,
        tokens_per_block=16,
    )
    case = make_case(dtype, head_dim, sizes)
    for sequence, position in enumerate(positions):
        make_dominate(case, sequence, position)
    run_prefill(case, backend)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@pytest.mark.parametrize(("dtype", "head_dim", "groups"), SPECIALISATIONS)
@given(data=st.data(), order=seeds)
def test_prefills_like_the_reference(
    backend: str, dtype: str, head_dim: int, groups: tuple[int, ...], data: st.DataObject, order: int
) -> None:
    sizes = data.draw(cache_sizes(groups=groups, max_queries=20, max_length=120))
    with launches(seed=order, on=backend):
        run_prefill(make_case(dtype, head_dim, sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), [("float32", 128, 4), ("float16", 256, 7), ("bfloat16", 128, 16)]
)
def test_every_edge_key_counts(backend: str, dtype: str, head_dim: int, group: int) -> None:
    with launches(seed=group):
        check_edges(dtype, head_dim, group, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_specialisation(backend: str, dtype: str, head_dim: int) -> None:
    sizes = Sizes((40, 1, 0, 33), (23, 1, 0, 33), 2, 2, 3, tokens_per_block=8, extra_heads=1)
    with launches(seed=head_dim):
        run_prefill(make_case(dtype, head_dim, sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens_per_block", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_every_block_size(backend: str, tokens_per_block: int) -> None:
    sizes = Sizes((1, 2, 15, 256, 66), (1, 2, 9, 3, 40), 2, 2, 2, tokens_per_block)
    with launches():
        run_prefill(make_case("float16", 64, sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_and_sequences_without_queries(backend: str) -> None:
    with launches():
        run_prefill(make_case("float16", 64, Sizes((3, 0, 5), (7, 4, 0), group=4)), backend)
        run_prefill(make_case("float16", 64, Sizes((0,), (40,), group=4)), backend)
        run_prefill(make_case("float16", 64, Sizes((5, 9), (0, 0), group=4)), backend)
        run_prefill(make_case("float16", 64, Sizes((), (), group=4)), backend)
        run_prefill(make_case("float16", 64, Sizes((1,) * 70, (0,) * 69 + (1,), group=1)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_minus_524288(backend: str) -> None:
    with launches():
        check_large_scores(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_with_more_heads_than_a_tile_has_rows(backend: str) -> None:
    with launches():
        run_prefill(make_case("bfloat16", 80, Sizes((30, 9), (3, 2), num_kv_heads=2, group=71)), backend)


def check_large_scores(backend: str) -> None:
    """Give every key the score −524288, and one early key of the second sequence the score 0."""
    case = make_case("float32", 128, Sizes((90, 90), (20, 20), group=2, scale=0.5))
    case.query[:] = 1024.0
    for sequence in range(2):
        for position in range(90):
            case.put(sequence, position, key=-8.0)
    case.put(1, 5, key=0.0)
    run_prefill(case, backend)


def decode_of(case: AttentionCase, backend: str) -> Any:
    """Return paged_attention's (out, lse) on the arrays of a case with one query a sequence."""
    arrays = (case.query, case.block_tables, case.context_lens)
    pool, query, tables, lens = (to_backend(array, backend) for array in (case.pool, *arrays))
    return ops.paged_attention(case.layout, pool, case.layer, query, tables, lens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_a_sequence_is_decode(backend: str) -> None:
    case = make_case("float32", 128, Sizes((40, 7, 100), (1, 1, 1), num_kv_heads=2, group=3))
    out, lse = decode_of(case, backend)
    case.check(to_host(out, "float32"), to_host(lse, "float32"))
    run_prefill(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_in_chunks_is_prefill_at_once(backend: str) -> None:
    whole = make_case("float32", 128, Sizes((50,), (50,), group=2, tokens_per_block=8))
    pool, tables = to_backend(whole.pool, backend), to_backend(whole.block_tables, backend)
    outs = []
    for first, end in ((0, 16), (16, 17), (17, 50)):
        query, starts, lens = (
            to_backend(array, backend)
            for array in (
                np.ascontiguousarray(whole.query[first:end]),
                np.array([0, end - first], np.int32),
                np.array([end], np.int32),
            )
        )
        outs.append(ops.paged_prefill(whole.layout, pool, 0, query, starts, tables, lens))
    out, lse = (np.concatenate([to_host(pair[i], "float32") for pair in outs]) for i in (0, 1))
    whole.check(out, lse)


PREFILL, STAGES, POOL = "paged_prefill.cu", "attention.cuh", "pool.cuh"
# fmt: off
PREFILL_FAULTS = [
    Fault("the diagonal is masked", PREFILL, " / group + 1 : 0", " / group : 0"),
    Fault("the mask is one key late", PREFILL, " / group + 1 : 0", " / group + 2 : 0"),
    Fault("the last key of a tile is dropped", PREFILL, "rows - 1) / group + 1)", "rows - 1) / group)"),
    Fault("the context ends at the first row", PREFILL, "(first_row + rows - 1) / group", "first_row / group"),
    Fault("cached context is ignored", PREFILL, "= context_lens[sequence] - num_queries;", "= 0;"),
    Fault("a tile skips a row", PREFILL, "group)) * ROWS", "group)) * (ROWS + 1)"),
    Fault("one head of the group for all", PREFILL, "int head = kv_head * group +", "int head = kv_head * group + 0 *"),
    Fault("another KV head", PREFILL, "head_offset(layer, kv_head)", "head_offset(layer, 0)"),
    Fault("another layer", PREFILL, "head_offset(layer, kv_head)", "head_offset(0, kv_head)"),
    Fault("a sequence too early", PREFILL, "sequence = middle;", "sequence = middle - 1;"),
    Fault("tokens are taken as contiguous", PREFILL, "token * query_stride", "token * num_heads * HEAD_DIM"),
    Fault("wrong block stride", POOL, "2ll * num_layers * num_kv_heads", "1ll * num_layers * num_kv_heads"),
    Fault("tails are not zeroed", STAGES, "= make_uint4(0, 0, 0, 0)", "= make_uint4(~0u, ~0u, ~0u, ~0u)"),
    Fault("the maximum forgets a tile", STAGES, "fmaxf(maximum, lanes_max", "fmaxf(NEGATIVE_INFINITY, lanes_max"),
    Fault("a row without keys is NaN", STAGES, "new_maximum == NEGATIVE_INFINITY ? 0.0f : new_maximum", "new_maximum"),
    Fault("a row without keys is normalised", STAGES, "shared.total[row] > 0.0f ? 1.0f", "true ? 1.0f"),
]
# fmt: on


def battery() -> None:
    """Prefill so that every one of PREFILL_FAULTS shows: a key that dominates at each edge, a ragged batch, ..."""
    check_edges("float32", 128, 4)
    check_large_scores("cpu")
    sizes = Sizes((40, 3, 0, 33, 9), (23, 5, 0, 33, 1), 2, 2, 3, tokens_per_block=8, extra_heads=1)
    run_prefill(make_case("float32", 128, sizes), "cpu")


def test_the_battery_passes_without_a_fault() -> None:
    with launches():
        battery()


@pytest.mark.parametrize("fault", PREFILL_FAULTS, ids=str)
def test_planted_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, battery)


def test_refuses_in_one_line() -> None:
    layout = CacheLayout("float16", 1, 2, 64, 4)
    call: dict[str, Any] = {
        "layout": layout,
        "pool": np.zeros(layout.pool_shape(3), np.float16),
        "layer": 0,
        "query": np.zeros((5, 4, 64), np.float16),
        "query_start": np.array([0, 2, 5], np.int32),
        "block_tables": np.zeros((2, 2), np.int32),
        "context_lens": np.array([2, 8], np.int32),
    }

    def refused(message: str, **change: Any) -> None:
        with pytest.raises(ValueError) as caught:
            ops.paged_prefill(**{**call, **change})
        assert str(caught.value) == message

    refused("query_start[-1] (4) must be the number of tokens (5)", query_start=np.array([0, 2, 4], np.int32))
    refused("query_start[0] (1) must be 0", query_start=np.array([1, 2, 5], np.int32))
    refused("query_start[2] (5) must not be below 6", query_start=np.array([0, 6, 5], np.int32))
    refused(
        "query_start (2,) must have the shape [num_seqs + 1] = (3)", query_start=np.array([0, 5], np.int32)
    )
    refused("block_tables[0, 0] (-1) must be in 0..2", block_tables=np.full((2, 2), -1, np.int32))
