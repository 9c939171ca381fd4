"""Model presets, each the figures of its published Hugging Face config.json, read by the same reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocator.hf_config import parse_hf_config
from allocator.model import ModelSpec

_CONFIGS: dict[str, Mapping[str, Any]] = {
    # meta-llama/Llama-2-7b-hf (arXiv 2307.09288, table 1)
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "torch_dtype": "float16",
    },
    # meta-llama/Llama-2-13b-hf
    "llama-2-13b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "torch_dtype": "float16",
    },
    # meta-llama/Llama-2-70b-hf: grouped-query attention with 8 KV heads
    "llama-2-70b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "torch_dtype": "float16",
    },
    # meta-llama/Meta-Llama-3-8B (arXiv 2407.21783, table 3)
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    },
    # meta-llama/Meta-Llama-3-70B (arXiv 2407.21783, table 3)
    "llama-3-70b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    },
    # mistralai/Mistral-7B-v0.1 (arXiv 2310.06825, table 1): a window of 4096 in every layer
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    },
    # facebook/opt-13b (arXiv 2205.01068, table 1)
    "opt-13b": {
        "architectures": ["OPTForCausalLM"],
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_attention_heads": 40,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 5120,
        "do_layer_norm_before": True,
        "torch_dtype": "float16",
    },
    # Qwen/Qwen2.5-7B (arXiv 2412.15115, table 1): use_sliding_window is false
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "torch_dtype": "bfloat16",
    },
    # Qwen/Qwen2.5-72B (arXiv 2412.15115, table 1): use_sliding_window is false
    "qwen2.5-72b": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "torch_dtype": "bfloat16",
    },
    # mistralai/Mixtral-8x7B-v0.1 (arXiv 2401.04088, table 1): sliding_window is null
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    },
}

MODEL_PRESETS: dict[str, ModelSpec] = {
    name: parse_hf_config(values, name, f"preset {name}") for name, values in _CONFIGS.items()
}
"""The presets by name."""
