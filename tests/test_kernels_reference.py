"""The float64 reference, checked against answers known in closed form and against itself cut differently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Sizes, cache_sizes, make_case, seeds

from kernels import reference
from kernels.layout import CacheLayout

LAYOUT = CacheLayout("float32", num_layers=2, num_kv_heads=2, head_dim=64, tokens_per_block=4)


def test_equal_scores_average_the_values() -> None:
    rng = np.random.default_rng(0)
    key, value = np.ones((7, 2, 64)), rng.standard_normal((7, 2, 64))
    out, lse = reference.attend(np.ones((4, 64)), key, value, scale=0.25)
    np.testing.assert_allclose(out, np.repeat(value.mean(0), 2, axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, 0.25 * 64 + np.log(7), rtol=1e-12)


def test_two_keys_weigh_as_their_scores_say() -> None:
    key = np.zeros((2, 1, 64))
    key[1, 0, 0] = np.log(3.0)  # score log 3 against 0: weights 3/4 and 1/4
    query = np.zeros((1, 64))
    query[0, 0] = 1.0
    value = np.stack([np.zeros((1, 64)), np.full((1, 64), 8.0)])
    out, lse = reference.attend(query, key, value, scale=1.0)
    np.testing.assert_allclose(out, 6.0, rtol=1e-12)
    np.testing.assert_allclose(lse, np.log(4.0), rtol=1e-12)


def test_no_keys_give_zero_and_minus_infinity() -> None:
    out, lse = reference.attend(np.ones((2, 64)), np.empty((0, 1, 64)), np.empty((0, 1, 64)), 1.0)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_large_negative_scores_neither_overflow_nor_vanish() -> None:
    query, key = np.full((1, 64), 1024.0), np.full((3, 1, 64), -8.0)  # scores -524288
    out, lse = reference.attend(query, key, np.ones((3, 1, 64)), scale=1.0)
    np.testing.assert_allclose(out, 1.0)
    np.testing.assert_allclose(lse, -524288 + np.log(3))


@given(cache_sizes(groups=[1, 2, 3], max_queries=6, max_length=40))
def test_prefill_is_dense_masked_softmax(sizes: Sizes) -> None:
    case = make_case("float32", 64, sizes)
    out, lse = reference.paged_prefill(
        case.layout,
        case.pool,
        case.layer,
        case.query,
        case.query_start,
        case.block_tables,
        case.context_lens,
        scale=1.0,
    )
    for sequence, (key, value) in enumerate(zip(case.key, case.value, strict=True)):
        start, end = case.query_start[sequence : sequence + 2]
        query = case.query[start:end].astype(np.float64)
        heads = [np.repeat(x.astype(np.float64), sizes.group, axis=1) for x in (key, value)]
        scores = np.einsum("qhd,khd->hqk", query, heads[0])
        position = len(key) - (end - start) + np.arange(end - start)
        scores = np.where(np.arange(len(key)) <= position[:, None], scores, -np.inf)
        weights = np.exp(scores)
        total = weights.sum(-1, keepdims=True)
        dense = np.einsum("hqk,khd->qhd", weights / np.where(total == 0, 1, total), heads[1])
        np.testing.assert_allclose(out[start:end], dense, rtol=1e-9, atol=1e-9)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse[start:end], np.log(total[..., 0]).T, rtol=1e-9, atol=1e-9)


@given(cache_sizes(groups=[1, 2], max_queries=1, max_length=40))
def test_decode_is_the_last_row_of_prefill(sizes: Sizes) -> None:
    case = make_case("float32", 64, sizes)
    out, lse = reference.paged_attention(
        case.layout, case.pool, case.layer, case.query, case.block_tables, case.context_lens
    )
    for sequence, (key, value) in enumerate(zip(case.key, case.value, strict=True)):
        alone, alone_lse = reference.attend(case.query[sequence], key, value, 64**-0.5)
        np.testing.assert_array_equal(out[sequence], alone)
        np.testing.assert_array_equal(lse[sequence], alone_lse)


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_merging_the_parts_gives_the_whole(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    key, value = rng.standard_normal((2, sum(lengths), 1, 64))
    query = rng.standard_normal((3, 64))
    ends = np.cumsum(lengths)
    parts = [
        reference.attend(query, key[end - length : end], value[end - length : end], 0.5)
        for length, end in zip(lengths, ends, strict=True)
    ]
    outs = np.stack([out for out, _ in parts])[:, None]
    lses = np.stack([lse for _, lse in parts])[:, None]
    outs[lses == -np.inf] = np.nan  # must not be read
    out, lse = reference.merge_attention(outs, lses)
    whole, whole_lse = reference.attend(query, key, value, 0.5)
    np.testing.assert_allclose(out[0], whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lse[0], whole_lse, rtol=1e-9)


def test_write_copy_and_gather_move_exactly_what_they_name() -> None:
    rng = np.random.default_rng(1)
    pool = np.full(LAYOUT.pool_shape(6), np.nan, np.float32)
    key, value = rng.standard_normal((2, 6, 2, 64)).astype(np.float32)
    slots = np.array([5 * 4 + 0, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 2 * 4 + 0, -1])
    reference.write_kv(LAYOUT, pool, 1, key, value, slots)
    assert np.isfinite(pool).sum() == 5 * 2 * 2 * 64
    assert np.isnan(pool[:, 0]).all()
    np.testing.assert_array_equal(pool[5, 1, 0, :, 3], key[3])
    np.testing.assert_array_equal(pool[2, 1, 1, :, 0], value[4])

    reference.copy_blocks(LAYOUT, pool, np.array([[5, 0, 2]]))
    np.testing.assert_array_equal(pool[0, 1, :, :, :2], pool[5, 1, :, :, :2])
    assert np.isnan(pool[0, 1, :, :, 2:]).all()

    tables = np.array([[5, 2, 99], [0, -7, 99]])
    gathered_key, gathered_value = reference.gather_kv(LAYOUT, pool, 1, tables, np.array([0, 5, 7]))
    np.testing.assert_array_equal(gathered_key, np.concatenate([key[:5], key[:2]]))
    np.testing.assert_array_equal(gathered_value, np.concatenate([value[:5], value[:2]]))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 11])
def test_table_entries_past_the_blocks_are_not_read(length: int) -> None:
    case = make_case("float32", 64, Sizes(lengths=(length,), queries=(1,), tokens_per_block=4))
    used = -(-length // 4)
    case.block_tables[0, used:] = 2**31 - 1
    key, value = reference.sequence_kv(case.layout, case.pool, 0, case.block_tables[0], length)
    assert np.isfinite(key).all()
    assert np.isfinite(value).all()
    assert key.shape == (length, 1, 64)
