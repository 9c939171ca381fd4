"""The allocator's configuration: ModelSpec, BuildConfig, CacheConfig, and the MemoryBudget they imply."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from allocator.budget import GIB, MemoryBudget
from allocator.checks import (
    require_choice,
    require_fraction,
    require_int,
    require_optional_int,
    require_power_of_two,
)
from allocator.field_docs import with_field_docs
from allocator.model import KV_DTYPE_BYTES, ModelSpec
from allocator.presets import MODEL_PRESETS

__all__ = [
    "GIB",
    "MODEL_PRESETS",
    "BuildConfig",
    "CacheConfig",
    "MemoryBudget",
    "ModelSpec",
    "load_model",
]

MAX_BLOCKS = 2**31 - 1
"""Most blocks of a pool: block tables hold 32-bit integers."""


@with_field_docs
@dataclass(frozen=True)
class BuildConfig:
    """What is fixed when an engine is built; a change means a rebuild. Raises ValueError on a broken rule."""

    max_batch_size: int = 256
    """Most sequences that run at once."""
    max_num_tokens: int = 8192
    """Most tokens that one step processes, decodes and prefill chunks together."""
    max_seq_len: int = 2048
    """Most tokens of a sequence, prompt and output together."""
    kv_cache_free_gpu_mem_fraction: float = 0.9
    """Share of the GPU memory left after weights and reserve that the KV pool takes."""
    enable_paged_kv_cache: bool = True
    """Take blocks as sequences grow; else reserve max_seq_len contiguous tokens a sequence."""
    tokens_per_block: int = 64
    """Tokens of a block, a power of two."""

    def __post_init__(self) -> None:
        require_int("max_batch_size", self.max_batch_size, 1)
        require_int("max_num_tokens", self.max_num_tokens, 1)
        require_int("max_seq_len", self.max_seq_len, 1)
        require_fraction("kv_cache_free_gpu_mem_fraction", self.kv_cache_free_gpu_mem_fraction)
        require_power_of_two("tokens_per_block", self.tokens_per_block)


@with_field_docs
@dataclass(frozen=True)
class CacheConfig:
    """How the KV cache is stored, sized and reused. Raises ValueError on a broken rule."""

    kv_dtype: str = "auto"
    """Type of stored keys and values: auto is the model's own, else float16, bfloat16, float32, fp8_e4m3,
    fp8_e5m2 or int8."""
    kv_scales: str = "tensor"
    """Scope of a quantised cache's scales: tensor, head, or token (stored in the block and counted by it)."""
    tensor_parallel_size: int = 1
    """GPUs that share the model; every figure of the cache is for one of them."""
    max_tokens: int | None = None
    """Most tokens the pool may hold, whatever memory would allow."""
    num_blocks: int | None = None
    """Blocks of the pool, instead of the number that memory gives."""
    enable_block_reuse: bool = True
    """Keep the content of freed blocks for later requests with the same prefix."""
    enable_partial_reuse: bool = False
    """Also reuse the matching front part of a block."""
    copy_on_partial_reuse: bool = True
    """Copy a partly matching block that others hold; else only take over those that nobody holds."""
    policy: str = "lru"
    """Eviction policy: lru, fifo, lfu, slru, sieve, s3fifo, gdsf, mru, priority, or package.module:Class."""
    host_cache_bytes: int = 0
    """Host memory for evicted blocks and swapped-out sequences, in bytes."""
    offload_min_priority: int = 30
    """Least retention priority, 0 to 100, with which an evicted block moves to host memory; 35 is the usual."""
    window: int | None = None
    """Most recent tokens that every layer attends to; None for all."""
    num_sinks: int = 0
    """First tokens that stay attended to when a window has moved on."""

    def __post_init__(self) -> None:
        require_choice("kv_dtype", self.kv_dtype, ("auto", *KV_DTYPE_BYTES))
        require_choice("kv_scales", self.kv_scales, ("tensor", "head", "token"))
        require_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        require_optional_int("max_tokens", self.max_tokens, 1)
        require_optional_int("num_blocks", self.num_blocks, 1)
        if self.num_blocks is not None and self.num_blocks > MAX_BLOCKS:
            raise ValueError(f"num_blocks ({self.num_blocks}) must be at most {MAX_BLOCKS}")
        require_int("host_cache_bytes", self.host_cache_bytes, 0)
        require_int("offload_min_priority", self.offload_min_priority, 0)
        if self.offload_min_priority > 100:
            raise ValueError(f"offload_min_priority ({self.offload_min_priority}) must be at most 100")
        require_optional_int("window", self.window, 1)
        require_int("num_sinks", self.num_sinks, 0)
        if self.kv_scales == "token" and KV_DTYPE_BYTES.get(self.kv_dtype) != 1:
            raise ValueError(f"kv_scales ('token') needs a quantised kv_dtype, not {self.kv_dtype!r}")
        if self.num_sinks and self.window is None:
            raise ValueError(f"num_sinks ({self.num_sinks}) needs a window")
        if self.enable_partial_reuse and not self.enable_block_reuse:
            raise ValueError("enable_partial_reuse (True) needs enable_block_reuse")
        if not self.policy:
            raise ValueError("policy ('') must be a name or package.module:Class")


def load_model(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return the preset of that name, else read the Hugging Face config.json (or its folder) at that path.

    Raises ValueError when it is neither, with the nearest preset's name.
    """
    name = os.fspath(name_or_path)
    if name in MODEL_PRESETS:
        return MODEL_PRESETS[name]
    if Path(name).exists():
        return ModelSpec.from_hf_config(name)
    close = difflib.get_close_matches(name.lower(), MODEL_PRESETS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(
        f"unknown model {name!r}{hint}: must be one of {', '.join(MODEL_PRESETS)}, "
        "or the path of a Hugging Face config.json"
    )
