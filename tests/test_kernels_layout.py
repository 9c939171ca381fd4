"""CacheLayout: shapes, strides, bytes and what it refuses."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import DTYPES, HEAD_DIMS, CacheLayout, dtype_name

layouts = st.builds(
    CacheLayout,
    dtype=st.sampled_from(DTYPES),
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 5),
    head_dim=st.sampled_from(HEAD_DIMS),
    tokens_per_block=st.sampled_from([1, 2, 4, 8, 16]),
)


def test_llama_2_7b_takes_half_a_mebibyte_a_token() -> None:
    layout = CacheLayout("float16", num_layers=32, num_kv_heads=32, head_dim=128, tokens_per_block=16)
    assert layout.bytes_per_token == 524_288
    assert layout.bytes_per_block == 16 * 524_288


@given(layouts, st.integers(1, 5))
def test_bytes_and_strides_are_those_of_the_array(layout: CacheLayout, num_blocks: int) -> None:
    pool = layout.empty_pool(num_blocks)
    assert pool.shape == layout.pool_shape(num_blocks)
    assert pool.shape[0] == num_blocks
    assert pool.nbytes == num_blocks * layout.bytes_per_block
    assert pool.nbytes == num_blocks * layout.tokens_per_block * layout.bytes_per_token
    assert pool.strides == tuple(stride * layout.itemsize for stride in layout.strides)
    assert dtype_name(pool.dtype) == layout.dtype


@given(layouts)
def test_one_row_is_whole_16_byte_vectors(layout: CacheLayout) -> None:
    assert layout.head_dim * layout.itemsize % 16 == 0
    assert layout.strides[4] == layout.head_dim


def test_bfloat16_is_uint16_on_a_gpu() -> None:
    layout = CacheLayout("bfloat16", 1, 1, 64, 16)
    assert layout.array_dtype("gpu") == np.uint16
    assert layout.array_dtype("cpu") == ml_dtypes.bfloat16
    assert dtype_name(np.uint16) == dtype_name(ml_dtypes.bfloat16) == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "dtype (float64) must be one of float32, float16, bfloat16"),
        ({"num_layers": 0}, "num_layers (0) must be a positive integer"),
        ({"num_kv_heads": -1}, "num_kv_heads (-1) must be a positive integer"),
        ({"num_layers": 1.5}, "num_layers (1.5) must be a positive integer"),
        ({"head_dim": 72}, "head_dim (72) must be one of 64, 80, 96, 128, 256"),
        ({"tokens_per_block": 48}, "tokens_per_block (48) must be a power of two"),
        ({"tokens_per_block": 512}, "tokens_per_block (512) must be at most 256"),
    ],
)
def test_refuses_in_one_line(change: dict[str, object], message: str) -> None:
    layout = CacheLayout("float16", 1, 1, 64, 16)
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(layout, **change)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_refuses_an_empty_pool_and_an_unknown_backend() -> None:
    layout = CacheLayout("float16", 1, 1, 64, 16)
    with pytest.raises(ValueError, match=r"num_blocks \(0\) must be a positive integer"):
        layout.empty_pool(0)
    with pytest.raises(ValueError, match=r"backend \(tpu\) must be cpu or gpu"):
        layout.empty_pool(1, "tpu")
    with pytest.raises(ValueError, match=r"dtype \(int8\) must be one of"):
        dtype_name(np.int8)
