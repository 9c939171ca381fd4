"""Read a model's `config.json` as Hugging Face publishes it, and count its parameters from it.

Field names and defaults are those of the `configuration_*.py` files of the transformers library; the weights'
shapes are those of its `modeling_*.py` files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.model import DTYPE_BYTES, ModelSpec


class _Fields:
    """A config's fields, with the errors a person needs: which file, which field, which rule."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.source}: {message}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Return an integer field; null counts as absent. Raises ValueError when absent without a default."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"field {name!r} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"field {name!r} ({value!r}) must be an integer")
        if value < minimum:
            raise self.error(f"field {name!r} ({value}) must be at least {minimum}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"field {name!r} ({value!r}) must be true or false")
        return value


@dataclass(frozen=True)
class _Shape:
    """What every reader finds out; ModelSpec is made from it."""

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class _Llama:
    """How a family differs from Llama: RMSNorm, rotary positions, gated MLP, biases only where said."""

    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    tied: bool = False
    head_dim: int | None = None
    experts_field: str | None = None
    expert_width_field: str = "intermediate_size"
    sinks: bool = False
    expert_bias: bool = False


_LLAMA_LIKE = {
    "LlamaForCausalLM": _Llama(),
    "MistralForCausalLM": _Llama(),
    "Phi3ForCausalLM": _Llama(),
    "Qwen2ForCausalLM": _Llama(qkv_bias=True),
    "Qwen3ForCausalLM": _Llama(qk_norm=True, head_dim=128),
    "GemmaForCausalLM": _Llama(tied=True, head_dim=256),
    "Gemma2ForCausalLM": _Llama(tied=True, head_dim=256, norms=4),
    "Gemma3ForCausalLM": _Llama(tied=True, head_dim=256, norms=4, qk_norm=True),
    "MixtralForCausalLM": _Llama(experts_field="num_local_experts"),
    "Qwen2MoeForCausalLM": _Llama(
        qkv_bias=True, experts_field="num_experts", expert_width_field="moe_intermediate_size"
    ),
    "Qwen3MoeForCausalLM": _Llama(
        qk_norm=True, experts_field="num_experts", expert_width_field="moe_intermediate_size"
    ),
    "GptOssForCausalLM": _Llama(experts_field="num_local_experts", head_dim=64, sinks=True, expert_bias=True),
}


def _shape(fields: _Fields, head_dim: int | None = None) -> _Shape:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if fields.values.get("head_dim") is None and head_dim is None and hidden % heads:
        raise fields.error(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    return _Shape(
        num_layers=fields.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", head_dim or hidden // heads),
        vocab=fields.integer("vocab_size"),
    )


def _spec(
    fields: _Fields,
    name: str,
    shape: _Shape,
    total: int,
    idle: int = 0,
    experts: int = 0,
    experts_per_token: int = 0,
    **extra: int,
) -> ModelSpec:
    try:
        return ModelSpec(
            name=name,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            num_parameters=total,
            active_parameters=total - idle,
            num_experts=experts,
            experts_per_token=experts_per_token,
            layer_windows=_windows(fields, shape.num_layers),
            dtype=_dtype(fields),
            weight_bits=_weight_bits(fields),
            **extra,
        )
    except ValueError as error:
        if str(error).startswith(fields.source):
            raise
        raise fields.error(str(error)) from None


def _dtype(fields: _Fields) -> str:
    # Engines load a checkpoint without a stated type in half precision.
    dtype = fields.values.get("torch_dtype") or fields.values.get("dtype") or "float16"
    if dtype not in DTYPE_BYTES:
        raise fields.error(f"field 'torch_dtype' ({dtype!r}) must be one of {', '.join(DTYPE_BYTES)}")
    return str(dtype)


def _weight_bits(fields: _Fields) -> int | None:
    """Return the bits of a quantised weight; its scales and the layers left unquantised are not counted."""
    quantization = fields.values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    if quantization.get("quant_method") == "fp8":
        return 8
    if quantization.get("quant_method") == "mxfp4":
        return 4
    bits = quantization.get("bits")
    if isinstance(bits, int) and not isinstance(bits, bool) and bits > 0:
        return bits
    raise fields.error("field 'quantization_config' names no known quant_method and no number of bits")


def _windows(fields: _Fields, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window, () when none has one.

    An explicit `layer_types` list decides; else the rule by which the architecture derives it.
    """
    kinds = fields.values.get("layer_types")
    architecture = _architecture(fields)
    if architecture.startswith("Qwen") and not fields.flag("use_sliding_window", False):
        return ()
    if kinds is None:
        if fields.values.get("sliding_window") is None:
            return ()
        if architecture.startswith("Qwen"):
            first = fields.integer("max_window_layers", 28, minimum=0)
            windowed = [layer >= first for layer in range(num_layers)]
        elif architecture in ("Gemma2ForCausalLM", "GptOssForCausalLM"):
            windowed = [layer % 2 == 0 for layer in range(num_layers)]
        elif architecture == "Gemma3ForCausalLM":
            period = fields.integer("sliding_window_pattern", 6)
            windowed = [(layer + 1) % period != 0 for layer in range(num_layers)]
        elif architecture in ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"):
            windowed = [True] * num_layers
        else:
            return ()
        kinds = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error(f"field 'layer_types' must list one kind for each of {num_layers} layers")
    windows: list[int | None] = []
    for kind in kinds:
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            windows.append(fields.integer("sliding_window"))
        else:
            raise fields.error(
                f"field 'layer_types' has {kind!r}: must be full_attention or sliding_attention"
            )
    return tuple(windows) if any(window is not None for window in windows) else ()


def _read_llama_like(fields: _Fields, name: str) -> ModelSpec:
    family = _LLAMA_LIKE[_architecture(fields)]
    shape = _shape(fields, family.head_dim)
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * hidden * q + 2 * hidden * kv
    if fields.flag("attention_bias", False):
        attention += q + 2 * kv + hidden
    elif family.qkv_bias:
        attention += q + 2 * kv
    if family.qk_norm:
        attention += 2 * shape.head_dim
    if family.sinks:
        attention += shape.heads
    dense = 3 * hidden * shape.intermediate
    if fields.flag("mlp_bias", False):
        dense += 2 * shape.intermediate + hidden
    total = _embeddings(fields, shape, family.tied) + hidden
    total += shape.num_layers * (attention + family.norms * hidden)
    if family.experts_field is None:
        return _spec(fields, name, shape, total + shape.num_layers * dense)

    experts = fields.integer(family.experts_field)
    per_token = fields.integer("num_experts_per_tok")
    width = fields.integer(family.expert_width_field)
    expert = 3 * hidden * width + (2 * width + hidden if family.expert_bias else 0)
    router = hidden * experts + (experts if family.expert_bias else 0)
    shared_width = fields.integer("shared_expert_intermediate_size", 0, minimum=0)
    shared = 3 * hidden * shared_width + hidden if shared_width else 0
    sparse = _sparse_layers(fields, shape.num_layers)
    total += sparse * (router + shared + experts * expert) + (shape.num_layers - sparse) * dense
    idle = sparse * (experts - per_token) * expert
    return _spec(fields, name, shape, total, idle, experts, per_token)


def _sparse_layers(fields: _Fields, num_layers: int) -> int:
    """Return how many layers hold experts (Qwen: every `decoder_sparse_step`-th but `mlp_only_layers`)."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.values.get("mlp_only_layers") or []
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _embeddings(fields: _Fields, shape: _Shape, tied: bool) -> int:
    tables = 1 if fields.flag("tie_word_embeddings", tied) else 2
    return tables * shape.vocab * shape.hidden


def _read_deepseek(fields: _Fields, name: str) -> ModelSpec:
    """DeepSeek-V2 and V3: latent attention, shared and routed experts, the first layers dense.

    V3's multi-token-prediction layer is left out: it takes no part in ordinary decoding.
    """
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    rank, value_dim = fields.integer("kv_lora_rank"), fields.integer("v_head_dim")
    shape = _shape(fields, nope + rope)
    hidden, heads = shape.hidden, shape.heads
    q_rank = fields.integer("q_lora_rank", 0)
    query = heads * (nope + rope)
    attention = hidden * q_rank + q_rank + q_rank * query if q_rank else hidden * query
    attention += hidden * (rank + rope) + rank + rank * heads * (nope + value_dim)
    attention += heads * value_dim * hidden
    experts = fields.integer("n_routed_experts")
    per_token = fields.integer("num_experts_per_tok")
    width = fields.integer("moe_intermediate_size")
    expert = 3 * hidden * width
    router = hidden * experts
    if _architecture(fields) == "DeepseekV3ForCausalLM":
        router += experts  # the bias that balances the load
    first = min(fields.integer("first_k_dense_replace", 0, minimum=0), shape.num_layers)
    sparse = shape.num_layers - first
    total = _embeddings(fields, shape, False) + hidden
    total += shape.num_layers * (attention + 2 * hidden) + first * 3 * hidden * shape.intermediate
    total += sparse * (router + (experts + fields.integer("n_shared_experts", 0, minimum=0)) * expert)
    idle = sparse * (experts - per_token) * expert
    latent = {"kv_lora_rank": rank, "qk_rope_head_dim": rope}
    return _spec(fields, name, shape, total, idle, experts, per_token, **latent)


def _read_opt(fields: _Fields, name: str) -> ModelSpec:
    """OPT (arXiv 2205.01068): learned positions, offset by 2; biases everywhere; two-matrix MLP."""
    renamed = {"intermediate_size": fields.integer("ffn_dim"), "num_key_value_heads": None, "head_dim": None}
    shape = _shape(_Fields(fields.source, dict(fields.values) | renamed))
    hidden, width = shape.hidden, shape.intermediate
    projected = fields.integer("word_embed_proj_dim", hidden)
    total = shape.vocab * projected + (fields.integer("max_position_embeddings", 2048) + 2) * hidden
    if not fields.flag("tie_word_embeddings", True):
        total += shape.vocab * projected
    if projected != hidden:
        total += 2 * projected * hidden
    if fields.flag("do_layer_norm_before", True):
        total += 2 * hidden
    total += shape.num_layers * _biased_layer(hidden, width)
    return _spec(fields, name, shape, total)


def _read_gpt_neox(fields: _Fields, name: str) -> ModelSpec:
    """GPT-NeoX-20B and Pythia: rotary positions, biases, untied embeddings."""
    shape = _shape(fields)
    total = _embeddings(fields, shape, False) + 2 * shape.hidden
    total += shape.num_layers * _biased_layer(shape.hidden, shape.intermediate)
    return _spec(fields, name, shape, total)


def _read_gpt2(fields: _Fields, name: str) -> ModelSpec:
    hidden = fields.integer("n_embd")
    renamed = {
        "hidden_size": hidden,
        "num_attention_heads": fields.integer("n_head"),
        "num_hidden_layers": fields.integer("n_layer"),
        "intermediate_size": fields.integer("n_inner", 4 * hidden),
    }
    shape = _shape(_Fields(fields.source, dict(fields.values) | renamed))
    total = _embeddings(fields, shape, True) + fields.integer("n_positions") * hidden + 2 * hidden
    total += shape.num_layers * _biased_layer(hidden, shape.intermediate)
    return _spec(fields, name, shape, total)


def _biased_layer(hidden: int, width: int) -> int:
    """Four square projections, a two-matrix MLP and two LayerNorms, all with biases."""
    return 4 * (hidden * hidden + hidden) + 2 * hidden * width + width + hidden + 4 * hidden


_READERS: dict[str, Callable[[_Fields, str], ModelSpec]] = {
    **dict.fromkeys(_LLAMA_LIKE, _read_llama_like),
    "DeepseekV2ForCausalLM": _read_deepseek,
    "DeepseekV3ForCausalLM": _read_deepseek,
    "OPTForCausalLM": _read_opt,
    "GPTNeoXForCausalLM": _read_gpt_neox,
    "GPT2LMHeadModel": _read_gpt2,
}

SUPPORTED_ARCHITECTURES = tuple(_READERS)


def _architecture(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise fields.error("field 'architectures' is missing")
    return str(names[0])


def parse_hf_config(values: Mapping[str, Any], name: str, source: str = "config") -> ModelSpec:
    """Make a ModelSpec from a config's fields; `source` names it in errors. Raises ValueError."""
    fields = _Fields(source, values)
    architecture = _architecture(fields)
    if architecture not in _READERS:
        raise fields.error(
            f"architecture {architecture!r} is not supported: "
            f"must be one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return _READERS[architecture](fields, name)


def read_hf_config(path: str | os.PathLike[str], name: str | None = None) -> ModelSpec:
    """Read `path`, a config.json or the folder that holds one; `name` defaults to the folder's.

    Raises ValueError, naming the file, and the line or field where one is at fault.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{file}: cannot be read ({reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object")
    default = file.resolve().parent.name if file.name == "config.json" else file.stem
    return parse_hf_config(values, name or default, str(file))
