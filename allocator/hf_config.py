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

from allocator.hf_fields import Fields, architecture_of, dtype_of, weight_bits_of, windows_of
from allocator.model import ModelSpec


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


def _shape(fields: Fields, head_dim: int | None = None) -> _Shape:
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
    fields: Fields,
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
            layer_windows=windows_of(fields, shape.num_layers),
            dtype=dtype_of(fields),
            weight_bits=weight_bits_of(fields),
            **extra,
        )
    except ValueError as error:
        if str(error).startswith(fields.source):
            raise
        raise fields.error(str(error)) from None


def _read_llama_like(fields: Fields, name: str) -> ModelSpec:
    family = _LLAMA_LIKE[architecture_of(fields)]
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


def _sparse_layers(fields: Fields, num_layers: int) -> int:
    """Return how many layers hold experts (Qwen: every `decoder_sparse_step`-th but `mlp_only_layers`)."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise fields.error(f"field 'mlp_only_layers' ({dense!r}) must be a list of layers")
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _embeddings(fields: Fields, shape: _Shape, tied: bool) -> int:
    tables = 1 if fields.flag("tie_word_embeddings", tied) else 2
    return tables * shape.vocab * shape.hidden


def _read_deepseek(fields: Fields, name: str) -> ModelSpec:
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
    if architecture_of(fields) == "DeepseekV3ForCausalLM":
        router += experts  # the bias that balances the load
    first = min(fields.integer("first_k_dense_replace", 0, minimum=0), shape.num_layers)
    step = fields.integer("moe_layer_freq", 1)
    sparse = sum(layer % step == 0 for layer in range(first, shape.num_layers))
    total = _embeddings(fields, shape, False) + hidden
    total += (
        shape.num_layers * (attention + 2 * hidden)
        + (shape.num_layers - sparse) * 3 * hidden * shape.intermediate
    )
    total += sparse * (router + (experts + fields.integer("n_shared_experts", 0, minimum=0)) * expert)
    idle = sparse * (experts - per_token) * expert
    latent = {"kv_lora_rank": rank, "qk_rope_head_dim": rope}
    return _spec(fields, name, shape, total, idle, experts, per_token, **latent)


def _read_opt(fields: Fields, name: str) -> ModelSpec:
    """OPT (arXiv 2205.01068): learned positions, offset by 2; biases everywhere; two-matrix MLP."""
    renamed = {"intermediate_size": fields.integer("ffn_dim"), "num_key_value_heads": None, "head_dim": None}
    shape = _shape(Fields(fields.source, dict(fields.values) | renamed))
    hidden, width = shape.hidden, shape.intermediate
    projected = fields.integer("word_embed_proj_dim", hidden)
    total = shape.vocab * projected + (fields.integer("max_position_embeddings", 2048) + 2) * hidden
    if not fields.flag("tie_word_embeddings", True):
        total += shape.vocab * projected
    if projected != hidden:
        total += 2 * projected * hidden
    if fields.flag("do_layer_norm_before", True):
        total += 2 * hidden
    biased = fields.flag("enable_bias", True)
    total += shape.num_layers * _plain_layer(hidden, width, biased, biased)
    return _spec(fields, name, shape, total)


def _read_gpt_neox(fields: Fields, name: str) -> ModelSpec:
    """GPT-NeoX-20B and Pythia: rotary positions, biases, untied embeddings."""
    shape = _shape(fields)
    total = _embeddings(fields, shape, False) + 2 * shape.hidden
    biased = fields.flag("attention_bias", True)
    total += shape.num_layers * _plain_layer(shape.hidden, shape.intermediate, biased)
    return _spec(fields, name, shape, total)


def _read_gpt2(fields: Fields, name: str) -> ModelSpec:
    """GPT-2: learned positions, biases, tied embeddings."""
    hidden = fields.integer("n_embd")
    renamed = {
        "hidden_size": hidden,
        "num_attention_heads": fields.integer("n_head"),
        "num_hidden_layers": fields.integer("n_layer"),
        "intermediate_size": fields.integer("n_inner", 4 * hidden),
    }
    shape = _shape(Fields(fields.source, dict(fields.values) | renamed))
    total = _embeddings(fields, shape, True) + fields.integer("n_positions") * hidden + 2 * hidden
    total += shape.num_layers * _plain_layer(hidden, shape.intermediate)
    return _spec(fields, name, shape, total)


def _plain_layer(hidden: int, width: int, attention_bias: bool = True, mlp_bias: bool = True) -> int:
    """Count four square projections, a two-matrix MLP, and two LayerNorms (weight and bias)."""
    count = 4 * hidden * hidden + 2 * hidden * width + 4 * hidden
    return count + (4 * hidden if attention_bias else 0) + (width + hidden if mlp_bias else 0)


_READERS: dict[str, Callable[[Fields, str], ModelSpec]] = {
    **dict.fromkeys(_LLAMA_LIKE, _read_llama_like),
    "DeepseekV2ForCausalLM": _read_deepseek,
    "DeepseekV3ForCausalLM": _read_deepseek,
    "OPTForCausalLM": _read_opt,
    "GPTNeoXForCausalLM": _read_gpt_neox,
    "GPT2LMHeadModel": _read_gpt2,
}

SUPPORTED_ARCHITECTURES = tuple(_READERS)


def parse_hf_config(values: Mapping[str, Any], name: str, source: str = "config") -> ModelSpec:
    """Make a ModelSpec from a config's fields; `source` names it in errors. Raises ValueError."""
    fields = Fields(source, values)
    architecture = architecture_of(fields)
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
