"""write_kv puts each token's key and value in its slot, bit for bit, and touches nothing else."""

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
    Fault,
    assert_caught,
    block_sizes,
    launches,
    poisoned,
    seeds,
    to_backend,
    to_host,
    with_token_stride,
)

from kernels import ops, reference
from kernels.compile import KernelError
from kernels.layout import DTYPES, HEAD_DIMS, CacheLayout
from kernels.tolerance import NUMPY_DTYPES

SPECIALISATIONS = [("float32", 80), ("float16", 128), ("bfloat16", 64)]


def check_write(
    layout: CacheLayout,
    layer: int,
    slots: np.ndarray[Any, Any],
    backend: str = "cpu",
    *,
    num_blocks: int,
    extra_heads: int = 0,
    seed: int = 0,
) -> None:
    """Write random tokens to `slots` of a pool full of NaN and compare every bit of the pool.

    The pool lies between two blocks that nothing may touch.
    """
    rng = np.random.default_rng(seed)
    shape = (len(slots), layout.num_kv_heads, layout.head_dim)
    key, value = rng.standard_normal((2, *shape)).astype(NUMPY_DTYPES[layout.dtype])
    if extra_heads:
        key, value = with_token_stride(key, extra_heads), with_token_stride(value, 2 * extra_heads)
    expected = poisoned(layout.pool_shape(num_blocks + 2), key.dtype)
    guarded = to_backend(expected.copy(), backend)
    reference.write_kv(layout, expected[1:-1], layer, key, value, slots)
    key, value, slots = (to_backend(array, backend) for array in (key, value, slots))
    ops.write_kv(layout, guarded[1:-1], layer, key, value, slots)
    np.testing.assert_array_equal(to_host(guarded, layout.dtype).view(np.uint8), expected.view(np.uint8))


@st.composite
def writes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a layout, and slots of which some are negative and none is named twice."""
    dtype, head_dim = draw(st.sampled_from(SPECIALISATIONS))
    num_layers = draw(st.integers(1, 3))
    layout = CacheLayout(dtype, num_layers, draw(st.integers(1, 5)), head_dim, draw(block_sizes))
    num_blocks = draw(st.integers(1, 4))
    slot = st.integers(-2, num_blocks * layout.tokens_per_block - 1)
    slots = draw(st.lists(slot, max_size=12, unique_by=lambda s: s if s >= 0 else object()))
    return {
        "layout": layout,
        "layer": draw(st.integers(0, num_layers - 1)),
        "slots": np.array(slots, np.int64),
        "num_blocks": num_blocks,
        "extra_heads": draw(st.sampled_from([0, 1])),
        "seed": draw(seeds),
    }


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@given(case=writes(), order=seeds)
def test_writes_like_the_reference(backend: str, case: dict[str, Any], order: int) -> None:
    with launches(seed=order, on=backend):
        check_write(**case, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim", [pytest.param(d, marks=[pytest.mark.slow] if d != 96 else []) for d in HEAD_DIMS]
)
def test_every_specialisation(backend: str, dtype: str, head_dim: int) -> None:
    layout = CacheLayout(dtype, 2, 3, head_dim, 8)
    check_write(layout, 1, np.array([17, -1, 3, 0, 23], np.int64), backend, num_blocks=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_slots_negative_writes_nothing(backend: str) -> None:
    layout = CacheLayout("float16", 1, 2, 128, 16)
    check_write(layout, 0, np.array([-1, -1, -(2**63)], np.int64), backend, num_blocks=1)
    check_write(layout, 0, np.array([], np.int64), backend, num_blocks=1)


BATTERY_LAYOUT = CacheLayout("float16", 2, 3, 128, 4)
WRITE, POOL = "write_kv.cu", "pool.cuh"
# fmt: off
FAULTS = [
    Fault("negative slots are written", WRITE, "slot < 0", "slot < -1"),
    Fault("keys go to the values' place", WRITE, "column, key_bits", "column, value_bits"),
    Fault("the last vector is missed", WRITE, "< num_kv_heads * ROW_VECS", "< num_kv_heads * ROW_VECS - 1"),
    Fault("tokens are taken as contiguous", WRITE, "token * value_stride", "token * key_stride"),
    Fault("layers are one head apart", POOL, "2ll * layer * num_kv_heads + kv_head", "2ll * layer + kv_head"),
    Fault("blocks hold no values", POOL, "2ll * num_layers * num_kv_heads", "1ll * num_layers * num_kv_heads"),
    Fault("slots wrap a token early", POOL, "log2_tokens_per_block) - 1)", "log2_tokens_per_block) - 2)"),
]
# fmt: on


def battery() -> None:
    """Write a few tokens so that every one of FAULTS shows."""
    slots = np.array([11, 1, -1, 6, 4], np.int64)
    check_write(BATTERY_LAYOUT, 1, slots, num_blocks=3, extra_heads=1)


def test_the_battery_passes_without_a_fault() -> None:
    battery()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, battery)


def test_a_write_before_the_pool_is_located(tmp_path: Path) -> None:
    fault = Fault("negative slots are written", WRITE, "slot < 0", "slot < -1")
    layout = CacheLayout("float16", 1, 1, 128, 1)
    message = r"kernel write_kv, block \(1, 0, 0\), .*: writes .* before the start of pool"
    with launches(on="address", load=fault.plant(tmp_path)), pytest.raises(KernelError, match=message):
        check_write(layout, 0, np.array([0, -1], np.int64), num_blocks=1)


def refused(message: str, **change: Any) -> None:
    """Check that write_kv refuses a good call with `change` made to it, in these words."""
    layout = CacheLayout("float16", 2, 2, 64, 4)
    call: dict[str, Any] = {
        "layout": layout,
        "pool": np.zeros(layout.pool_shape(3), np.float16),
        "layer": 0,
        "key": np.zeros((2, 2, 64), np.float16),
        "value": np.zeros((2, 2, 64), np.float16),
        "slot_mapping": np.array([0, 5], np.int64),
    }
    with pytest.raises(ValueError) as caught:
        ops.write_kv(**{**call, **change})
    assert str(caught.value) == message


def test_refuses_in_one_line() -> None:
    key = np.zeros((2, 3, 64), np.float16)
    refused("layer (2) must be in 0..1", layer=2)
    refused("slot (12) must be below 12", slot_mapping=np.array([0, 12]))
    refused("slot (5) must be written by one token", slot_mapping=np.array([5, 5]))
    refused("slot_mapping (int32) must be int64", slot_mapping=np.array([0, 5], np.int32))
    refused("slot_mapping (3,) must have the shape [num_tokens] = (2)", slot_mapping=np.array([0, 1, 2]))
    refused("key (2, 3, 64) must have the shape [num_tokens, heads, head_dim] = (any, 2, 64)", key=key)
    refused("key (float32) must hold float16", key=np.zeros((2, 2, 64), np.float32))
    refused("key must be contiguous within a token", key=np.zeros((2, 2, 128), np.float16)[:, :, ::2])
    odd = np.zeros(2 * 132, np.float16).reshape(2, 132)[:, :128].reshape(2, 2, 64, copy=False)
    refused("value has 264 bytes between tokens, which must be a multiple of 16", value=odd)
    unaligned = np.zeros(2 * 2 * 64 + 1, np.float16)[1:].reshape(2, 2, 64)
    refused("key must start at a multiple of 16 bytes", key=unaligned)
    refused("key (list) must be a numpy or a cupy array", key=[[1.0]])
    pool = np.zeros((3, 2, 2, 2, 8, 64), np.float16)
    refused(
        "pool (3, 2, 2, 2, 8, 64) must have the shape [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, "
        "head_dim] = (any, 2, 2, 2, 4, 64)",
        pool=pool,
    )
    refused("pool must be C-contiguous", pool=pool[:, :, :, :, ::2])
