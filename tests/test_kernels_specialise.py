"""Which specialisations there are, and what the machine code of some looks like."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from kernels import specialise
from kernels.compile import CUDA_DIR, compile_offline
from kernels.layout import DTYPES, HEAD_DIMS

ALL = specialise.specialisations()


def test_every_kernel_dtype_and_head_dim_once() -> None:
    keys = [(file, tuple(constants.items())) for file, constants in ALL]
    assert len(set(keys)) == len(keys)
    assert {file for file, _ in ALL} == {path.name for path in CUDA_DIR.glob("*.cu")}
    for file in {file for file, _ in ALL} - {"copy_blocks.cu", "swap_blocks.cu"}:
        found = {(constants["T"], constants["HEAD_DIM"]) for name, constants in ALL if name == file}
        assert len(found) == len(DTYPES) * len(HEAD_DIMS), file


def test_a_group_takes_the_smallest_tile_of_the_fewest_blocks() -> None:
    for group in range(1, 130):
        constants = specialise.paged_attention("bfloat16", 128, group)
        assert ("paged_attention.cu", constants) in ALL
        rows = int(constants["ROWS"])
        blocks = -(-group // rows)
        assert blocks == -(
            -group // specialise.HEAD_TILES[-1]
        )  # one up to the largest tile: each byte read once
        assert all(-(-group // tile) > blocks for tile in specialise.HEAD_TILES if tile < rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_stay_within_their_budgets(dtype: str, head_dim: int) -> None:
    itemsize = 4 if dtype == "float32" else 2
    for constants in (
        specialise.paged_attention(dtype, head_dim, 4),
        specialise.paged_prefill(dtype, head_dim),
    ):
        assert int(constants["KV_TILE"]) * head_dim * itemsize <= specialise.TILE_BYTES
    assert (
        int(specialise.paged_prefill(dtype, head_dim)["ROWS"]) * head_dim * itemsize <= specialise.QUERY_BYTES
    )


@functools.cache
def disassembler() -> str | None:
    """Return the path of nvdisasm: the toolkit's, or the wheel's."""
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    return shutil.which("nvdisasm") or next((str(path) for path in site.glob("*/bin/nvdisasm")), None)


def machine_code(file: str, constants: dict[str, Any], folder: Path) -> list[str]:
    """Return the instructions that `file` becomes on sm_90, or skip where the tools are missing."""
    pytest.importorskip("cupy", reason="offline compilation needs CuPy and NVRTC")
    tool = disassembler()
    if tool is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    try:
        report = compile_offline(
            (CUDA_DIR / file).read_text(), "sm_90", constants=constants, name=file, include_dirs=[CUDA_DIR]
        )
    except RuntimeError as error:
        pytest.skip(str(error))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(report.cubin)
    listing = subprocess.run([tool, str(cubin)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]+)", listing, re.MULTILINE)


@pytest.mark.parametrize(
    ("file", "constants"),
    [
        ("paged_attention.cu", specialise.paged_attention("float16", 128, 1)),
        ("paged_attention.cu", specialise.paged_attention("bfloat16", 80, 8)),
        ("paged_prefill.cu", specialise.paged_prefill("bfloat16", 128)),
        ("write_kv.cu", specialise.write_kv("float16", 128)),
        ("gather_kv.cu", specialise.gather_kv("float32", 64)),
        ("copy_blocks.cu", specialise.copy_blocks()),
        ("swap_blocks.cu", specialise.swap_blocks()),
    ],
)
def test_the_pool_is_moved_16_bytes_at_a_time(file: str, constants: dict[str, Any], tmp_path: Path) -> None:
    code = machine_code(file, constants, tmp_path)
    assert sum(name.startswith("LDG") and ".128" in name for name in code) >= 1
    assert sum(name.startswith("STG") and ".128" in name for name in code) >= 1
    assert not [name for name in code if name.startswith(("LDL", "STL"))], "local memory"
    if file.startswith("paged"):
        # key and value of a tile, all in flight at once
        vectors = int(constants["KV_TILE"]) * int(constants["HEAD_DIM"]) * 2 // 16
        loads = -(-vectors // int(constants["THREADS"]))
        assert sum("LDG.E.NA.128.CONSTANT" in name for name in code) == 2 * loads
