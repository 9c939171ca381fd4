"""Planted bugs in kernels are caught by the sanitized modes, and named by source line."""

from __future__ import annotations

import doctest
from functools import cache

import numpy as np
import pytest

from kernels import compile as kernels_compile
from kernels.compile import KernelError, Module, backend_available, compile_source

pytestmark = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")

# The line of each case is the one that ends in `// BUG n`.
BUGS = """
struct Stage { float tile[8]; };
__device__ void shift(float* x, const float* y, int i) {
    x[i] = y[i + 1];  // BUG 12
}
template <int N>
__device__ void fill(int i) {
    __shared__ float scratch[N];
    scratch[i + N - 31] = 1;  // BUG 13
}
extern "C" __global__ void bugs(float* x, const float* y, int mode) {
    __shared__ float part[32];
    __shared__ Stage stage;
    extern __shared__ float sized[];
    const int i = threadIdx.x;
    if (mode == 1) x[i] = y[i];  // BUG 1
    if (mode == 2) x[i - 1] = 0;  // BUG 2
    if (mode == 3) x[i + 100] = 0;  // BUG 3
    if (mode == 4) reinterpret_cast<volatile float*>(part)[i + 1] = 0;  // BUG 4
    if (mode == 5) sized[i + 1] = 0;  // BUG 5
    if (mode == 6) x[i] = reinterpret_cast<float*>(&stage)[i];  // BUG 6
    if (mode == 7) x[1ll << 40] = 0;  // BUG 7
    if (mode == 8) *reinterpret_cast<double*>(x + 1) = 0;  // BUG 8
    if (mode == 9) { const int big = mode + 0x7ffffff6; x[i] = big * big; }  // BUG 9
    if (mode == 10) x[i] = 1 << (i + 1);  // BUG 10
    if (mode == 11 && i == 5) __trap();  // BUG 11
    if (mode == 12) shift(x, y, i);
    if (mode == 13) fill<32>(i);
    if (mode == 14) { part[i] = y[i / 2]; __syncthreads(); x[i] = part[31 - i] + y[0]; }
    if (mode == 15) { if (i > 0) part[i] = 1; __syncthreads(); x[i] = part[31 - i]; }  // BUG 15
    if (mode == 16) { part[i] = 1; __syncthreads(); x[i] = sized[i]; }  // BUG 16
    if (mode == 17) { atomicAdd(&part[i], 1.0f); }  // BUG 17
    if (mode == 18) { sized[i] = 1; __syncthreads(); x[i] = reinterpret_cast<float4*>(sized)[i % 8].y; }
    if (mode == 19) { stage.tile[i % 4] = 1; __syncthreads(); x[i] = ((double*)&stage)[i % 4]; }  // BUG 19
    if (mode == 20) { reinterpret_cast<unsigned char*>(part)[4 * i] = 1; __syncthreads(); x[i] = part[i]; }  // BUG 20
}
"""

ADDRESS = {
    1: (31, "reads 4 bytes just past the end of y (124 bytes)"),
    2: (0, "writes 4 bytes 4 bytes before the start of x (128 bytes)"),
    3: (0, "writes 4 bytes 272 bytes past the end of x (128 bytes)"),
    4: (31, "writes 4 bytes just past the end of part (128 bytes)"),
    5: (31, "writes 4 bytes just past the end of dynamic shared memory (128 bytes)"),
    6: (8, "reads 4 bytes just past the end of stage (32 bytes)"),
    7: (0, "writes at an address where there is no memory"),
    8: (0, "store to misaligned address for type 'double', which requires 8 byte alignment"),
    9: (0, "signed integer overflow: 2147483647 * 2147483647 cannot be represented in type 'int'"),
    10: (31, "shift exponent 32 is too large for 32-bit type 'int'"),
    11: (5, "__trap() called"),
    12: (30, "reads 4 bytes just past the end of y (124 bytes)"),
    13: (31, "index 32 out of bounds for type 'float [32]'"),
}
# The thread that arrives last at a barrier is the first to go on.
UNWRITTEN = "reads {} bytes of shared memory that no thread of the block has written (byte {} of {})"
MEMORY = {
    15: (31, UNWRITTEN.format(4, 0, "part")),
    16: (31, UNWRITTEN.format(4, 124, "dynamic shared memory")),
    17: (0, UNWRITTEN.format(4, 0, "part")),
    19: (31, UNWRITTEN.format(8, 24, "stage")),
    20: (31, UNWRITTEN.format(3, 125, "part")),
}


@cache
def compiled(sanitize: str | None) -> Module:
    return compile_source(BUGS, backend="cpu", sanitize=sanitize, name="bugs.cu")


def line_of(mode: int) -> int:
    return next(n for n, line in enumerate(BUGS.splitlines(), 1) if line.endswith(f"// BUG {mode}"))


def launch(sanitize: str | None, mode: int, seed: int | None = None) -> np.ndarray:
    x, y = np.zeros(32, np.float32), np.ones(31, np.float32)
    compiled(sanitize).launch("bugs", (2, 1, 1), (32, 1, 1), [x, y, mode], shared_bytes=128, seed=seed)
    return x


@pytest.mark.parametrize(
    ("sanitize", "mode"), [*(("address", m) for m in ADDRESS), *(("memory", m) for m in MEMORY)]
)
def test_a_planted_bug_is_caught_and_located(sanitize: str, mode: int) -> None:
    thread, message = (ADDRESS if sanitize == "address" else MEMORY)[mode]
    with pytest.raises(KernelError) as caught:
        launch(sanitize, mode)
    # g++ and clang++ write the type differently.
    assert str(caught.value).replace("float[32]", "float [32]") == (
        f"kernel bugs, block (0, 0, 0), thread ({thread}, 0, 0), bugs.cu:{line_of(mode)}: {message}"
    )


@pytest.mark.parametrize(
    ("sanitize", "mode"), [("address", 1), ("address", 4), ("memory", 15), ("memory", 16)]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_bug_is_caught_in_any_order(sanitize: str, mode: int, seed: int) -> None:
    with pytest.raises(KernelError) as caught:
        launch(sanitize, mode, seed)
    assert caught.value.line == line_of(mode)


@pytest.mark.parametrize("sanitize", [None, "address", "memory"])
@pytest.mark.parametrize("mode", [0, 14, 18])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_sound_kernel_gives_the_same_answer_in_every_mode(
    sanitize: str | None, mode: int, seed: int
) -> None:
    expected = {0: 0, 14: 2, 18: 1}[mode]
    np.testing.assert_array_equal(launch(sanitize, mode, seed), np.full(32, expected, np.float32))


ALIASES = """
extern "C" __global__ void mix(float* a, float* b, const float* c, double scale, long long big, int* none) {
    const int i = threadIdx.x;
    a[2 * i] = b[i] + 1;
    __syncthreads();
    b[i] = static_cast<float>(a[2 * i] * scale + (big >> 40) + (c ? c[i] : 0) + (none == nullptr));
}
"""


@pytest.mark.parametrize("sanitize", [None, "address", "memory"])
def test_views_that_overlap_stay_one_array(sanitize: str | None) -> None:
    module = compile_source(ALIASES, backend="cpu", sanitize=sanitize, name="aliases.cu")
    base = np.arange(64, dtype=np.float32)
    a, b = base[:32:2], base[16:24]
    c = np.arange(10, 18, dtype=np.float32)
    c.flags.writeable = False
    module.launch("mix", (1, 1, 1), (8, 1, 1), [a, b, c, 0.5, 3 << 40, None])
    expected = np.arange(64, dtype=np.float32)
    before = expected.copy()
    expected[:16:2] = before[16:24] + 1
    expected[16:24] = expected[:16:2] * np.float32(0.5) + 3 + c + 1
    np.testing.assert_array_equal(base, expected)
    module.launch("mix", (1, 1, 1), (1, 1, 1), [base, base, None, 1.0, 0, None])
    assert base[0] == expected[0] + 2


@pytest.mark.parametrize("sanitize", ["address", "memory"])
def test_barriers_and_masks_are_checked_in_every_mode(sanitize: str) -> None:
    source = 'extern "C" __global__ void broken() {\n    if (threadIdx.x < 40)\n        __syncthreads();\n}\n'
    module = compile_source(source, backend="cpu", sanitize=sanitize, name="broken.cu")
    with pytest.raises(KernelError, match=r"broken.cu:3: __syncthreads is not reached by every thread"):
        module.launch("broken", (2, 1, 1), (64, 1, 1), [])


def test_an_empty_array_has_no_first_element() -> None:
    source = 'extern "C" __global__ void first(float* x) {\n    x[0] = 1;\n}\n'
    module = compile_source(source, backend="cpu", sanitize="address", name="first.cu")
    with pytest.raises(KernelError, match=r"first.cu:2: writes 4 bytes just past the end of x \(0 bytes\)"):
        module.launch("first", (1, 1, 1), (1, 1, 1), [np.zeros(0, np.float32)])


def test_the_example_in_the_documentation_prints_what_it_says() -> None:
    failed, tried = doctest.testmod(kernels_compile)
    assert failed == 0
    assert tried > 10
