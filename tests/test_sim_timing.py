"""Published and calibrated models of time, and how a run names one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import BuildConfig, CacheConfig, MemoryBudget
from allocator.model import ModelSpec
from sim.calibration import CalibratedCost, Calibration
from sim.cost import RooflineCost, StepBatch
from sim.hardware import GPUSpec
from sim.published import DistServeCost, DynamoCost
from sim.timing import Setting, TimingConfig

MODEL, GPU = ModelSpec.preset("llama-3-8b"), GPUSpec.preset("h100-80gb")
FIT = Calibration(
    "a card",
    "12.4",
    "2026-01-01",
    "bfloat16",
    32,
    8,
    128,
    64,
    decode_base_us=5.0,
    decode_sequence_us=0.1,
    decode_key_us=0.002,
    prefill_base_us=10.0,
    prefill_pair_us=1e-5,
    prefill_key_us=0.003,
    decode_error=0.02,
    prefill_error=0.03,
)


def setting(num_blocks: int = 1000) -> Setting:
    build = BuildConfig(tokens_per_block=16)
    budget = MemoryBudget.compute(
        MODEL, build, CacheConfig(num_blocks=num_blocks), gpu_memory_bytes=GPU.memory_bytes
    )
    return Setting(MODEL, GPU, build, budget, 1)


def test_distserve_is_its_formula() -> None:
    cost = DistServeCost()
    assert cost.step(StepBatch(0, 0)) == 0
    assert cost.step(StepBatch(10, 5000)) / 1e9 == pytest.approx(23.48 + 5.93e-4 * 5000 + 0.0607 * 10)
    two = cost.step(StepBatch(0, 0, [(300, 300), (500, 500)])) / 1e9
    assert two == pytest.approx(22.05 + 0.1405 * 800 + 8.08e-6 * (300**2 + 500**2))
    both = cost.step(StepBatch(10, 5000, [(300, 300)]))
    assert both == cost.step(StepBatch(10, 5000)) + cost.step(StepBatch(0, 0, [(300, 300)]))


def test_the_chunks_of_a_prompt_cost_distserve_the_prompt_and_a_base_each() -> None:
    cost = DistServeCost()
    whole = cost.step(StepBatch(0, 0, [(1000, 1000)]))
    parts = [cost.step(StepBatch(0, 0, [chunk])) for chunk in ((400, 400), (600, 1000))]
    assert sum(parts) == whole + DistServeCost.PREFILL_BASE_PS


@given(st.integers(1, 94), st.integers(1, 10**6))
def test_distserve_decodes_affinely(sequences: int, context: int) -> None:
    base, slope = DistServeCost().decode_affine(sequences)
    assert DistServeCost().step(StepBatch(sequences, context)) == base + slope * context


def test_dynamo_is_its_formula() -> None:
    cost = DynamoCost(100_000)
    assert cost.step(StepBatch(0, 0)) == 0
    assert cost.decode_affine(3) is None
    share = 0.25
    expected = -25.74 * share**2 + 54.01 * share + 5.74
    assert cost.step(StepBatch(8, 25_000)) / 1e9 == pytest.approx(expected)
    assert cost.step(StepBatch(8, 300_000)) == cost.step(StepBatch(8, 100_000))  # shared blocks count once
    prefill = cost.step(StepBatch(0, 0, [(1000, 5000), (24, 24)])) / 1e9
    assert prefill == pytest.approx(4.21e-7 * 1024**2 + 0.01518 * 1024 + 16.5)
    with pytest.raises(ValueError, match=r"^pool_tokens \(0\) must be at least 1$"):
        DynamoCost(0)


def test_a_calibration_replaces_the_attention_term_only() -> None:
    roofline, calibrated = RooflineCost(MODEL, GPU), CalibratedCost(MODEL, GPU, FIT)
    linear = roofline.step(StepBatch(16, 0))
    decode = 32 * (5.0 + 0.1 * 16 + 0.002 * 40_000) * 1e6
    assert calibrated.step(StepBatch(16, 40_000)) == pytest.approx(linear + decode, rel=1e-9)
    chunk = StepBatch(0, 0, [(100, 400)])
    pairs = sum(range(301, 401))
    prefill = 32 * (10.0 + 1e-5 * pairs + 0.003 * 400) * 1e6
    linear = RooflineCost(MODEL, GPU).step(StepBatch(100, 0))
    assert calibrated.step(chunk) == pytest.approx(linear + prefill, rel=1e-9)
    assert calibrated.step(StepBatch(0, 0)) == 0


@given(st.integers(1, 256), st.integers(1, 10**7))
def test_a_calibrated_decode_is_affine_exactly(sequences: int, context: int) -> None:
    cost = CalibratedCost(MODEL, GPU, FIT)
    affine = cost.decode_affine(sequences)
    assert cost.step(StepBatch(sequences, context)) == affine[0] + affine[1] * context


def test_a_calibration_knows_windows() -> None:
    model = ModelSpec.preset("mistral-7b")
    fit = replace(FIT, calibrated_heads=model.num_heads, calibrated_kv_heads=model.num_kv_heads)
    cost = CalibratedCost(model, GPU, fit)
    base, slope = cost.decode_affine(2)
    assert (cost.windows, slope) == ((4096,), 0)
    assert cost.step(StepBatch(2, 9000, window_keys=(5000,))) == base + 5000 * cost.window_slopes[0]
    assert cost.step(StepBatch(2, 2 * 4096)) == cost.step(StepBatch(2, 2 * 50_000))


def test_a_calibration_of_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^calibrated_heads \(32\) must be the model's 64 on one GPU$"):
        CalibratedCost(ModelSpec.preset("llama-3-70b"), GPU, FIT)
    with pytest.raises(ValueError, match=r"^calibrated_kv_heads \(8\) must be the model's 32 on one GPU$"):
        CalibratedCost(ModelSpec.preset("llama-2-7b"), GPU, FIT)


def test_a_calibration_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(FIT.document([{"us": 1.0}]))
    assert Calibration.read(path) == FIT


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "must be JSON"),
        ("[]", "must have an object `fit`"),
        (json.dumps({"fit": {}}), "lacks fit.device"),
        (
            json.dumps({"fit": asdict(FIT) | {"decode_key_us": "x"}}),
            r"fit.decode_key_us \('x'\) must be of type float",
        ),
        (
            json.dumps({"fit": asdict(FIT) | {"decode_key_us": -1.0}}),
            r"decode_key_us \(-1.0\) must be in \[0, 1e9\)",
        ),
        (
            json.dumps({"fit": asdict(FIT) | {"calibrated_heads": 0}}),
            r"calibrated_heads \(0\) must be at least 1",
        ),
    ],
)
def test_a_bad_calibration_file_is_named(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rule) as caught:
        Calibration.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        Calibration.read(tmp_path / "missing.json")


class PerToken:
    """A cost in a dozen lines: a microsecond a token."""

    def __init__(self, setting: Setting) -> None:
        self.gpu = setting.gpu

    def step(self, batch: StepBatch) -> int:
        return 10**6 * (batch.decode_sequences + sum(n for n, _ in batch.prefills))

    def decode_affine(self, decode_sequences: int) -> tuple[int, int]:
        return 10**6 * decode_sequences, 0


def test_costs_are_made_by_name() -> None:
    assert type(TimingConfig().make(setting())) is RooflineCost
    assert type(TimingConfig("distserve").make(setting())) is DistServeCost
    dynamo = TimingConfig("dynamo").make(setting(2000))
    assert dynamo.step(StepBatch(1, 32_000)) == DynamoCost(32_000).step(StepBatch(1, 32_000))
    assert isinstance(TimingConfig("roofline", FIT).make(setting()), CalibratedCost)
    own = TimingConfig(f"{__name__}:PerToken").make(setting())
    assert own.step(StepBatch(3, 5)) == 3 * 10**6


@pytest.mark.parametrize(
    ("cost", "rule"),
    [("nothing", "must be one of roofline, distserve, dynamo"), ("no_module:X", "cannot be made")],
)
def test_a_cost_that_is_none_is_named(cost: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^cost \({cost}\) {rule}"):
        TimingConfig(cost).make(setting())


def test_a_cost_must_keep_the_contract() -> None:
    with pytest.raises(ValueError, match="must have a method step"):
        TimingConfig("builtins:repr").make(setting())
    with pytest.raises(ValueError, match=r"^cost \(dynamo\) must be roofline with a calibration"):
        TimingConfig("dynamo", FIT)
