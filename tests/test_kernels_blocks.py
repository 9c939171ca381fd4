"""copy_blocks, swap_blocks and gather_kv move exactly the tokens they are told to, bit for bit."""

from __future__ import annotations

import ctypes
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
    Sizes,
    assert_caught,
    block_sizes,
    cache_sizes,
    launches,
    make_case,
    poisoned,
    seeds,
    to_backend,
    to_host,
)

from kernels import ops, reference
from kernels.layout import DTYPES, HEAD_DIMS, CacheLayout
from kernels.tolerance import NUMPY_DTYPES

SPECIALISATIONS = [("float32", 80), ("float16", 128), ("bfloat16", 64)]


def bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array's bytes, so that NaN equals NaN."""
    return np.ascontiguousarray(array).view(np.uint8)


def check_copy(
    layout: CacheLayout,
    copies: list[tuple[int, int, int]],
    num_blocks: int,
    seed: int = 0,
    backend: str = "cpu",
) -> None:
    """Copy within a pool of random bytes and compare all of it."""
    rng = np.random.default_rng(seed)
    expected = rng.integers(0, 256, (num_blocks * layout.bytes_per_block,), np.uint8)
    expected = expected.view(NUMPY_DTYPES[layout.dtype]).reshape(layout.pool_shape(num_blocks))
    pool = to_backend(expected.copy(), backend)
    array = np.array(copies, np.int32).reshape(-1, 3)
    reference.copy_blocks(layout, expected, array)
    ops.copy_blocks(layout, pool, to_backend(array, backend))
    np.testing.assert_array_equal(bits(to_host(pool, layout.dtype)), bits(expected))


def host_bytes(pool: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of a host pool, read and written by the host itself once the device is done."""
    if isinstance(pool, np.ndarray):
        return pool.reshape(-1).view(np.uint8)
    pool.device.synchronize()
    return np.ctypeslib.as_array((ctypes.c_uint8 * pool.nbytes).from_address(pool.data.ptr))


def check_swap(
    layout: CacheLayout,
    num_blocks: tuple[int, int],
    outs: list[tuple[int, int]],
    ins: list[tuple[int, int]],
    seed: int = 0,
    backend: str = "cpu",
) -> None:
    """Swap out, then in, between a pool and a host pool of random bytes, and compare all of both."""
    rng = np.random.default_rng(seed)
    expected, expected_host = (
        rng.integers(0, 256, n * layout.bytes_per_block, np.uint8)
        .view(NUMPY_DTYPES[layout.dtype])
        .reshape(layout.pool_shape(n))
        for n in num_blocks
    )
    pool = to_backend(expected.copy(), backend)
    host = layout.empty_host_pool(num_blocks[1], "gpu" if backend == "gpu" else "cpu")
    host_bytes(host)[:] = bits(expected_host).reshape(-1)
    for swaps, out in ((outs, True), (ins, False)):
        array = np.array(swaps, np.int32).reshape(-1, 2)
        ends = (expected, expected_host) if out else (expected_host, expected)
        reference.swap_blocks(layout, *ends, array)
        ends = (pool, host) if out else (host, pool)
        ops.swap_blocks(layout, *ends, to_backend(array, backend))
    np.testing.assert_array_equal(bits(to_host(pool, layout.dtype)), bits(expected))
    np.testing.assert_array_equal(host_bytes(host), bits(expected_host).reshape(-1))


def check_gather(
    dtype: str, head_dim: int, sizes: Sizes, backend: str = "cpu", *, given_out: bool = True
) -> None:
    """Gather the sequences of a case and compare with their own histories."""
    case = make_case(dtype, head_dim, sizes)
    token_start = np.concatenate([[0], np.cumsum(sizes.lengths)]).astype(np.int32)
    shape = (int(token_start[-1]), sizes.num_kv_heads, head_dim)
    out = (
        tuple(to_backend(poisoned(shape, case.pool.dtype), backend) for _ in range(2)) if given_out else None
    )
    pool, tables, starts = (to_backend(x, backend) for x in (case.pool, case.block_tables, token_start))
    key, value = ops.gather_kv(case.layout, pool, case.layer, tables, starts, out=out)  # type: ignore[arg-type]
    np.testing.assert_array_equal(bits(to_host(key, dtype)), bits(np.concatenate(case.key)))
    np.testing.assert_array_equal(bits(to_host(value, dtype)), bits(np.concatenate(case.value)))


@st.composite
def copy_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a layout and a copy list whose sources and destinations are disjoint; sources may repeat."""
    dtype, head_dim = draw(st.sampled_from(SPECIALISATIONS))
    layout = CacheLayout(dtype, draw(st.integers(1, 3)), draw(st.integers(1, 3)), head_dim, draw(block_sizes))
    num_blocks = draw(st.integers(2, 6))
    ids = draw(st.permutations(range(num_blocks)))
    cut = draw(st.integers(1, num_blocks - 1))
    valid = st.integers(0, layout.tokens_per_block)
    copies = [(draw(st.sampled_from(ids[:cut])), destination, draw(valid)) for destination in ids[cut:]]
    return {"layout": layout, "copies": copies, "num_blocks": num_blocks, "seed": draw(seeds)}


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@given(case=copy_cases(), order=seeds)
def test_copies_like_the_reference(backend: str, case: dict[str, Any], order: int) -> None:
    with launches(seed=order, on=backend):
        check_copy(**case, backend=backend)


@st.composite
def swap_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a layout and two lists without a destination named twice; what goes out may come in again at once."""
    dtype, head_dim = draw(st.sampled_from(SPECIALISATIONS))
    layout = CacheLayout(dtype, draw(st.integers(1, 3)), draw(st.integers(1, 3)), head_dim, draw(block_sizes))
    num_blocks = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    lists = []
    for sources, destinations in (num_blocks, num_blocks[::-1]):
        to = draw(st.lists(st.integers(0, destinations - 1), unique=True, max_size=destinations))
        lists.append([(draw(st.integers(0, sources - 1)), block) for block in to])
    return {
        "layout": layout,
        "num_blocks": num_blocks,
        "outs": lists[0],
        "ins": lists[1],
        "seed": draw(seeds),
    }


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@given(case=swap_cases(), order=seeds)
def test_swaps_like_the_reference(backend: str, case: dict[str, Any], order: int) -> None:
    with launches(seed=order, on=backend):
        check_swap(**case, backend=backend)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@given(
    spec=st.sampled_from(SPECIALISATIONS),
    sizes=cache_sizes(groups=[1], max_queries=1, max_length=70),
    given_out=st.booleans(),
    order=seeds,
)
def test_gathers_like_the_reference(
    backend: str, spec: tuple[str, int], sizes: Sizes, given_out: bool, order: int
) -> None:
    with launches(seed=order, on=backend):
        check_gather(*spec, sizes, backend, given_out=given_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim", [pytest.param(d, marks=[pytest.mark.slow] if d != 256 else []) for d in HEAD_DIMS]
)
def test_every_specialisation(backend: str, dtype: str, head_dim: int) -> None:
    check_copy(CacheLayout(dtype, 2, 3, head_dim, 8), [(0, 2, 5), (1, 3, 8)], 4, backend=backend)
    check_swap(CacheLayout(dtype, 2, 3, head_dim, 8), (3, 2), [(2, 0), (0, 1)], [(0, 1)], backend=backend)
    check_gather(dtype, head_dim, Sizes((5, 0, 17), (1, 1, 1), 2, 3, 1, 4, layer=0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    check_copy(CacheLayout("float16", 1, 1, 64, 4), [], 2, backend=backend)
    check_swap(CacheLayout("float16", 1, 1, 64, 4), (2, 1), [], [], backend=backend)
    check_gather("float16", 128, Sizes((0, 0), (1, 1)), backend)


COPY, SWAP, GATHER = "copy_blocks.cu", "swap_blocks.cu", "gather_kv.cu"
# fmt: off
COPY_FAULTS = [
    Fault("whole blocks are copied", COPY, "copy[2] *", "tokens_per_block *"),
    Fault("the last token is missed", COPY, "copy[2] *", "(copy[2] - 1) *"),
    Fault("only the first layer's keys", COPY, "plane < planes", "plane < 1"),
    Fault("the source is the destination", COPY, "load16(source + index)", "load16(destination + index)"),
    Fault("wrong block stride", COPY, "(copy[0]) * planes", "(copy[0]) * (planes - 1)"),
]
# fmt: on

# fmt: off
SWAP_FAULTS = [
    Fault("ends exchanged", SWAP, "swap[0] * vectors_per_block", "swap[1] * vectors_per_block"),
    Fault("always to the first block", SWAP, "destination + swap[1] *", "destination + 0 *"),
    Fault("every swap is the first", SWAP, "2ll * blockIdx.x", "0ll * blockIdx.x"),
    Fault("a single pass", SWAP, "start += UNROLL * stride", "start += vectors_per_block"),
    Fault("neighbours exchanged", SWAP, "load16_streaming(from + index)", "load16_streaming(from + (index ^ 1))"),
]
# fmt: on

# fmt: off
GATHER_FAULTS = [
    Fault("the last token is missed", GATHER, "index < tokens * row_vecs", "index < (tokens - 1) * row_vecs"),
    Fault("every block is the first", GATHER, "table_stride + column]", "table_stride]"),
    Fault("a table row too early", GATHER, "(sequence) * table_stride", "(sequence > 0) * table_stride"),
    Fault("values are keys", GATHER, "key_row + shape.value_stride() + offset", "key_row + offset"),
    Fault("heads for tokens", GATHER, "index % row_vecs / ROW_VECS", "index / ROW_VECS % tokens % num_kv_heads"),
]
# fmt: on


def copy_battery() -> None:
    """Copy a few blocks so that every one of COPY_FAULTS shows."""
    check_copy(CacheLayout("float32", 2, 2, 64, 8), [(1, 3, 5), (2, 0, 8)], 4)


def swap_battery() -> None:
    """Swap a few blocks so that every one of SWAP_FAULTS shows."""
    check_swap(CacheLayout("float32", 3, 2, 64, 32), (4, 3), [(1, 2), (3, 0)], [(2, 0), (1, 3)])


def gather_battery() -> None:
    """Gather a few sequences so that every one of GATHER_FAULTS shows."""
    check_gather("float16", 128, Sizes((9, 3, 2), (1, 1, 1), 2, 3, 1, 4))


def test_the_batteries_pass_without_a_fault() -> None:
    copy_battery()
    swap_battery()
    gather_battery()


@pytest.mark.parametrize("fault", COPY_FAULTS, ids=str)
def test_planted_copy_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, copy_battery)


@pytest.mark.parametrize("fault", SWAP_FAULTS, ids=str)
def test_planted_swap_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, swap_battery)


@pytest.mark.parametrize("fault", GATHER_FAULTS, ids=str)
def test_planted_gather_faults_are_caught(fault: Fault, tmp_path: Path) -> None:
    assert_caught(fault, tmp_path, gather_battery)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(0, 4, 1)], "a copy names block (4), which must be in 0..3"),
        ([(-1, 2, 1)], "a copy names block (-1), which must be in 0..3"),
        ([(0, 1, 9)], "valid tokens of a copy (9) must be in 0..8"),
        ([(0, 1, 1), (2, 1, 1)], "block (1) must be the destination of one copy only"),
        ([(0, 1, 1), (1, 2, 1)], "block (1) must not be both a source and a destination of one list"),
    ],
)
def test_copy_lists_that_break_the_rules_are_refused(
    copies: list[tuple[int, int, int]], message: str
) -> None:
    layout = CacheLayout("float16", 1, 1, 64, 8)
    with pytest.raises(ValueError) as caught:
        ops.copy_blocks(layout, layout.empty_pool(4), np.array(copies, np.int32))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("swaps", "message"),
    [
        ([(4, 0)], "a swap names source block (4), which must be in 0..3"),
        ([(0, 3)], "a swap names destination block (3), which must be in 0..2"),
        ([(0, -1)], "a swap names destination block (-1), which must be in 0..2"),
        ([(0, 1), (2, 1)], "block (1) must be the destination of one swap only"),
    ],
)
def test_swap_lists_that_break_the_rules_are_refused(swaps: list[tuple[int, int]], message: str) -> None:
    layout = CacheLayout("float16", 1, 1, 64, 8)
    with pytest.raises(ValueError) as caught:
        ops.swap_blocks(layout, layout.empty_pool(4), layout.empty_host_pool(3), np.array(swaps, np.int32))
    assert str(caught.value) == message


def test_pools_that_are_no_two_pools_are_refused() -> None:
    layout, swaps = CacheLayout("float16", 1, 1, 64, 8), np.array([(0, 1)], np.int32)
    pool = layout.empty_pool(4)
    with pytest.raises(ValueError, match=r"^source and destination must not overlap in memory$"):
        ops.swap_blocks(layout, pool[:2], pool[1:], swaps)
    ops.swap_blocks(layout, pool[:2], pool[2:], swaps)
    with pytest.raises(ValueError, match="destination"):
        ops.swap_blocks(layout, pool, pool[..., :4].copy(), swaps)


@pytest.mark.parametrize(
    ("tables", "starts", "message"),
    [
        ([[0, 4]], [0, 16], "block_tables[0, 1] (4) must be in 0..3"),
        ([[0, 1]], [0, 17], "a context length (17) must be in 0..16, what a block table row holds"),
        ([[0, 1]], [1, 8], "token_start[0] (1) must be 0"),
        ([[0, 1], [2, 3]], [0, 8, 7], "token_start[2] (7) must not be below 8"),
    ],
)
def test_gather_refuses_in_one_line(tables: list[list[int]], starts: list[int], message: str) -> None:
    layout = CacheLayout("float16", 1, 1, 64, 8)
    with pytest.raises(ValueError) as caught:
        ops.gather_kv(layout, layout.empty_pool(4), 0, np.array(tables, np.int32), np.array(starts, np.int32))
    assert str(caught.value) == message
