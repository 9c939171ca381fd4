"""Models, builds and budgets: published figures, independent arithmetic, and errors that say the numbers."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from different_cases import different_examples
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import (
    GIB,
    MODEL_PRESETS,
    BuildConfig,
    CacheConfig,
    MemoryBudget,
    ModelSpec,
    load_model,
)
from allocator.hf_config import parse_hf_config

# The counts that the published checkpoints hold (model.safetensors.index.json, or the model card).
PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "opt-13b": 12_853_473_280,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "mixtral-8x7b": 46_702_792_704,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


def tiny(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
        "num_parameters": 1000,
    }
    return ModelSpec(**fields | changes)


# ------------------------------------------------------------------------------------------------ models


def test_every_preset_has_a_published_count() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(MODEL_PRESETS)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_preset_counts_the_published_parameters(name: str, parameters: int) -> None:
    model = ModelSpec.preset(name)
    assert model.name == name
    assert model.num_parameters == parameters
    assert model.weight_bytes == 2 * parameters


# 2 · layers · KV heads · head_dim · 2 B, by hand from the models' papers.
@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-2-7b", 524_288),
        ("llama-2-13b", 800 * 1024),
        ("llama-2-70b", 320 * 1024),
        ("llama-3-8b", 128 * 1024),
        ("llama-3-70b", 320 * 1024),
        ("mistral-7b", 128 * 1024),
        ("opt-13b", 800 * 1024),
        ("qwen2.5-7b", 56 * 1024),
        ("qwen2.5-72b", 320 * 1024),
        ("mixtral-8x7b", 128 * 1024),
    ],
)
def test_preset_kv_bytes_per_token(name: str, bytes_per_token: int) -> None:
    assert ModelSpec.preset(name).kv_bytes_per_token() == bytes_per_token


def test_grouped_query_attention_is_not_sized_by_hidden_size() -> None:
    model = ModelSpec.preset("llama-2-70b")
    assert 2 * model.hidden_size * model.num_layers * 2 == model.group_size * model.kv_bytes_per_token()
    assert model.group_size == 8


def test_mixtral_uses_two_of_eight_experts() -> None:
    model = ModelSpec.preset("mixtral-8x7b")
    assert (model.num_experts, model.experts_per_token) == (8, 2)
    assert model.active_parameters == 12_879_925_248
    assert model.expert_parameters == 32 * 3 * 4096 * 14336
    assert model.touched_parameters(1) == pytest.approx(model.active_parameters)
    assert model.touched_parameters(10_000) == pytest.approx(model.num_parameters)
    assert model.touched_parameters(2) < 2 * model.active_parameters


def test_dense_model_touches_all_parameters() -> None:
    model = ModelSpec.preset("llama-2-7b")
    assert model.active_parameters == model.num_parameters == model.touched_parameters(1)
    assert model.expert_parameters == 0


@given(
    layers=st.integers(1, 100),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([64, 80, 128, 256]),
    tensor_parallel=st.sampled_from([1, 2, 4, 8]),
    kv_dtype=st.sampled_from(["auto", "float16", "float32", "int8", "fp8_e4m3"]),
)
def test_kv_bytes_per_token_adds_up_one_layer_and_head_at_a_time(
    layers: int, kv_heads: int, group: int, head_dim: int, tensor_parallel: int, kv_dtype: str
) -> None:
    if kv_heads * group % tensor_parallel:
        return
    model = tiny(
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype="bfloat16",
    )
    width = {"auto": 2, "float16": 2, "float32": 4, "int8": 1, "fp8_e4m3": 1}[kv_dtype]
    # GPU g of the group holds the KV heads that its query heads read.
    share = model.num_heads // tensor_parallel
    for gpu in range(tensor_parallel):
        heads = {query // group for query in range(gpu * share, (gpu + 1) * share)}
        total = sum(width for _ in range(layers) for _ in heads for _ in ("k", "v")) * head_dim
        if kv_heads % tensor_parallel == 0 or tensor_parallel % kv_heads == 0:
            assert model.kv_bytes_per_token(kv_dtype, tensor_parallel) == total


@given(windows=st.lists(st.none() | st.integers(1, 50), min_size=1, max_size=8), length=st.integers(0, 100))
def test_kv_bytes_counts_the_keys_that_the_last_query_attends_to(
    windows: list[int | None], length: int
) -> None:
    model = tiny(num_layers=len(windows), layer_windows=tuple(windows))
    attended = sum(
        sum(1 for key in range(length) if window is None or length - key <= window) for window in windows
    )
    assert model.kv_bytes(length) == attended * 2 * 2 * 8 * 2
    assert model.kv_bytes(length) <= length * model.kv_bytes_per_token()


def test_the_window_of_one_pool_for_all_layers() -> None:
    assert ModelSpec.preset("llama-2-7b").pool_window is None
    assert tiny(layer_windows=(8, None)).pool_window is None
    assert tiny(layer_windows=(8, 16)).pool_window == 16
    mistral = ModelSpec.preset("mistral-7b")
    assert mistral.pool_window == 4096
    assert mistral.kv_bytes(10_000) == mistral.kv_bytes_in_one_pool(10_000) == 4096 * 128 * 1024
    # "on a sequence length of 32k tokens, this reduces the cache memory usage by 8x" (arXiv 2310.06825, section 2)
    assert 8 * mistral.kv_bytes_in_one_pool(32_768) == 32_768 * mistral.kv_bytes_per_token()


@given(windows=st.lists(st.none() | st.integers(1, 50), min_size=1, max_size=8), length=st.integers(0, 100))
def test_one_pool_keeps_a_token_until_no_layer_attends_to_it(windows: list[int | None], length: int) -> None:
    model = tiny(num_layers=len(windows), layer_windows=tuple(windows))
    kept = sum(any(w is None or length - key <= w for w in windows) for key in range(length))
    assert model.kv_bytes_in_one_pool(length) == kept * model.kv_bytes_per_token()
    assert model.kv_bytes(length) <= model.kv_bytes_in_one_pool(length)


def test_alternating_windows_save_half_in_two_pools_and_nothing_in_one() -> None:
    """Gemma 2 9B (arXiv 2408.00118, table 1): 42 layers of 8 KV heads of 256, every other one with 4096 tokens."""
    gemma = tiny(
        num_layers=42,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        layer_windows=(4096, None) * 21,
    )
    assert gemma.kv_bytes_per_token() == 42 * 2 * 8 * 256 * 2 == 344_064
    assert gemma.pool_window is None
    assert gemma.kv_bytes_in_one_pool(8192) == 8192 * 344_064
    assert gemma.kv_bytes(8192) == (8192 + 4096) * 344_064 // 2


def test_latent_attention_with_windows() -> None:
    """A block of latent attention has one vector a layer, whatever the window (arXiv 2405.04434, section 2.1)."""
    model = tiny(num_layers=4, kv_lora_rank=512, qk_rope_head_dim=64, layer_windows=(128, 128, 1024, 1024))
    assert model.kv_bytes_in_one_pool(4096) == 1024 * 4 * 576 * 2
    assert model.kv_bytes(4096) == (2 * 128 + 2 * 1024) * 576 * 2


def test_a_narrower_window_bounds_every_layer() -> None:
    model = tiny(layer_windows=(8, None))
    assert model.narrowed(None) is model
    assert model.narrowed(16).windows == (8, 16)
    assert model.narrowed(4).windows == (4, 4)


def test_a_budget_with_a_window_holds_more_sequences() -> None:
    model, build = ModelSpec.preset("mistral-7b"), BuildConfig(max_seq_len=32_768, tokens_per_block=64)
    whole = MemoryBudget.compute(model, build, CacheConfig(num_blocks=1024))
    kept = MemoryBudget.compute(model, build, CacheConfig(num_blocks=1024, window=4096, num_sinks=4))
    assert (whole.blocks_for(32_768), whole.sequences_at_max_seq_len) == (512, 2)
    # 4096 tokens begin within a block at worst, so 65 blocks, and one of sinks
    assert (kept.blocks_for(32_768), kept.sequences_at_max_seq_len) == (66, 15)
    assert kept.blocks_for(640) == whole.blocks_for(640) == 10
    with pytest.raises(ValueError, match="smaller than one sequence"):
        MemoryBudget.compute(model, build, CacheConfig(num_blocks=66))
    with pytest.raises(ValueError, match="which needs 66"):
        MemoryBudget.compute(model, build, CacheConfig(num_blocks=65, window=4096, num_sinks=4))


def test_latent_attention_is_replicated_on_every_gpu() -> None:
    # DeepSeek-V2, arXiv 2405.04434, table 1: (512 + 64) elements a token and layer.
    model = tiny(num_layers=60, num_heads=128, num_kv_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
    assert model.kv_bytes_per_token() == 60 * 576 * 2
    assert model.kv_bytes_per_token(tensor_parallel_size=8) == 60 * 576 * 2
    assert model.kv_bytes_per_token("fp8_e4m3") == 60 * 576
    assert model.kv_scale_bytes_per_token(8) == 60 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, r"num_layers \(0\) must be at least 1"),
        ({"num_layers": 2.0}, r"num_layers \(2\.0\) must be an integer"),
        ({"num_heads": True}, r"num_heads \(True\) must be an integer"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"dtype": "int4"}, r"dtype \('int4'\) must be one of float16, bfloat16, float32"),
        ({"layer_windows": (4,)}, r"layer_windows has 1 entries but must have one a layer \(num_layers 2\)"),
        ({"layer_windows": (4, 0)}, r"layer_windows\[1\] \(0\) must be at least 1"),
        ({"active_parameters": 1001}, r"active_parameters \(1001\) must not exceed num_parameters \(1000\)"),
        ({"active_parameters": 900}, r"active_parameters \(900\) must equal .* without experts"),
        ({"num_experts": 8}, r"experts_per_token \(0\) must lie in 1 to num_experts \(8\)"),
        ({"num_experts": 2, "experts_per_token": 3}, r"experts_per_token \(3\) must lie in 1 to num_experts"),
    ],
)
def test_model_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_tensor_parallelism_must_divide_the_heads() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size \(3\) must divide num_heads \(32\)"):
        ModelSpec.preset("llama-2-7b").kv_bytes_per_token("auto", 3)
    with pytest.raises(ValueError, match=r"must divide num_kv_heads \(4\) or be a multiple of it"):
        ModelSpec.preset("qwen2.5-7b").kv_bytes_per_token("auto", 7)
    with pytest.raises(ValueError, match=r"kv_dtype \('int2'\) must be one of auto, float16"):
        ModelSpec.preset("llama-2-7b").kv_bytes_per_token("int2")


# ------------------------------------------------------------------------------------------------ config.json


def write(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_config_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "my-model", LLAMA)
    model = ModelSpec.from_hf_config(file)
    assert model == ModelSpec.from_hf_config(file.parent) == load_model(str(file)) == load_model(file.parent)
    assert (model.name, model.num_layers, model.num_kv_heads, model.head_dim) == ("my-model", 4, 2, 8)
    assert model.dtype == "bfloat16"
    embeddings, attention, mlp, norms = 2 * 100 * 64, 2 * 64 * 64 + 2 * 64 * 16, 3 * 64 * 160, 2 * 64
    assert model.num_parameters == embeddings + 4 * (attention + mlp + norms) + 64
    assert ModelSpec.from_hf_config(file, "other").name == "other"


# Fields as published on Hugging Face; counts from the checkpoints' safetensors metadata.
PUBLISHED_CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "meta-llama/Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen/Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        8_190_735_360,
    ),
    "Qwen/Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        14_315_784_192,
    ),
    "google/gemma-2-2b": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "head_dim": 256,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "google/gemma-3-1b-pt": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "head_dim": 256,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        999_885_952,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "EleutherAI/gpt-neox-20b": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "tie_word_embeddings": False,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "openai-community/gpt2": (
        {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "facebook/opt-125m": (
        {
            "architectures": ["OPTForCausalLM"],
            "do_layer_norm_before": True,
            "ffn_dim": 3072,
            "hidden_size": 768,
            "max_position_embeddings": 2048,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
        125_239_296,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        15_706_484_224,
    ),
    # arXiv 2412.19437, section 4.2: 671B parameters, 37B of them active.
    "deepseek-ai/DeepSeek-V3": (
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671_026_419_200,
    ),
    "openai/gpt-oss-20b": (
        {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "sliding_window": 128,
            "tie_word_embeddings": False,
            "vocab_size": 201088,
        },
        20_914_757_184,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_config_gives_the_published_count(name: str) -> None:
    config, parameters = PUBLISHED_CONFIGS[name]
    assert parse_hf_config(config, name).num_parameters == parameters


def test_latent_attention_config() -> None:
    model = parse_hf_config(PUBLISHED_CONFIGS["deepseek-ai/DeepSeek-V3"][0], "v3")
    assert model.kv_bytes_per_token(tensor_parallel_size=8) == 61 * (512 + 64) * 2
    assert (model.num_experts, model.experts_per_token) == (256, 8)
    assert 37e9 < model.active_parameters < 38e9
    assert model.weight_bytes == model.num_parameters


def windows_of(**changes: Any) -> tuple[int | None, ...]:
    return parse_hf_config(LLAMA | changes, "model").windows


def test_windows_by_architecture() -> None:
    full = (None,) * 4
    assert windows_of() == full
    assert windows_of(architectures=["MistralForCausalLM"], sliding_window=32) == (32,) * 4
    assert windows_of(architectures=["MistralForCausalLM"], sliding_window=None) == full
    assert windows_of(architectures=["Gemma2ForCausalLM"], sliding_window=32) == (32, None, 32, None)
    gemma3 = {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 32}
    assert windows_of(**gemma3, sliding_window_pattern=3) == (32, 32, None, 32)
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 3}
    assert windows_of(**qwen, use_sliding_window=True) == (None, None, None, 32)
    assert windows_of(**qwen, use_sliding_window=False) == full
    assert windows_of(**qwen) == full
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert windows_of(**gemma3, layer_types=kinds) == (None, 32, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, r"config\.json: field 'hidden_size' is missing"),
        ({"num_hidden_layers": "4"}, r"field 'num_hidden_layers' \('4'\) must be an integer"),
        ({"vocab_size": 0}, r"field 'vocab_size' \(0\) must be at least 1"),
        ({"architectures": None}, "field 'architectures' is missing"),
        (
            {"architectures": ["MambaForCausalLM"]},
            r"architecture 'MambaForCausalLM' is not supported: must be",
        ),
        ({"torch_dtype": "float8"}, r"field 'torch_dtype' \('float8'\) must be one of"),
        (
            {"num_key_value_heads": 3},
            r"config\.json: num_heads \(8\) must be a multiple of num_kv_heads \(3\)",
        ),
        ({"num_attention_heads": 7}, r"hidden_size \(64\) must be a multiple of num_attention_heads \(7\)"),
        ({"tie_word_embeddings": "no"}, r"field 'tie_word_embeddings' \('no'\) must be true or false"),
        ({"layer_types": ["full_attention"]}, r"'layer_types' must list one kind for each of 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, r"'layer_types' has 'linear_attention': must be"),
        ({"layer_types": ["sliding_attention"] * 4}, "field 'sliding_window' is missing"),
        (
            {"quantization_config": {"quant_method": "odd"}},
            "names no known quant_method and no number of bits",
        ),
        ({"architectures": ["MixtralForCausalLM"]}, "field 'num_local_experts' is missing"),
    ],
)
def test_config_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        ModelSpec.from_hf_config(write(tmp_path, LLAMA | changes))
    assert "\n" not in str(refusal.value)


def test_unreadable_configs_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        ModelSpec.from_hf_config(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{\n"hidden_size": }')
    with pytest.raises(ValueError, match=r"broken\.json:2: not JSON \(Expecting value\)"):
        ModelSpec.from_hf_config(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json: cannot be read \(not UTF-8 text\)"):
        ModelSpec.from_hf_config(broken)
    with pytest.raises(ValueError, match=r"must hold a JSON object"):
        ModelSpec.from_hf_config(write(tmp_path, [1]))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@different_examples()
@given(data=st.data(), name=st.sampled_from(sorted(PUBLISHED_CONFIGS)))
def test_a_damaged_config_is_refused_or_read_but_never_crashes(data: st.DataObject, name: str) -> None:
    config = dict(PUBLISHED_CONFIGS[name][0])
    extra = [
        "layer_types",
        "mlp_only_layers",
        "quantization_config",
        "torch_dtype",
        "sliding_window",
        "head_dim",
    ]
    for field in data.draw(st.lists(st.sampled_from(sorted(config) + extra), min_size=1, max_size=3)):
        config[field] = data.draw(JUNK)
    try:
        model = parse_hf_config(config, name, "damaged.json")
    except ValueError as error:
        message = str(error)
    else:
        message = ""
        assert model.kv_bytes_per_token() > 0
        assert model.num_parameters >= model.active_parameters > 0
    assert not message or message.startswith("damaged.json: ")
    assert "\n" not in message


def test_quantised_weights_are_sized_by_their_bits() -> None:
    awq = parse_hf_config(LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq")
    assert awq.weight_bytes == awq.num_parameters // 2
    assert awq.kv_bytes_per_token() == parse_hf_config(LLAMA, "plain").kv_bytes_per_token()


def test_unknown_model_names_the_nearest() -> None:
    assert load_model("llama-2-7b") is MODEL_PRESETS["llama-2-7b"]
    with pytest.raises(ValueError, match=r"unknown model 'Llama-2-7' \(did you mean llama-2-7b\?\)"):
        load_model("Llama-2-7")
    with pytest.raises(ValueError, match=r"unknown model preset 'x': must be one of llama-2-7b"):
        ModelSpec.preset("x")


# ------------------------------------------------------------------------------------------------ configs


def test_build_defaults_are_the_six_fields() -> None:
    assert dataclasses.asdict(BuildConfig()) == {
        "max_batch_size": 256,
        "max_num_tokens": 8192,
        "max_seq_len": 2048,
        "kv_cache_free_gpu_mem_fraction": 0.9,
        "enable_paged_kv_cache": True,
        "tokens_per_block": 64,
    }


def test_configs_are_frozen_and_share_no_field_name() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BuildConfig().tokens_per_block = 32  # type: ignore[misc]
    build, cache = ({field.name for field in dataclasses.fields(c)} for c in (BuildConfig, CacheConfig))
    assert not build & cache


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (BuildConfig, {"tokens_per_block": 48}, r"tokens_per_block \(48\) must be a power of two"),
        (BuildConfig, {"tokens_per_block": 0}, r"tokens_per_block \(0\) must be at least 1"),
        (BuildConfig, {"max_seq_len": 0}, r"max_seq_len \(0\) must be at least 1"),
        (BuildConfig, {"max_batch_size": 1.5}, r"max_batch_size \(1\.5\) must be an integer"),
        (
            BuildConfig,
            {"kv_cache_free_gpu_mem_fraction": 1.1},
            r"kv_cache_free_gpu_mem_fraction \(1\.1\) must lie in \(0, 1\]",
        ),
        (BuildConfig, {"kv_cache_free_gpu_mem_fraction": float("nan")}, r"\(nan\) must be a number"),
        (CacheConfig, {"kv_dtype": "fp4"}, r"kv_dtype \('fp4'\) must be one of auto, float16"),
        (
            CacheConfig,
            {"kv_scales": "token"},
            r"kv_scales \('token'\) needs a quantised kv_dtype, not 'auto'",
        ),
        (CacheConfig, {"num_sinks": 4}, r"num_sinks \(4\) needs a window"),
        (CacheConfig, {"num_blocks": 0}, r"num_blocks \(0\) must be at least 1"),
        (CacheConfig, {"num_blocks": 2**31}, r"num_blocks \(2147483648\) must be at most 2147483647"),
        (
            CacheConfig,
            {"enable_partial_reuse": True, "enable_block_reuse": False},
            r"enable_partial_reuse \(True\) needs enable_block_reuse",
        ),
        (CacheConfig, {"policy": ""}, r"policy \(''\) must be a name or package\.module:Class"),
    ],
)
def test_configs_refuse(config: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


# ------------------------------------------------------------------------------------------------ budget


def test_budget_of_llama_2_7b_on_80_gib_by_hand() -> None:
    budget = MemoryBudget.compute(
        ModelSpec.preset("llama-2-7b"), BuildConfig(), CacheConfig(), gpu_memory_bytes=80 * GIB
    )
    weights = 2 * 6_738_415_616
    reserve = 8192 * 4 * 4096 * 2 * 2 + 256 * 32000 * 4 + GIB
    pool = int(Fraction(9, 10) * (80 * GIB - weights - reserve))
    assert (budget.weights_bytes, budget.reserve_bytes, budget.pool_bytes) == (weights, reserve, pool)
    assert budget.block_bytes == 64 * 524_288
    assert budget.num_blocks == pool // budget.block_bytes
    assert budget.num_tokens == 64 * budget.num_blocks
    assert budget.sequences_at_max_seq_len == budget.num_blocks // 32
    assert budget.sequences_at(512) == budget.num_blocks // 8
    assert budget.sequences_at(512.5) == budget.num_blocks // 9
    assert budget.headroom_bytes == 80 * GIB - weights - reserve - budget.num_blocks * budget.block_bytes


@given(
    name=st.sampled_from(sorted(MODEL_PRESETS)),
    memory=st.integers(1, 400 * GIB),
    max_seq_len=st.integers(1, 8192),
    fraction=st.floats(0.01, 1),
    order=st.integers(0, 10),
    tensor_parallel=st.sampled_from([1, 2, 4]),
    kv_dtype=st.sampled_from(["auto", "int8"]),
    max_tokens=st.none() | st.integers(1, 10**6),
    paged=st.booleans(),
    runtime=st.integers(0, 4 * GIB),
)
def test_budget_never_spends_memory_twice_and_wastes_less_than_a_block(
    name: str,
    memory: int,
    max_seq_len: int,
    fraction: float,
    order: int,
    tensor_parallel: int,
    kv_dtype: str,
    max_tokens: int | None,
    paged: bool,
    runtime: int,
) -> None:
    model = ModelSpec.preset(name)
    build = BuildConfig(
        max_seq_len=max_seq_len,
        kv_cache_free_gpu_mem_fraction=fraction,
        tokens_per_block=1 << order,
        enable_paged_kv_cache=paged,
    )
    cache = CacheConfig(kv_dtype=kv_dtype, tensor_parallel_size=tensor_parallel, max_tokens=max_tokens)
    free = (
        memory
        - 2 * model.num_parameters // tensor_parallel
        - 8192 * max(model.intermediate_size, 4 * model.hidden_size) * 4
        - 256 * model.vocab_size * 4
        - runtime
    )
    try:
        budget = MemoryBudget.compute(model, build, cache, gpu_memory_bytes=memory, runtime_bytes=runtime)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    per_token = model.kv_bytes_per_token(kv_dtype, tensor_parallel)
    affordable = 0 if free < 0 else int(free * fraction) // per_token
    if max_tokens is not None:
        affordable = min(affordable, max_tokens)
    if paged:
        affordable -= affordable % (1 << order)
        fits = affordable >> order >= -(-max_seq_len // (1 << order))
    else:
        fits = affordable >= max_seq_len
    if message:
        assert not fits
        assert "exceed" in message if free < 0 else "is smaller than one sequence of max_seq_len" in message
        return
    assert fits
    assert budget.num_tokens == affordable
    assert budget.headroom_bytes == free - affordable * per_token >= 0
    longest = budget.sequences_at_max_seq_len
    assert longest == budget.sequences_at(max_seq_len) >= 1
    tokens_each = -(-max_seq_len // (1 << order)) * (1 << order) if paged else max_seq_len
    assert longest * tokens_each <= affordable < (longest + 1) * tokens_each
    assert budget.sequences_at(1) >= longest
    if not paged:
        assert budget.sequences_at(1) == longest


def test_num_blocks_needs_no_gpu() -> None:
    model = ModelSpec.preset("llama-2-7b")
    budget = MemoryBudget.compute(model, BuildConfig(), CacheConfig(num_blocks=800, max_tokens=1))
    assert (budget.num_blocks, budget.num_tokens, budget.headroom_bytes) == (800, 51_200, None)
    assert budget.pool_bytes == 800 * budget.block_bytes
    assert "headroom" not in str(budget)
    assert (
        MemoryBudget.compute(
            model, BuildConfig(), CacheConfig(num_blocks=10_000), gpu_memory_bytes=80 * GIB
        ).headroom_bytes
        < 0
    )


def test_per_token_scales_are_part_of_the_block() -> None:
    model = ModelSpec.preset("llama-3-8b")
    plain, scaled = (
        MemoryBudget.compute(
            model,
            BuildConfig(),
            CacheConfig(num_blocks=100, kv_dtype="int8", kv_scales=scales, tensor_parallel_size=2),
        )
        for scales in ("tensor", "token")
    )
    assert plain.block_bytes == 64 * 32 * 2 * 4 * 128
    assert scaled.block_bytes - plain.block_bytes == 64 * 32 * 2 * 4 * 4


def test_paging_holds_four_times_the_sequences_of_the_seed_example() -> None:
    model = ModelSpec.preset("llama-2-7b")
    paged, contiguous = (
        MemoryBudget.compute(model, BuildConfig(enable_paged_kv_cache=on), CacheConfig(num_blocks=3200))
        for on in (True, False)
    )
    assert contiguous.sequences_at(512) == 100
    assert paged.sequences_at(512) == 400


def test_budget_errors_say_the_numbers() -> None:
    model, build = ModelSpec.preset("llama-2-7b"), BuildConfig()
    with pytest.raises(
        ValueError, match=r"weights \(12\.55 GiB\) of llama-2-7b exceed the GPU's memory \(8\.00 GiB\)"
    ):
        MemoryBudget.compute(model, build, CacheConfig(), gpu_memory_bytes=8 * GIB)
    with pytest.raises(
        ValueError, match=r"weights \(12\.55 GiB\) and reserve \(1\.53 GiB\) of llama-2-7b exceed"
    ):
        MemoryBudget.compute(model, build, CacheConfig(), gpu_memory_bytes=14 * GIB)
    with pytest.raises(
        ValueError,
        match="pool of 12 blocks of 64 tokens is smaller than one sequence of max_seq_len 2048, which needs 32",
    ):
        MemoryBudget.compute(model, build, CacheConfig(num_blocks=12))
    with pytest.raises(
        ValueError, match="pool of 1000 tokens is smaller than one sequence of max_seq_len 2048"
    ):
        MemoryBudget.compute(
            model,
            BuildConfig(enable_paged_kv_cache=False),
            CacheConfig(max_tokens=1000),
            gpu_memory_bytes=80 * GIB,
        )
    with pytest.raises(ValueError, match=r"gpu_memory_bytes \(None\) must be given, or num_blocks"):
        MemoryBudget.compute(model, build, CacheConfig())
    budget = MemoryBudget.compute(model, build, CacheConfig(num_blocks=32))
    with pytest.raises(ValueError, match=r"mean_length \(4096\) must lie in \(0, max_seq_len 2048\]"):
        budget.sequences_at(4096)


def test_budget_reads_like_a_table() -> None:
    model = ModelSpec.preset("llama-2-7b")
    budget = MemoryBudget.compute(model, BuildConfig(), CacheConfig(num_blocks=800))
    lines = str(budget).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "blocks of 64 tokens" in lines[4]
    assert lines[4].split()[-1] == "800"
    assert ("sequences of 512 tokens", "100") in budget.rows(512)
