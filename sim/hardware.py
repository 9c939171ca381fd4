"""GPUSpec: the figures of a GPU that time and memory are computed from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from allocator.field_docs import with_field_docs

GIB = 2**30

PCIE_4_GB_S = 32.0
PCIE_5_GB_S = 64.0

_BOUNDS = {
    "tflops": (0.1, 1e6),
    "bandwidth_tb_s": (1e-3, 1e4),
    "memory_gib": (1 / 1024, 1e6),
    "link_gb_s": (1e-3, 1e6),
    "mfu": (0.01, 1.0),
    "mbu": (0.01, 1.0),
    "link_efficiency": (0.01, 1.0),
    "layer_overhead_us": (0.0, 1e6),
}
"""Least and most of each figure: three orders of magnitude beyond any device, so that times stay within the clock."""


@with_field_docs
@dataclass(frozen=True)
class GPUSpec:
    """Describe one GPU by what it could do at best and the share of it that kernels reach.

    `mfu` and `mbu` scale `tflops` and `bandwidth_tb_s` down to what kernels achieve; `layer_overhead_us` is what
    a layer costs beyond that (launches, norms, and whatever else the roofline does not see). Raises ValueError for
    a figure that no device has.
    """

    gpu_name: str
    tflops: float
    """Peak dense 16-bit tensor-core compute, TFLOP/s."""
    bandwidth_tb_s: float
    """Peak memory bandwidth, TB/s (10^12 bytes)."""
    memory_gib: float
    """Memory, GiB."""
    mfu: float
    """Share of `tflops` that matrix multiplications reach."""
    mbu: float
    """Share of `bandwidth_tb_s` that kernels reach."""
    link_gb_s: float
    """Peak bandwidth of the link to the host, one way, GB/s (10^9 bytes)."""
    link_efficiency: float = 0.8
    """Share of `link_gb_s` that transfers reach."""
    layer_overhead_us: float = 60.0
    """Time a layer takes beyond its roofline, microseconds."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN neither
                raise ValueError(f"{name} ({value}) must be in [{low:g}, {high:g}]")

    @classmethod
    def preset(cls, name: str) -> GPUSpec:
        """Return the preset called `name`, e.g. "a100-80gb". Raises ValueError for an unknown name."""
        found = GPU_PRESETS.get(name.lower())
        if found is None:
            begun = [known for known in GPU_PRESETS if name and known.startswith(name.lower())]
            close = begun or difflib.get_close_matches(name.lower(), GPU_PRESETS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"unknown GPU {name!r}{hint}: must be one of {', '.join(GPU_PRESETS)}")
        return found

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations a second that kernels reach."""
        return self.tflops * 1e12 * self.mfu

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second that kernels move to and from memory."""
        return self.bandwidth_tb_s * 1e12 * self.mbu

    def transfer_ps(self, num_bytes: int) -> int:
        """Return the picoseconds that moving `num_bytes` over the link to the host takes, latency not counted."""
        return round(num_bytes * 1e3 / (self.link_gb_s * self.link_efficiency))


GPU_PRESETS: dict[str, GPUSpec] = {
    spec.gpu_name: spec
    for spec in (
        GPUSpec("a100-80gb", 312.0, 2.039, 80.0, mfu=0.64, mbu=0.84, link_gb_s=PCIE_4_GB_S),
        GPUSpec("h100-80gb", 989.0, 3.35, 79.6, mfu=0.62, mbu=0.90, link_gb_s=PCIE_5_GB_S),
        GPUSpec("h200", 989.0, 4.8, 140.4, mfu=0.62, mbu=0.90, link_gb_s=PCIE_5_GB_S),
        GPUSpec("a40", 149.7, 0.696, 45.0, mfu=0.68, mbu=0.68, link_gb_s=PCIE_4_GB_S),
    )
}
"""The SXM boards (and the A40, which is PCIe only) by name.

Peaks are NVIDIA's data sheet figures for dense bf16; memory is what nvidia-smi reports (81920, 81559, 143771 and,
with ECC, 46068 MiB, rounded). mfu, mbu and the overhead of a layer are fitted to published profiles of
transformer layers: mean error 4-7%, 90th percentile 10-17%; the H200 takes the H100's shares. The link is PCIe
4.0 or 5.0 x16 in one direction.
"""
