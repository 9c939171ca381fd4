"""A kernel that breaks a rule of CUDA is an error that names block, thread and line, in any order of threads."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.compile import KernelError, Module, backend_available, compile_source

pytestmark = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")

FEW = settings(max_examples=25)


@cache
def compiled(source: str) -> Module:
    return compile_source(source, backend="cpu", name="broken.cu")


def run(source: str, kernel: str, threads: int, *args: object, blocks: int = 1, **options: object) -> None:
    compiled(source).launch(kernel, (blocks, 1, 1), (threads, 1, 1), args, **options)


def broken(body: str, args: str = "float* x, int n") -> str:
    """Return a kernel `broken` whose body starts on line 2, in a source called broken.cu."""
    return f'extern "C" __global__ void broken({args}) {{\n{body}\n}}\n'


DIVERGENT = broken("    if (threadIdx.x < 40)\n        __syncthreads();")
TWO_BARRIERS = broken(
    "    if (threadIdx.x < 16) {\n        __syncthreads();\n    } else {\n        __syncthreads();\n    }"
)
EXITED_LANE = broken("    if (threadIdx.x == 0) return;\n    x[0] = __shfl_xor_sync(0xffffffffu, x[0], 1);")
LATE_EXIT = broken("    if (threadIdx.x == 31) return;\n    x[0] = __shfl_xor_sync(0xffffffffu, x[0], 1);")
NOT_NAMED = broken("    __syncwarp(0x0000ffffu);")
NO_SUCH_LANE = broken("    x[0] = __ballot_sync(0xffffffffu, 1);")
READS_OUTSIDE = broken("    if (threadIdx.x < 2)\n        x[0] = __shfl_sync(0x3u, x[0], 5);")
DIFFERENT_OPERATIONS = broken(
    "    if (threadIdx.x < 16)\n        x[0] = __ballot_sync(0xffffffffu, 1);\n    else\n        __syncwarp();"
)
DIFFERENT_MASKS = broken(
    "    if (threadIdx.x % 32 < 16)\n        __syncwarp(0x0001ffffu);\n    else\n        __syncwarp(0xffff0001u);"
)
DEADLOCK = broken(
    "    if (threadIdx.x < 16)\n        __syncthreads();\n    else {\n"
    "        __syncwarp();\n        __syncthreads();\n    }"
)
BARRIER_SPIN = broken("    do {\n        __syncthreads();\n    } while (*(volatile float*)x == 0.0f);")
ATOMIC_SPIN = broken("    while (atomicAdd(x, 0.0f) == 0.0f) {}")
PLAIN_SPIN = broken("    const volatile float* y = x;\n    while (y[0] == 0.0f) {}\n    x[1] = 1;")
BAD_WIDTH = broken("    x[0] = __shfl_sync(0xffffffffu, x[0], 0, n);")
TRAP = broken("    if (threadIdx.x == 5) __trap();")
ASSERTION = broken("    assert(threadIdx.x != 5);")
NOWHERE = broken("    if (threadIdx.x == 3)\n        x[1ll << 40] = 1;")
DIVISION = broken("    if (threadIdx.x == 3)\n        x[0] = 7 / n;")
RECURSION = """
__device__ __noinline__ float deeper(volatile float* x, int n) {
    volatile int local[64];
    local[n % 64] = n;
    return n == 0 ? x[0] : deeper(x, n - 1) + local[n % 64];
}
extern "C" __global__ void broken(float* x, int n) { x[threadIdx.x] = deeper(x, 1 << 20) + n; }
"""

# source, threads, the error's thread (None: any), its line (None: any), what it says
ERRORS = {
    "divergent barrier": (DIVERGENT, 64, 0, 3, "__syncthreads is not reached by every thread"),
    "barriers of two branches": (TWO_BARRIERS, 64, 16, 5, "is not reached by every thread.*broken.cu:3"),
    "a lane exited before": (
        EXITED_LANE,
        32,
        1,
        3,
        r"mask 0xffffffff names lane 0, but thread \(0, 0, 0\) has exited",
    ),
    "a lane exits while waited for": (LATE_EXIT, 32, 0, 3, "names lane 31, but thread .31, 0, 0. has exited"),
    "the caller is not in its mask": (NOT_NAMED, 32, 16, 2, "does not name the calling lane 16"),
    "a lane beyond the block": (
        NO_SUCH_LANE,
        20,
        0,
        2,
        "names lane 20, but the block's last warp has only 20 lanes",
    ),
    "a source outside the mask": (
        READS_OUTSIDE,
        32,
        0,
        3,
        "lane 0 reads lane 5, which mask 0x00000003 does not name",
    ),
    "different operations meet": (DIFFERENT_OPERATIONS, 32, 16, 5, "meets another operation.*broken.cu:3"),
    "different masks meet": (DIFFERENT_MASKS, 32, 16, 5, "meets another operation"),
    "deadlock": (
        DEADLOCK,
        32,
        16,
        5,
        "__syncwarp can never complete: thread .0, 0, 0. waits in __syncthreads",
    ),
    "a spin on an atomic": (
        ATOMIC_SPIN,
        40,
        None,
        2,
        "no thread of the block has got any further for 0.2 s: a loop that never ends",
    ),
    "a spin through a barrier": (
        BARRIER_SPIN,
        40,
        None,
        None,
        "the block has run for 0.6 s: a loop that never ends",
    ),
    "a spin on a volatile word": (PLAIN_SPIN, 40, None, 3, "a loop that never ends"),
    "a width that is no power of two": (BAD_WIDTH, 32, 0, 2, r"width \(3\) must be a power of two"),
    "__trap": (TRAP, 32, 5, 2, "__trap"),
    "assert": (ASSERTION, 32, 5, 2, "assertion failed: threadIdx.x != 5"),
    "no memory": (NOWHERE, 32, 3, 3, "accesses address .*, where there is no memory"),
    "division": (DIVISION, 32, 3, 3, "divides an integer by zero"),
    "stack overflow": (RECURSION, 1, 0, None, "overflows its stack of 252 KiB"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_broken_rules_are_located(case: str) -> None:
    source, threads, thread, line, message = ERRORS[case]
    module = compile_source(source, backend="cpu", name="broken.cu")
    module.spin_seconds = 0.02 if "barrier" in case else 0.2  # type: ignore[attr-defined]
    x = np.zeros(64, np.float32)
    n = 0 if case == "division" else 3
    with pytest.raises(KernelError, match=message) as caught:
        module.launch("broken", (3, 1, 1), (threads, 1, 1), [x, n])
    error = caught.value
    assert error.block is not None
    if "spin" not in case:
        assert error.block == (0, 0, 0)
    if thread is not None:
        assert error.thread == (thread, 0, 0)
    if line is not None:
        assert (error.file, error.line) == ("broken.cu", line)
        assert f"broken.cu:{line}: " in str(error)
    assert str(error).startswith("kernel broken, block (")
    assert "\n" not in str(error)


@pytest.mark.parametrize("case", [name for name in ERRORS if "spin" not in name])
@FEW
@given(seed=st.integers(0, 2**64 - 1))
def test_broken_rules_are_found_in_any_order(case: str, seed: int) -> None:
    source, threads, _, _, _ = ERRORS[case]
    with pytest.raises(KernelError):
        run(
            source,
            "broken",
            threads,
            np.zeros(64, np.float32),
            0 if case == "division" else 3,
            blocks=3,
            seed=seed,
        )
