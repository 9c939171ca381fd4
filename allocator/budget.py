"""MemoryBudget: how an engine's GPU memory divides into weights, reserve, KV pool and headroom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allocator.checks import require_int, require_optional_int
from allocator.field_docs import with_field_docs
from allocator.model import ModelSpec
from allocator.windows import AttentionWindow

if TYPE_CHECKING:
    from allocator.config import BuildConfig, CacheConfig

GIB = 2**30
"""Bytes of one GiB."""


@with_field_docs
@dataclass(frozen=True)
class MemoryBudget:
    """What building an engine yields, for one GPU: bytes, blocks, tokens and sequences."""

    gpu_memory_bytes: int | None
    """Memory of the GPU; None when the pool was given in blocks and no GPU was named."""
    weights_bytes: int
    reserve_bytes: int
    """Activations, logits and the runtime."""
    pool_bytes: int
    """Bytes granted to the KV pool; with num_blocks given, those that the blocks take."""
    bytes_per_token: int
    """Bytes one token adds to the pool, per-token scales included."""
    block_bytes: int
    num_blocks: int
    num_tokens: int
    """Tokens that the pool holds."""
    tokens_per_block: int
    max_seq_len: int
    paged: bool
    num_host_blocks: int
    """Whole blocks that host_cache_bytes hold."""
    headroom_bytes: int | None
    """Memory left when the pool is allocated, negative where num_blocks overcommits; None without a GPU."""
    window: int | None = None
    """Most recent tokens that a sequence keeps, None for all; and `num_sinks` first ones."""
    num_sinks: int = 0

    @classmethod
    def compute(
        cls,
        model: ModelSpec,
        build: BuildConfig,
        cache: CacheConfig,
        *,
        gpu_memory_bytes: int | None = None,
        runtime_bytes: int = GIB,
        reserve_bytes: int | None = None,
    ) -> MemoryBudget:
        """Size the pool of one GPU with `gpu_memory_bytes` of memory.

        reserve = max_num_tokens · max(intermediate, 4 · hidden) · 2 · itemsize
        + max_batch_size · vocabulary · 4 + `runtime_bytes`, or `reserve_bytes` where it was measured.
        Weights divide evenly over the tensor-parallel GPUs. The pool is
        ⌊(memory − weights − reserve) · kv_cache_free_gpu_mem_fraction⌋ bytes, in whole blocks, of at most
        `max_tokens`; `num_blocks`, when given, replaces all of that and needs no memory size.

        Raises ValueError, with the numbers, when nothing is left or one sequence of max_seq_len cannot fit.
        """
        require_optional_int("gpu_memory_bytes", gpu_memory_bytes, 1)
        require_int("runtime_bytes", runtime_bytes, 0)
        require_optional_int("reserve_bytes", reserve_bytes, 0)
        tensor_parallel = cache.tensor_parallel_size
        per_token = model.kv_bytes_per_token(cache.kv_dtype, tensor_parallel)
        if cache.kv_scales == "token":
            per_token += model.kv_scale_bytes_per_token(tensor_parallel)
        block = per_token * build.tokens_per_block
        weights = -(-model.weight_bytes // tensor_parallel)
        if reserve_bytes is None:
            width = max(model.intermediate_size, 4 * model.hidden_size)
            activations = build.max_num_tokens * width * 2 * model.itemsize
            reserve_bytes = activations + build.max_batch_size * model.vocab_size * 4 + runtime_bytes
        if cache.num_blocks is not None:
            pool = cache.num_blocks * block
            tokens = cache.num_blocks * build.tokens_per_block
        else:
            pool = _pool_bytes(model, build, gpu_memory_bytes, weights, reserve_bytes)
            tokens = pool // per_token
            if cache.max_tokens is not None:
                tokens = min(tokens, cache.max_tokens)
        blocks = tokens // build.tokens_per_block
        if build.enable_paged_kv_cache:
            tokens = blocks * build.tokens_per_block
        used = tokens * per_token
        budget = cls(
            gpu_memory_bytes=gpu_memory_bytes,
            weights_bytes=weights,
            reserve_bytes=reserve_bytes,
            pool_bytes=pool,
            bytes_per_token=per_token,
            block_bytes=block,
            num_blocks=blocks,
            num_tokens=tokens,
            tokens_per_block=build.tokens_per_block,
            max_seq_len=build.max_seq_len,
            paged=build.enable_paged_kv_cache,
            num_host_blocks=cache.host_cache_bytes // block,
            headroom_bytes=None
            if gpu_memory_bytes is None
            else gpu_memory_bytes - weights - reserve_bytes - used,
            window=cache.window,
            num_sinks=cache.num_sinks,
        )
        budget._require_one_sequence()
        return budget

    def _require_one_sequence(self) -> None:
        if self.sequences_at_max_seq_len:
            return
        if self.paged:
            raise ValueError(
                f"pool of {self.num_blocks} blocks of {self.tokens_per_block} tokens is smaller than "
                f"one sequence of max_seq_len {self.max_seq_len}, which needs "
                f"{self.blocks_for(self.max_seq_len)}"
            )
        raise ValueError(
            f"pool of {self.num_tokens} tokens is smaller than one sequence of max_seq_len {self.max_seq_len}"
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Return the blocks that a sequence of `num_tokens` tokens occupies; with a window, at most so many."""
        require_int("num_tokens", num_tokens, 0)
        if self.window is None or not self.paged:
            return -(-num_tokens // self.tokens_per_block)
        return AttentionWindow(self.window, self.num_sinks, self.tokens_per_block).blocks_held(num_tokens)

    @property
    def sequences_at_max_seq_len(self) -> int:
        """Sequences of max_seq_len tokens that fit together."""
        if self.paged:
            return self.num_blocks // self.blocks_for(self.max_seq_len)
        return self.num_tokens // self.max_seq_len

    def sequences_at(self, mean_length: float) -> int:
        """Return how many sequences of `mean_length` tokens fit together.

        Paged, each takes ⌈mean_length / tokens_per_block⌉ blocks; unpaged, max_seq_len tokens.
        Raises ValueError unless 0 < mean_length <= max_seq_len.
        """
        if not 0 < mean_length <= self.max_seq_len:
            raise ValueError(f"mean_length ({mean_length}) must lie in (0, max_seq_len {self.max_seq_len}]")
        if not self.paged:
            return self.sequences_at_max_seq_len
        return self.num_blocks // self.blocks_for(math.ceil(mean_length))

    def rows(self, mean_length: float | None = None) -> list[tuple[str, str]]:
        """Return the budget as (label, value) pairs, ready for a table."""
        rows = []
        if self.gpu_memory_bytes is not None:
            rows.append(("GPU memory", _gib(self.gpu_memory_bytes)))
        rows += [
            ("weights", _gib(self.weights_bytes)),
            ("reserve", _gib(self.reserve_bytes)),
            ("KV pool", _gib(self.pool_bytes)),
        ]
        if self.headroom_bytes is not None:
            rows.append(("headroom", _gib(self.headroom_bytes)))
        rows.append(("bytes a token", f"{self.bytes_per_token:,}"))
        if self.paged:
            rows.append((f"blocks of {self.tokens_per_block} tokens", f"{self.num_blocks:,}"))
            rows.append(("bytes a block", f"{self.block_bytes:,}"))
        if self.num_host_blocks:
            rows.append(("blocks in host memory", f"{self.num_host_blocks:,}"))
        rows.append(("tokens", f"{self.num_tokens:,}"))
        rows.append((f"sequences of {self.max_seq_len} tokens", f"{self.sequences_at_max_seq_len:,}"))
        if mean_length is not None:
            rows.append((f"sequences of {mean_length:g} tokens", f"{self.sequences_at(mean_length):,}"))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        left, right = max(len(label) for label, _ in rows), max(len(value) for _, value in rows)
        return "\n".join(f"{label:<{left}}  {value:>{right}}" for label, value in rows)


def _pool_bytes(
    model: ModelSpec, build: BuildConfig, gpu_memory_bytes: int | None, weights: int, reserve: int
) -> int:
    if gpu_memory_bytes is None:
        raise ValueError("gpu_memory_bytes (None) must be given, or num_blocks")
    if weights > gpu_memory_bytes:
        raise ValueError(
            f"weights ({_gib(weights)}) of {model.name} exceed the GPU's memory ({_gib(gpu_memory_bytes)})"
        )
    free = gpu_memory_bytes - weights - reserve
    if free < 0:
        raise ValueError(
            f"weights ({_gib(weights)}) and reserve ({_gib(reserve)}) of {model.name} exceed "
            f"the GPU's memory ({_gib(gpu_memory_bytes)})"
        )
    return math.floor(free * build.kv_cache_free_gpu_mem_fraction)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
