"""ModelSpec: what the allocator and the simulator need to know of a decoder-only transformer."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property

from allocator.checks import require_choice, require_int, require_optional_int

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of one weight or activation, by `ModelSpec.dtype`."""

KV_DTYPE_BYTES = DTYPE_BYTES | {"fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
"""Bytes of one stored K or V element, by kv dtype ("auto" stands for the model's own)."""

SCALE_BYTES = 4
"""Bytes of one quantisation scale (float32)."""


@dataclass(frozen=True)
class ModelSpec:
    """Describe a decoder-only transformer by the figures that size its weights and its KV cache.

    `intermediate_size` is the MLP width (of one expert in a mixture). `active_parameters` are those that one
    token is multiplied with; they equal `num_parameters` in a dense model. `layer_windows` gives, per layer,
    the number of most recent keys it attends to, None for all of them; () means that no layer has a window.
    A non-zero `kv_lora_rank` marks multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1):
    one compressed vector of `kv_lora_rank + qk_rope_head_dim` elements a token and layer stands for K and V
    of all heads. `weight_bits` is the width of a stored weight where it is quantised, None for dtype's own.

    Raises ValueError when a field breaks its rule.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_parameters: int
    active_parameters: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    layer_windows: tuple[int | None, ...] = ()
    dtype: str = "float16"
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "num_parameters",
        ):
            require_int(name, getattr(self, name), 1)
        for name in (
            "active_parameters",
            "num_experts",
            "experts_per_token",
            "kv_lora_rank",
            "qk_rope_head_dim",
        ):
            require_int(name, getattr(self, name), 0)
        require_choice("dtype", self.dtype, DTYPE_BYTES)
        require_optional_int("weight_bits", self.weight_bits, 1)
        if self.active_parameters == 0:
            object.__setattr__(self, "active_parameters", self.num_parameters)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.active_parameters > self.num_parameters:
            raise ValueError(
                f"active_parameters ({self.active_parameters}) must not exceed "
                f"num_parameters ({self.num_parameters})"
            )
        if self.experts_per_token > self.num_experts or (self.num_experts and not self.experts_per_token):
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must lie in 1 to num_experts "
                f"({self.num_experts})"
            )
        if not self.num_experts and self.active_parameters != self.num_parameters:
            raise ValueError(
                f"active_parameters ({self.active_parameters}) must equal num_parameters "
                f"({self.num_parameters}) in a model without experts"
            )
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"layer_windows has {len(self.layer_windows)} entries but must have one a layer "
                f"(num_layers {self.num_layers}), or none"
            )
        for layer, window in enumerate(self.layer_windows):
            require_optional_int(f"layer_windows[{layer}]", window, 1)

    @classmethod
    def preset(cls, name: str) -> ModelSpec:
        """Return the preset called `name`, e.g. "llama-2-7b". Raises ValueError for an unknown name."""
        from allocator.presets import MODEL_PRESETS

        if name not in MODEL_PRESETS:
            raise ValueError(f"unknown model preset {name!r}: must be one of {', '.join(MODEL_PRESETS)}")
        return MODEL_PRESETS[name]

    @classmethod
    def from_hf_config(cls, path: str | os.PathLike[str], name: str | None = None) -> ModelSpec:
        """Read a Hugging Face `config.json` (or the folder that holds one).

        Parameters are counted from the architecture, so no weights are needed. Raises ValueError, naming the
        file, when it is unreadable, not JSON, lacks a field, or describes an unsupported architecture.
        """
        from allocator.hf_config import read_hf_config

        return read_hf_config(path, name)

    @property
    def itemsize(self) -> int:
        """Bytes of one activation, and of one K or V element under kv dtype "auto"."""
        return DTYPE_BYTES[self.dtype]

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights, over all GPUs."""
        bits = 8 * self.itemsize if self.weight_bits is None else self.weight_bits
        return -(-self.num_parameters * bits // 8)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, summed over the layers; 0 in a dense model."""
        idle = self.num_experts - self.experts_per_token
        return (self.num_parameters - self.active_parameters) // idle if idle else 0

    def touched_parameters(self, num_tokens: int) -> float:
        """Return how many parameters a step of `num_tokens` tokens reads, in expectation.

        A dense model reads all of them. In a mixture a token picks `experts_per_token` of `num_experts`; with
        uniform, independent routing, E · (1 − (1 − k / E)^n) experts are touched by n tokens.
        """
        if not self.num_experts:
            return float(self.num_parameters)
        untouched = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        shared = self.active_parameters - self.experts_per_token * self.expert_parameters
        return shared + self.num_experts * (1 - untouched) * self.expert_parameters

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it attends to all keys: always `num_layers` entries."""
        return self.layer_windows or (None,) * self.num_layers

    @property
    def pool_window(self) -> int | None:
        """The window by which one pool for all layers can let go of blocks, a block covering all of them: the
        largest, or None when some layer attends to all keys.
        """
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    def narrowed(self, window: int | None) -> ModelSpec:
        """Return the model with at most `window` keys in every layer; None changes nothing."""
        if window is None:
            return self
        windows = tuple(window if own is None else min(own, window) for own in self.windows)
        return dataclasses.replace(self, layer_windows=windows)

    def kv_heads_per_gpu(self, tensor_parallel_size: int = 1) -> int:
        """Return the KV heads that one GPU stores: max(1, KV heads / GPUs), replicated beyond one a head.

        Raises ValueError when the heads cannot be shared out evenly.
        """
        require_int("tensor_parallel_size", tensor_parallel_size, 1)
        if self.num_heads % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size ({tensor_parallel_size}) must divide num_heads ({self.num_heads})"
            )
        larger, smaller = (
            max(self.num_kv_heads, tensor_parallel_size),
            min(self.num_kv_heads, tensor_parallel_size),
        )
        if larger % smaller:
            raise ValueError(
                f"tensor_parallel_size ({tensor_parallel_size}) must divide num_kv_heads "
                f"({self.num_kv_heads}) or be a multiple of it"
            )
        return max(1, self.num_kv_heads // tensor_parallel_size)

    def kv_itemsize(self, kv_dtype: str = "auto") -> int:
        """Return the bytes of one stored K or V element. Raises ValueError for an unknown kv dtype."""
        require_choice("kv_dtype", kv_dtype, ("auto", *KV_DTYPE_BYTES))
        return self.itemsize if kv_dtype == "auto" else KV_DTYPE_BYTES[kv_dtype]

    def kv_bytes_per_token_per_layer(self, kv_dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Return the bytes one token adds to one layer's cache on one GPU, scales not counted.

        2 (K and V) · KV heads on the GPU · head_dim · itemsize; with latent attention
        (kv_lora_rank + qk_rope_head_dim) · itemsize, whole on every GPU since all heads read it.
        """
        heads = self.kv_heads_per_gpu(tensor_parallel_size)
        if self.kv_lora_rank:
            return (self.kv_lora_rank + self.qk_rope_head_dim) * self.kv_itemsize(kv_dtype)
        return 2 * heads * self.head_dim * self.kv_itemsize(kv_dtype)

    def kv_bytes_per_token(self, kv_dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Return the bytes one token occupies on one GPU, over all layers, scales not counted.

        This sizes a block, which covers all layers, windowed or not. What a long sequence needs where
        windowed layers drop old keys is `kv_bytes`.
        """
        return self.num_layers * self.kv_bytes_per_token_per_layer(kv_dtype, tensor_parallel_size)

    def kv_scale_bytes_per_token(self, tensor_parallel_size: int = 1) -> int:
        """Return the bytes of one token's quantisation scales on one GPU: one a layer, K or V, and KV head.

        Latent attention has one vector, hence one scale, a layer.
        """
        heads = self.kv_heads_per_gpu(tensor_parallel_size)
        return self.num_layers * (1 if self.kv_lora_rank else 2 * heads) * SCALE_BYTES

    def kv_bytes(self, num_tokens: int, kv_dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Return the least bytes on one GPU that serve a sequence of `num_tokens` tokens.

        Σ over layers of min(num_tokens, window) · bytes per token and layer: a windowed layer needs its most
        recent keys only. That takes a pool for each window; see `kv_bytes_in_one_pool`.
        """
        require_int("num_tokens", num_tokens, 0)
        kept = sum(num_tokens if window is None else min(num_tokens, window) for window in self.windows)
        return kept * self.kv_bytes_per_token_per_layer(kv_dtype, tensor_parallel_size)

    def kv_bytes_in_one_pool(
        self, num_tokens: int, kv_dtype: str = "auto", tensor_parallel_size: int = 1
    ) -> int:
        """Return the bytes on one GPU that a sequence takes where a block holds its tokens for all layers.

        min(num_tokens, pool_window) · bytes per token: no token leaves before the last layer is done with it.
        Block rounding is not counted.
        """
        require_int("num_tokens", num_tokens, 0)
        kept = num_tokens if self.pool_window is None else min(num_tokens, self.pool_window)
        return kept * self.kv_bytes_per_token(kv_dtype, tensor_parallel_size)
