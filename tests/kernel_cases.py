"""Shared by the kernel tests: poisoned cases, the row-by-row tolerance, backends, and planted faults."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import kernels.compile
from kernels import ops, reference
from kernels.layout import CacheLayout
from kernels.ops import attention as attention_ops
from kernels.ops import cache as cache_ops
from kernels.ops import launch as launch_ops
from kernels.tolerance import NUMPY_DTYPES, row_bounds

# What a block table may hold past a sequence's blocks.
GARBAGE_IDS = np.array([-1, -(2**31), 2**31 - 1, 2**30, 7_777_777], np.int32)


def gpu_available() -> bool:
    """Return whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available())


BACKENDS = [
    "cpu",
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not gpu_available(), reason="needs an NVIDIA GPU that CuPy can use"),
        ],
    ),
]


# Where the property tests run: also, when asked for, on the CPU with every access checked.
PROPERTY_BACKENDS = [*BACKENDS, pytest.param("address", marks=pytest.mark.slow)]


def to_backend(array: np.ndarray[Any, Any], backend: str) -> Any:
    """Return the array where `backend` wants it, row strides kept; bfloat16 becomes uint16 bits on a GPU."""
    if backend != "gpu":
        return array
    import cupy

    if array.dtype == ml_dtypes.bfloat16:
        array = array.view(np.uint16)
    if array.base is not None and not array.flags.c_contiguous:
        whole = cupy.asarray(array.base.view(array.dtype))
        return cupy.ndarray(array.shape, array.dtype, memptr=whole.data, strides=array.strides)
    return cupy.asarray(array)


def to_host(array: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Return a NumPy array that holds `dtype`, from either backend."""
    host = array if isinstance(array, np.ndarray) else array.get()
    return host.view(NUMPY_DTYPES[dtype]) if host.dtype == np.uint16 else host


def poisoned(shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    """Return an array of NaN: what is read before it is written, or never written, shows."""
    return np.full(tuple(shape), np.nan, dtype)


def with_token_stride(array: np.ndarray[Any, Any], extra_heads: int) -> np.ndarray[Any, Any]:
    """Return a view equal to `[tokens, heads, dim]` array whose tokens lie `extra_heads` rows further apart."""
    tokens, heads, dim = array.shape
    wide = poisoned((tokens, heads + extra_heads, dim), array.dtype)
    wide[:, :heads] = array
    return wide[:, :heads]


@contextlib.contextmanager
def launches(
    *,
    seed: int | None = None,
    on: str = "cpu",
    load: Callable[..., Any] = kernels.compile.load,
) -> Iterator[None]:
    """Let operations run with workspaces full of NaN, thread order `seed`, and kernels from `load`.

    `on` is one of PROPERTY_BACKENDS: "address" adds the address sanitizer.
    """
    sanitize = "address" if on == "address" else None

    def load_seeded(file: str, constants: Any, *, backend: str = "auto") -> Any:
        module = load(file, constants, backend=backend, sanitize=sanitize)
        return _Seeded(module, seed) if backend == "cpu" else module

    def empty(backend: str, shape: Sequence[int], dtype: Any) -> Any:
        if np.dtype(dtype) == np.uint16:  # bfloat16 bits on a GPU
            return to_backend(poisoned(shape, ml_dtypes.bfloat16), backend)
        return to_backend(poisoned(shape, dtype), backend)

    with (
        unittest.mock.patch.object(launch_ops, "load", load_seeded),
        unittest.mock.patch.object(attention_ops, "empty", empty),
        unittest.mock.patch.object(cache_ops, "empty", empty),
    ):
        yield


@dataclass(frozen=True)
class _Seeded:
    module: Any
    seed: int | None

    def launch(self, kernel: str, grid: Any, block: Any, args: Any) -> None:
        self.module.launch(kernel, grid, block, args, seed=self.seed)


def round_to(dtype: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float32 values rounded to the type and back."""
    return values.astype(NUMPY_DTYPES[dtype]).astype(np.float32)


def plain_attend(
    dtype: str,
    query: np.ndarray[Any, Any],
    key: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    scale: float,
) -> np.ndarray[Any, Any]:
    """Return one query token's output as low-precision code computes it without any care.

    Scores, probabilities and output are rounded to the type; sums are float32.
    """
    out = np.zeros(query.shape, np.float32)
    if len(key) == 0:
        return out
    group = len(query) // key.shape[1]
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        products = query[heads].astype(np.float32) @ key[:, kv_head].astype(np.float32).T
        scores = round_to(dtype, np.float32(scale) * products)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights = round_to(dtype, weights / weights.sum(axis=1, keepdims=True))
        out[heads] = round_to(dtype, weights @ value[:, kv_head].astype(np.float32))
    return out


def assert_rows_close(
    dtype: str,
    out: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    plain: np.ndarray[Any, Any],
) -> None:
    """Check `[tokens, heads, dim]` row by row against float64, with the plain computation's error as the scale."""
    assert np.isfinite(out.astype(np.float64)).all(), "an output was not written, or read something poisoned"
    error = np.abs(out.astype(np.float64) - expected).max(-1)
    bound = row_bounds(dtype, expected, plain)
    assert np.isfinite(bound).all(), "the plain computation overflowed: it bounds nothing"
    for row in np.argwhere(error > bound):
        raise AssertionError(f"row {tuple(row)}: error {error[tuple(row)]:.3g} above {bound[tuple(row)]:.3g}")


def assert_lse_close(
    lse: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    largest_score_sum: np.ndarray[Any, Any],
    dim: int,
) -> None:
    """Check natural log-sum-exps: equal where −inf, else within the rounding of a float32 dot product.

    A sum of `dim` float32 products is off by at most dim · 2⁻²⁴ times the sum of their magnitudes
    (`largest_score_sum`: the largest over the keys, per row; Higham, Accuracy and Stability, (3.5)).
    """
    masked = expected == -np.inf
    assert (lse[masked] == -np.inf).all(), "a row without keys must have log-sum-exp -inf"
    lse, expected = lse[~masked].astype(np.float64), expected[~masked]
    bound = dim * 2.0**-24 * largest_score_sum[~masked] + 2.0**-23 * np.abs(expected) + 1e-5
    error = np.abs(lse - expected)
    assert (error <= bound).all(), f"log-sum-exp off by {error.max():.3g}"


@dataclass
class AttentionCase:
    """A pool with some sequences in it, and query tokens for the ends of them.

    Every slot that no sequence uses is NaN; every table entry past a sequence's blocks is garbage. `key` and
    `value` hold each sequence's own history `[length, num_kv_heads, head_dim]`.
    """

    layout: CacheLayout
    pool: np.ndarray[Any, Any]
    layer: int
    query: np.ndarray[Any, Any]
    query_start: np.ndarray[Any, Any]
    block_tables: np.ndarray[Any, Any]
    context_lens: np.ndarray[Any, Any]
    key: list[np.ndarray[Any, Any]]
    value: list[np.ndarray[Any, Any]]
    scale: float | None = None

    def put(self, sequence: int, position: int, key: Any = None, value: Any = None) -> None:
        """Give one position of one sequence another key or value `[num_kv_heads, head_dim]`."""
        block = self.block_tables[sequence, position // self.layout.tokens_per_block]
        offset = position % self.layout.tokens_per_block
        if key is not None:
            self.pool[block, self.layer, 0, :, offset] = self.key[sequence][position] = key
        if value is not None:
            self.pool[block, self.layer, 1, :, offset] = self.value[sequence][position] = value

    def check(self, out: np.ndarray[Any, Any], lse: np.ndarray[Any, Any]) -> None:
        """Check an output of attention for this case's queries against the reference."""
        layout = self.layout
        expected, expected_lse = reference.paged_prefill(
            layout,
            self.pool,
            self.layer,
            self.query,
            self.query_start,
            self.block_tables,
            self.context_lens,
            scale=self.scale,
        )
        scale = layout.head_dim**-0.5 if self.scale is None else self.scale
        plain = np.zeros(self.query.shape, np.float32)
        magnitude = np.zeros(self.query.shape[:2])
        group = self.query.shape[1] // layout.num_kv_heads
        for sequence, length in enumerate(self.context_lens):
            end = int(self.query_start[sequence + 1])
            for token in range(int(self.query_start[sequence]), end):
                visible = max(0, int(length) - (end - token) + 1)
                key, value = self.key[sequence][:visible], self.value[sequence][:visible]
                plain[token] = plain_attend(layout.dtype, self.query[token], key, value, scale)
                if visible:
                    heads = np.repeat(np.abs(key.astype(np.float64)), group, axis=1)
                    sums = np.einsum("khd,hd->kh", heads, np.abs(self.query[token].astype(np.float64)))
                    magnitude[token] = abs(scale) * sums.max(0)
        assert_rows_close(layout.dtype, out, expected, plain)
        assert_lse_close(lse, expected_lse, magnitude, layout.head_dim)


@dataclass(frozen=True)
class Sizes:
    """What Hypothesis chooses of a case; the numbers in the arrays follow from `seed`."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    num_layers: int = 1
    num_kv_heads: int = 1
    group: int = 1
    tokens_per_block: int = 16
    shared_blocks: bool = False
    extra_heads: int = 0
    scale: float | None = None
    seed: int = 0
    layer: int = field(default=-1)


def make_case(dtype: str, head_dim: int, sizes: Sizes) -> AttentionCase:
    """Build the case that `sizes` describes."""
    rng = np.random.default_rng(sizes.seed)
    layout = CacheLayout(dtype, sizes.num_layers, sizes.num_kv_heads, head_dim, sizes.tokens_per_block)
    element = NUMPY_DTYPES[dtype]
    needed = [-(-length // sizes.tokens_per_block) for length in sizes.lengths]
    num_blocks = max(1, sum(needed)) + int(rng.integers(0, 3))
    ids = rng.permutation(num_blocks).astype(np.int32)
    if sizes.shared_blocks:  # several sequences, and one sequence at several places, name the same block
        ids = rng.choice(ids, size=num_blocks).astype(np.int32)
    columns = max(1, max(needed, default=0)) + int(rng.integers(0, 3))
    wide = rng.choice(GARBAGE_IDS, size=(len(needed), columns + int(rng.integers(0, 3))))
    tables = wide[:, :columns]  # rows that lie further apart than they are long
    taken = 0
    for sequence, blocks in enumerate(needed):
        tables[sequence, :blocks] = ids[taken : taken + blocks]
        taken += blocks

    pool = poisoned(layout.pool_shape(num_blocks), element)
    layer = sizes.layer % sizes.num_layers
    for length, table in zip(sizes.lengths, tables, strict=True):
        slots = np.arange(length)
        blocks, offsets = table[slots // sizes.tokens_per_block], slots % sizes.tokens_per_block
        shape = (length, 2, sizes.num_kv_heads, head_dim)
        pool[blocks, layer, :, :, offsets] = rng.standard_normal(shape).astype(element)

    num_tokens = sum(sizes.queries)
    query = rng.standard_normal((num_tokens, sizes.num_kv_heads * sizes.group, head_dim)).astype(element)
    pairs = [
        reference.sequence_kv(layout, pool, layer, table, length)
        for length, table in zip(sizes.lengths, tables, strict=True)
    ]
    return AttentionCase(
        layout=layout,
        pool=pool,
        layer=layer,
        query=with_token_stride(query, sizes.extra_heads) if sizes.extra_heads else query,
        query_start=np.concatenate([[0], np.cumsum(sizes.queries)]).astype(np.int32),
        block_tables=tables,
        context_lens=np.array(sizes.lengths, np.int32),
        key=[key for key, _ in pairs],
        value=[value for _, value in pairs],
        scale=sizes.scale,
    )


def make_dominate(case: AttentionCase, sequence: int, position: int) -> None:
    """Let one key take nearly all the weight of every query of its sequence, and its value stand out.

    A kernel that misses this key, or shows it to a query that must not see it, is off by about 1 everywhere.
    """
    layout, rng = case.layout, np.random.default_rng(position)
    direction = rng.choice([-1.0, 1.0], size=(layout.num_kv_heads, layout.head_dim))
    group = case.query.shape[1] // layout.num_kv_heads
    tokens = slice(int(case.query_start[sequence]), int(case.query_start[sequence + 1]))
    noise = case.query[tokens].astype(np.float64) * 0.1
    case.query[tokens] = (np.repeat(direction, group, axis=0) + noise).astype(case.query.dtype)
    scale = layout.head_dim**-0.5 if case.scale is None else case.scale
    case.put(sequence, position, key=direction * 30 / (scale * layout.head_dim), value=direction * 3)


def run_decode(case: AttentionCase, backend: str, *, num_splits: int | None = None) -> None:
    """Run paged_attention on poisoned outputs and check it."""
    dtype = case.layout.dtype
    out = to_backend(poisoned(case.query.shape, case.query.dtype), backend)
    lse = to_backend(poisoned(case.query.shape[:2], np.float32), backend)
    ops.paged_attention(
        case.layout,
        to_backend(case.pool, backend),
        case.layer,
        to_backend(case.query, backend),
        to_backend(case.block_tables, backend),
        to_backend(case.context_lens, backend),
        scale=case.scale,
        num_splits=num_splits,
        out=out,
        lse=lse,
    )
    case.check(to_host(out, dtype), to_host(lse, "float32"))


def run_prefill(case: AttentionCase, backend: str) -> None:
    """Run paged_prefill on poisoned outputs and check it."""
    dtype = case.layout.dtype
    out = to_backend(poisoned(case.query.shape, case.query.dtype), backend)
    lse = to_backend(poisoned(case.query.shape[:2], np.float32), backend)
    ops.paged_prefill(
        case.layout,
        to_backend(case.pool, backend),
        case.layer,
        to_backend(case.query, backend),
        to_backend(case.query_start, backend),
        to_backend(case.block_tables, backend),
        to_backend(case.context_lens, backend),
        scale=case.scale,
        out=out,
        lse=lse,
    )
    case.check(to_host(out, dtype), to_host(lse, "float32"))


seeds = st.integers(0, 2**32 - 1)
block_sizes = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256])


@st.composite
def cache_sizes(draw: st.DrawFn, *, groups: Sequence[int], max_queries: int, max_length: int) -> Sizes:
    """Draw the sizes of a case: up to four sequences, some of them empty or shorter than their queries."""
    num_seqs = draw(st.integers(1, 4))
    lengths = st.one_of(
        st.integers(0, max_length), st.sampled_from([1, 2, 15, 16, 17, 32, 33, 64, min(256, max_length)])
    )
    queries = st.just(1) if max_queries == 1 else st.integers(0, max_queries)
    num_layers = draw(st.integers(1, 2))
    return Sizes(
        lengths=tuple(draw(lengths) for _ in range(num_seqs)),
        queries=tuple(draw(queries) for _ in range(num_seqs)),
        num_layers=num_layers,
        layer=draw(st.integers(0, num_layers - 1)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from(list(groups))),
        tokens_per_block=draw(block_sizes),
        shared_blocks=draw(st.booleans()),
        extra_heads=draw(st.sampled_from([0, 0, 1, 3])),
        scale=draw(st.sampled_from([None, None, 0.5, 1.0])),
        seed=draw(seeds),
    )


@dataclass(frozen=True)
class Fault:
    """A one-line bug to plant in a CUDA source."""

    name: str
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.name

    def plant(self, folder: Path) -> Callable[..., Any]:
        """Write a copy of the sources with this bug into `folder` and return a `load` that takes them from there."""
        target = folder / "cuda"
        shutil.copytree(kernels.compile.CUDA_DIR, target)
        source = (target / self.file).read_text()
        assert source.count(self.old) == 1, f"{self.file} must contain {self.old!r} once"
        (target / self.file).write_text(source.replace(self.old, self.new))

        @functools.cache
        def compiled(
            file: str, constants: tuple[tuple[str, Any], ...], backend: str, sanitize: str | None
        ) -> Any:
            return kernels.compile.compile_source(
                (target / file).read_text(),
                constants=dict(constants),
                backend=backend,  # type: ignore[arg-type]
                sanitize=sanitize,
                name=file,
                include_dirs=[target],
            )

        def load(file: str, constants: Any, *, backend: Any, sanitize: str | None) -> Any:
            if self.file not in sources_of(file):
                return kernels.compile.load(file, constants, backend=backend, sanitize=sanitize)
            return compiled(file, tuple(constants.items()), backend, sanitize)

        return load


def sources_of(file: str) -> set[str]:
    """Return the names of a CUDA source and of the project's headers that it includes."""
    found = {file}
    for header in re.findall(
        r'^#include "(.+)"', (kernels.compile.CUDA_DIR / file).read_text(), re.MULTILINE
    ):
        found |= sources_of(header)
    return found


def assert_caught(fault: Fault, folder: Path, check: Callable[[], None]) -> None:
    """Check that `check`, which passes on the sources as they are, fails with the bug planted."""
    with launches(load=fault.plant(folder)), pytest.raises(AssertionError):
        check()
