"""GPUSpec: presets, derived figures, refused values."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sim.hardware import GPU_PRESETS, GPUSpec

GIB = 2**30


def test_presets_are_the_published_boards() -> None:
    figures = {name: (gpu.tflops, gpu.bandwidth_tb_s, gpu.mfu, gpu.mbu) for name, gpu in GPU_PRESETS.items()}
    assert figures == {
        "a100-80gb": (312.0, 2.039, 0.64, 0.84),
        "h100-80gb": (989.0, 3.35, 0.62, 0.90),
        "h200": (989.0, 4.8, 0.62, 0.90),
        "a40": (149.7, 0.696, 0.68, 0.68),
    }
    assert all(gpu.gpu_name == name for name, gpu in GPU_PRESETS.items())


def test_memory_is_what_the_driver_reports() -> None:
    reported_mib = {"a100-80gb": 81920, "h100-80gb": 81559, "h200": 143771, "a40": 46068}
    for name, mib in reported_mib.items():
        assert GPU_PRESETS[name].memory_bytes == pytest.approx(mib * 2**20, rel=1e-3)


def test_reached_rates_are_peak_times_share() -> None:
    gpu = GPUSpec("x", tflops=100.0, bandwidth_tb_s=2.0, memory_gib=1.5, mfu=0.5, mbu=0.25, link_gb_s=10.0)
    assert gpu.flops_per_s == 50e12
    assert gpu.bytes_per_s == 0.5e12
    assert gpu.memory_bytes == 3 * GIB // 2


def test_transfer_time_is_bytes_over_the_links_reached_rate() -> None:
    gpu = GPUSpec.preset("a100-80gb")
    # 32 GB/s at 0.8: 25.6 bytes a nanosecond
    assert gpu.transfer_ps(25_600) == 1_000_000
    assert gpu.transfer_ps(0) == 0
    assert GPUSpec.preset("h200").transfer_ps(51_200) == 1_000_000


def test_preset_names_ignore_case_and_suggest_the_nearest() -> None:
    assert GPUSpec.preset("H200") is GPU_PRESETS["h200"]
    with pytest.raises(
        ValueError, match=r"^unknown GPU 'h100' \(did you mean h100-80gb\?\): must be one of a100"
    ):
        GPUSpec.preset("h100")
    with pytest.raises(ValueError, match=r"^unknown GPU 'zzz': must be one of"):
        GPUSpec.preset("zzz")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tflops", 0.0, r"^tflops \(0.0\) must be in \[0.1, 1e\+06\]$"),
        ("tflops", 1e-300, r"^tflops \(1e-300\) must be in \[0.1, 1e\+06\]$"),
        ("tflops", math.nan, r"^tflops \(nan\) must be in "),
        ("bandwidth_tb_s", -1.0, r"^bandwidth_tb_s \(-1.0\) must be in \[0.001, 10000\]$"),
        ("bandwidth_tb_s", 1e-30, r"^bandwidth_tb_s \(1e-30\) must be in "),
        ("memory_gib", math.inf, r"^memory_gib \(inf\) must be in "),
        ("memory_gib", 1e300, r"^memory_gib \(1e\+300\) must be in "),
        ("link_gb_s", 0, r"^link_gb_s \(0\) must be in \[0.001, 1e\+06\]$"),
        ("mfu", 1.01, r"^mfu \(1.01\) must be in \[0.01, 1\]$"),
        ("mfu", 1e-308, r"^mfu \(1e-308\) must be in "),
        ("mbu", 0.0, r"^mbu \(0.0\) must be in \[0.01, 1\]$"),
        ("link_efficiency", math.nan, r"^link_efficiency \(nan\) must be in \[0.01, 1\]$"),
        ("layer_overhead_us", -0.1, r"^layer_overhead_us \(-0.1\) must be in \[0, 1e\+06\]$"),
        ("layer_overhead_us", 1e300, r"^layer_overhead_us \(1e\+300\) must be in "),
        ("layer_overhead_us", math.nan, r"^layer_overhead_us \(nan\) must be in "),
    ],
)
def test_impossible_figures_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GPU_PRESETS["a40"], **{field: value})
