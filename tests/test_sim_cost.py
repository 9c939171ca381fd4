"""RooflineCost against the formula computed apart, its exact affinity, and published figures."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.model import ModelSpec
from sim.cost import RooflineCost, StepBatch, causal_scores
from sim.hardware import GPU_PRESETS, GPUSpec

MODELS = ["llama-2-7b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b", "opt-13b", "mixtral-8x7b", "mistral-7b"]

models = st.sampled_from(MODELS).map(ModelSpec.preset)
gpus = st.sampled_from(sorted(GPU_PRESETS)).map(GPUSpec.preset)
tensor_parallel = st.sampled_from([1, 2, 4])


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, int]:
    """A prefill chunk: (new tokens, keys of the last)."""
    new = draw(st.integers(1, 8192))
    return new, new + draw(st.integers(0, 100_000))


@st.composite
def batches(draw: st.DrawFn) -> StepBatch:
    sequences = draw(st.integers(0, 256))
    context = draw(st.integers(sequences, sequences * 100_000)) if sequences else 0
    prefills = draw(st.lists(chunks(), max_size=4))
    counted = draw(st.booleans())  # else the cost has to bound the keys in windows itself
    return StepBatch(sequences, context, prefills, window_keys=(min(context, 4096),) if counted else ())


def seconds(model: ModelSpec, gpu: GPUSpec, shares: int, batch: StepBatch) -> float:
    """The formula once more, in seconds, layer by layer and query by query."""
    compute = gpu.tflops * 1e12 * gpu.mfu
    memory = gpu.bandwidth_tb_s * 1e12 * gpu.mbu
    n = batch.decode_sequences + sum(new for new, _ in batch.prefills)
    if n == 0:
        return 0.0
    kv_heads = max(1, model.num_kv_heads / shares)
    weights = model.num_parameters * 2
    if model.num_experts:
        expert = (model.num_parameters - model.active_parameters) / (
            model.num_experts - model.experts_per_token
        )
        touched = model.num_experts * (1 - (1 - model.experts_per_token / model.num_experts) ** n)
        weights = 2 * (model.active_parameters + (touched - model.experts_per_token) * expert)
    mlp = 3 * model.intermediate_size * max(1, model.experts_per_token) / shares
    heads = 2 * model.num_heads * model.head_dim / shares + 2 * kv_heads * model.head_dim
    activations = n * 2 * (4 * model.hidden_size + heads + mlp)
    flops = 2 * model.active_parameters / model.num_layers * n / shares
    linear = max(flops / compute, (weights / model.num_layers / shares + activations) / memory)
    score_s = 4 * model.num_heads * model.head_dim / shares / compute
    key_s = 2 * kv_heads * model.head_dim * 2 / memory
    total = 0.0
    for window in model.windows:
        total += linear + gpu.layer_overhead_us * 1e-6
        context = batch.decode_context
        if window is not None:
            context = min(context, window * batch.decode_sequences)
            if batch.window_keys:
                (context,) = batch.window_keys
        total += max(context * score_s, context * key_s)
        for new, last in batch.prefills:
            lengths = range(last - new + 1, last + 1)
            seen = [length if window is None else min(length, window) for length in (lengths[0], lengths[-1])]
            if window is None:
                pairs = new * sum(seen) / 2
                keys = last
            else:
                pairs = sum(min(length, window) for length in lengths)
                keys = min(last, window + new - 1)
            total += max(pairs * score_s, keys * key_s)
    return total


@given(models, gpus, tensor_parallel, batches())
def test_step_is_the_formula(model: ModelSpec, gpu: GPUSpec, shares: int, batch: StepBatch) -> None:
    """But for what is rounded to picoseconds: a key's time, a chunk's, a layer's overhead, and everything else's."""
    expected = seconds(model, gpu, shares, batch) * 1e12
    rounded = (
        batch.decode_context * len(set(model.windows)) + len(batch.prefills) + model.num_layers + 1
    ) / 2
    found = RooflineCost(model, gpu, shares).step(batch)
    assert found == pytest.approx(expected, rel=1e-12, abs=rounded)


@given(models, gpus, tensor_parallel, st.integers(1, 4096), st.integers(0, 10**8), st.integers(0, 10**6))
def test_decode_steps_are_affine_exactly(
    model: ModelSpec, gpu: GPUSpec, shares: int, sequences: int, context: int, inside: int
) -> None:
    cost = RooflineCost(model, gpu, shares)
    base, slope = cost.decode_affine(sequences)
    assert isinstance(base, int)
    assert isinstance(slope, int)
    assert cost.windows == ((4096,) if model.name == "mistral-7b" else ())
    keys = (inside,) * len(cost.windows)
    duration = cost.step(StepBatch(sequences, context, window_keys=keys))
    assert isinstance(duration, int)
    assert duration == base + slope * context + sum(each * inside for each in cost.window_slopes)


@given(models, gpus, batches(), st.integers(0, 10_000), chunks())
def test_more_work_never_takes_less(
    model: ModelSpec, gpu: GPUSpec, batch: StepBatch, more: int, chunk: tuple[int, int]
) -> None:
    cost = RooflineCost(model, gpu)
    sequences, context, prefills = batch.decode_sequences, batch.decode_context, batch.prefills
    before = cost.step(StepBatch(sequences, context, prefills))
    if sequences:
        assert cost.step(StepBatch(sequences, context + more, prefills)) >= before
    assert cost.step(StepBatch(sequences + 1, context + 1 + more, prefills)) >= before
    assert cost.step(StepBatch(sequences, context, [*prefills, chunk])) > before


@given(st.integers(1, 60), st.integers(0, 80), st.one_of(st.none(), st.integers(1, 100)))
def test_causal_scores_count_every_query(new: int, cached: int, window: int | None) -> None:
    context = cached + new
    seen = [
        range(max(0, last - window) if window else 0, last)  # the keys of the query at position last − 1
        for last in range(cached + 1, context + 1)
    ]
    pairs, keys = causal_scores(new, context, window)
    assert pairs == sum(len(keys_of_one) for keys_of_one in seen)
    assert keys == len(set().union(*seen))


def test_a_prompt_in_chunks_computes_the_same_scores() -> None:
    whole, _ = causal_scores(1000, 1000)
    parts = [causal_scores(new, last)[0] for new, last in ((300, 300), (300, 600), (400, 1000))]
    assert sum(parts) == whole == 1000 * 1001 // 2


@pytest.mark.parametrize(("new", "context"), [(0, 5), (6, 5), (-1, 5)])
def test_impossible_chunks_are_refused(new: int, context: int) -> None:
    with pytest.raises(ValueError, match=rf"^new_tokens \({new}\) must be in 1..context \(5\)$"):
        RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a40")).step(
            StepBatch(0, 0, [(new, context)])
        )


def test_a_step_without_tokens_costs_nothing() -> None:
    cost = RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb"))
    assert cost.step(StepBatch(0, 0)) == 0
    assert cost.decode_affine(0) == (0, cost.decode_affine(1)[1])


def test_one_decode_is_the_time_to_read_the_weights() -> None:
    """Llama-2-7B in 16 bits on an A100-80GB: 13.5 GB at 1.71 TB/s are 7.9 ms, and 60 µs a layer."""
    cost = RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb"))
    duration_s = cost.step(StepBatch(1, 1)) / 1e12
    assert duration_s - 32 * 60e-6 == pytest.approx(13.48e9 / (2.039e12 * 0.84), rel=0.005)


def test_a_long_prompt_is_bound_by_compute() -> None:
    """2 · 6.74e9 flops a token at 200 TFLOP/s are 0.55 s for 8,192 tokens, and attention a part of that."""
    cost = RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb"))
    linear = 2 * 6.738e9 * 8192 / (312e12 * 0.64)
    attention = 4 * 32 * 4096 * 8192 * 8193 / 2 / (312e12 * 0.64)
    assert cost.step(StepBatch(0, 0, [(8192, 8192)])) / 1e12 == pytest.approx(
        linear + attention + 0.00192, rel=1e-3
    )


def test_a_batch_shares_the_weights() -> None:
    cost = RooflineCost(ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb"))
    one, many = cost.step(StepBatch(1, 500)), cost.step(StepBatch(64, 64 * 500))
    assert many < 3 * one


def test_the_published_linear_model_of_opt_13b_is_near() -> None:
    """DistServe's fit for OPT-13B on an A100: decode 23.48 + 5.93e-4 · tokens + 0.0607 · batch milliseconds."""
    cost = RooflineCost(ModelSpec.preset("opt-13b"), GPUSpec.preset("a100-80gb"))
    for batch, context in ((1, 500), (16, 8_000), (64, 32_000)):
        published = 23.48 + 5.93e-4 * context + 0.0607 * batch
        assert cost.step(StepBatch(batch, context)) / 1e9 == pytest.approx(published, rel=0.35)


def test_a_mixture_computes_with_two_experts_and_reads_what_it_touches() -> None:
    model, gpu = ModelSpec.preset("mixtral-8x7b"), GPUSpec.preset("a100-80gb")
    cost = RooflineCost(model, gpu)
    overhead = 32 * 60e-6
    one = cost.step(StepBatch(1, 0)) / 1e12 - overhead
    assert one == pytest.approx(2 * model.active_parameters / (2.039e12 * 0.84), rel=0.002)
    many = cost.step(StepBatch(100, 0)) / 1e12 - overhead  # 1 − 0.75^100: every expert
    assert many == pytest.approx(2 * model.num_parameters / (2.039e12 * 0.84), rel=0.01)
    prefill = cost.step(StepBatch(0, 0, [(8192, 8192)])) / 1e12
    assert prefill == pytest.approx(seconds(model, gpu, 1, StepBatch(0, 0, [(8192, 8192)])), rel=1e-6)


def test_the_cache_type_changes_attention_only() -> None:
    model, gpu = ModelSpec.preset("llama-2-7b"), GPUSpec.preset("a100-80gb")
    full, half = RooflineCost(model, gpu), RooflineCost(model, gpu, kv_bytes_per_token=262_144)
    full_base, full_slope = full.decode_affine(8)
    half_base, half_slope = half.decode_affine(8)
    assert half_base == full_base
    assert half_slope == pytest.approx(full_slope / 2, abs=1)


def test_windows_bound_attention() -> None:
    gpu = GPUSpec.preset("h100-80gb")
    windowed = ModelSpec.preset("mistral-7b")
    open_ended = dataclasses.replace(windowed, layer_windows=())
    cost, unbounded = RooflineCost(windowed, gpu), RooflineCost(open_ended, gpu)
    for context in (1, 4_096):  # of each of four sequences
        assert cost.step(StepBatch(4, 4 * context)) == unbounded.step(StepBatch(4, 4 * context))
    at_window = cost.step(StepBatch(4, 4 * 4096))
    assert cost.step(StepBatch(4, 4 * 50_000)) == at_window < unbounded.step(StepBatch(4, 4 * 50_000))
    # One beyond the window and three at its half, counted one by one, are less than the bound of their sum.
    one_by_one = cost.step(StepBatch(4, 50_000 + 3 * 2048, window_keys=(4096 + 3 * 2048,)))
    assert one_by_one == unbounded.step(StepBatch(4, 4096 + 3 * 2048)) < at_window


def test_layers_of_two_kinds_look_back_by_their_own() -> None:
    """Every other of 32 layers with a window: what is beyond costs half of what it does without."""
    gpu, model = GPUSpec.preset("h100-80gb"), ModelSpec.preset("mistral-7b")
    mixed = dataclasses.replace(model, layer_windows=(512, None) * 16)
    unbounded = RooflineCost(dataclasses.replace(model, layer_windows=()), gpu)
    cost = RooflineCost(mixed, gpu)
    assert cost.windows == (512,)
    base, slope = cost.decode_affine(1)
    assert unbounded.decode_affine(1) == (base, pytest.approx(2 * slope, abs=1))  # each is rounded
    assert cost.window_slopes == (slope,)
    assert cost.step(StepBatch(1, 10_512, window_keys=(512,))) == base + slope * (10_512 + 512)


def test_latent_attention_reads_one_vector_a_token() -> None:
    base = ModelSpec.preset("llama-2-7b")
    latent = dataclasses.replace(base, kv_lora_rank=512, qk_rope_head_dim=64)
    gpu = GPUSpec.preset("h200")
    _, slope = RooflineCost(latent, gpu).decode_affine(1)
    compute = 32 * 2 * 32 * (512 + 64 + 512) / gpu.flops_per_s
    memory = 32 * 2 * (512 + 64) / gpu.bytes_per_s
    assert slope / 1e12 == pytest.approx(max(compute, memory), rel=1e-3)


def test_tensor_parallelism_divides_weights_and_refuses_odd_shares() -> None:
    model, gpu = ModelSpec.preset("llama-3-70b"), GPUSpec.preset("h100-80gb")
    overhead = 80 * 60_000_000
    alone = RooflineCost(model, gpu).step(StepBatch(1, 0)) - overhead
    eighth = RooflineCost(model, gpu, 8).step(StepBatch(1, 0)) - overhead
    assert eighth == pytest.approx(alone / 8, rel=0.001)
    with pytest.raises(ValueError, match=r"tensor_parallel_size \(3\) must divide"):
        RooflineCost(model, gpu, 3)
    with pytest.raises(ValueError, match=r"^kv_bytes_per_token \(0\) must be at least 1$"):
        RooflineCost(model, gpu, kv_bytes_per_token=0)
