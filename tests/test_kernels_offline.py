"""Any architecture compiles on a machine without a GPU, and the report says what each kernel uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import offline, report
from kernels.compile import compile_offline


def nvrtc_missing() -> str:
    try:
        offline.check_arch("sm_90")
    except RuntimeError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing() or "NVRTC is there")

OFFLINE = """
#include <cuda_fp16.h>
extern "C" __global__ void tidy(float* x) {
    __shared__ float tile[256];
    tile[threadIdx.x] = __half2float(__float2half(x[threadIdx.x]));
    __syncthreads();
    x[threadIdx.x] = tile[255 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(const float* x, float* y) {
    float held[96];
#pragma unroll
    for (int i = 0; i < 96; i++) held[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; i++) y[i * 1024 + threadIdx.x] = held[95 - i] * held[i] + N;
}
"""


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100"])
def test_any_architecture_compiles_without_a_gpu(arch: str) -> None:
    found = compile_offline(OFFLINE, arch, constants={"N": 3}, name="offline.cu")
    assert found.arch == arch
    assert found.cubin[:4] == b"\x7fELF"
    assert found.kernels.keys() == {"tidy", "crowded"}
    tidy, crowded = found.kernels["tidy"], found.kernels["crowded"]
    assert (tidy.spill_bytes, tidy.stack_bytes, tidy.barriers) == (0, 0, 1)
    assert 1024 <= tidy.shared_bytes <= 2048 + 1024  # from sm_90 on, 1 KiB a block is the system's
    assert 4 <= tidy.registers <= 32
    # 2 blocks of 1,024 threads leave 32 registers a thread of the 65,536: 96 values do not fit.
    assert crowded.registers <= 32
    assert crowded.spill_bytes >= 4 * (96 - 32)
    again = compile_offline(OFFLINE, arch, constants={"N": 3}, name="offline.cu")
    assert again == found


@needs_nvrtc
def test_offline_errors_are_clear() -> None:
    with pytest.raises(ValueError, match=r"^arch \(sm_12\) must be one of .*sm_80.*sm_90"):
        compile_offline(OFFLINE, "sm_12")
    with pytest.raises(ValueError, match=r"^arch \(ninety\) must be one of"):
        compile_offline(OFFLINE, "ninety")
    with pytest.raises(
        ValueError, match=r'^off.cu does not compile:\noff.cu\(\d+\): error: identifier "N" is undefined'
    ):
        compile_offline(OFFLINE, "sm_90", name="off.cu")


def test_resources_are_read_from_what_ptxas_prints() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode' for 'sm_90'
ptxas info    : Function properties for decode
ptxas         .     400 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 34 registers, used 2 barriers, 400 bytes cumulative stack size, 12544 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 25.036 ms
ptxas info    : Compiling entry function 'merge' for 'sm_90'
ptxas info    : Function properties for merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert offline.parse_resources(log) == {
        "decode": offline.Resources(
            registers=34, spill_bytes=40, stack_bytes=400, shared_bytes=12544, barriers=2
        ),
        "merge": offline.Resources(registers=12, spill_bytes=0, stack_bytes=0, shared_bytes=0, barriers=0),
    }


@needs_nvrtc
def test_the_command_lists_what_each_kernel_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "offline.cu").write_text(OFFLINE)
    monkeypatch.setattr(report, "CUDA_DIR", tmp_path)
    monkeypatch.setattr(report, "available_cores", lambda: 1)
    monkeypatch.setattr(
        report, "specialisations", lambda: [("offline.cu", {"N": 3}), ("offline.cu", {"N": 4})]
    )
    assert report.main(["--arch", "sm_80", "sm_90"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "constants", "arch", "registers", "spills", "B", "shared", "B"]
    assert [tuple(line.split()[:3]) for line in lines[1:-1]] == [
        (kernel, f"N={n}", arch)
        for n in (3, 4)
        for arch in ("sm_80", "sm_90")
        for kernel in ("crowded", "tidy")
    ]
    assert lines[-1] == "8 kernels compiled for sm_80, sm_90: 4 with spills"
    assert report.main(["--arch", "sm_1"]) == 2
    assert capsys.readouterr().err.startswith("error: arch (sm_1) must be one of")
    assert report.main(["no.cu", "--arch", "sm_80"]) == 2
    assert capsys.readouterr().err == "error: file (no.cu) must be one of offline.cu\n"
