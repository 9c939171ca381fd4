"""Intrinsics and NVIDIA's half-precision headers compute on the CPU what the device computes."""

from __future__ import annotations

import math
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.compile import Module, backend_available, compile_source

pytestmark = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")

FEW = settings(max_examples=25)


@cache
def compiled(source: str) -> Module:
    return compile_source(source, backend="cpu", name="math.cu")


def run(source: str, kernel: str, threads: int, *args: object, blocks: int = 1, **options: object) -> None:
    compiled(source).launch(kernel, (blocks, 1, 1), (threads, 1, 1), args, **options)


HALVES = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
extern "C" __global__ void widen(const unsigned short* bits, float* half_out, float* bfloat_out, float* fp8_out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    half_out[i] = __half2float(__ushort_as_half(bits[i]));
    bfloat_out[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
    __nv_fp8_e4m3 narrow;
    narrow.__x = static_cast<unsigned char>(bits[i]);
    fp8_out[i] = static_cast<float>(narrow);
}
extern "C" __global__ void narrow(const float* x, unsigned short* half_out, unsigned short* bfloat_out,
                                  unsigned char* fp8_out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half_out[i] = __half_as_ushort(__float2half_rn(x[i]));
    bfloat_out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
    fp8_out[i] = __nv_fp8_e4m3(x[i]).__x;
}
"""


def test_nvidia_headers_widen_every_16_bit_pattern_exactly() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    half, bfloat, fp8 = (np.zeros(65536, np.float32) for _ in range(3))
    run(HALVES, "widen", 256, bits, half, bfloat, fp8, blocks=256)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloat, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    bytes_ = bits.astype(np.uint8)
    np.testing.assert_array_equal(fp8, bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@FEW
@given(x=st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=300))
def test_nvidia_headers_round_to_nearest_even(x: list[float]) -> None:
    values = np.array(x, np.float32)
    half, bfloat = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    fp8 = np.zeros(len(x), np.uint8)
    run(HALVES, "narrow", 128, values, half, bfloat, fp8, len(x), blocks=-(-len(x) // 128))
    np.testing.assert_array_equal(half, values.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(bfloat, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(fp8, values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


INTEGERS = """
extern "C" __global__ void integers(const unsigned* x, const unsigned* y, const unsigned* s, long long* out) {
    const unsigned a = x[threadIdx.x], b = y[threadIdx.x], c = s[threadIdx.x];
    const unsigned long long wide = static_cast<unsigned long long>(b) << 32 | a;
    long long* row = out + threadIdx.x * 13;
    row[0] = __popc(a); row[1] = __clz(static_cast<int>(a)); row[2] = __ffs(static_cast<int>(a));
    row[3] = __brev(a); row[4] = __byte_perm(a, b, c); row[5] = __funnelshift_l(a, b, c);
    row[6] = __funnelshift_r(a, b, c); row[7] = __umulhi(a, b);
    row[8] = __mulhi(static_cast<int>(a), static_cast<int>(b));
    row[9] = __dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c));
    row[10] = __clzll(static_cast<long long>(wide)) * 100 + __popcll(wide);
    row[11] = min(static_cast<int>(a), b);  // mixed signs compare as unsigned
    row[12] = max(static_cast<int>(a), static_cast<int>(b));
}
extern "C" __global__ void convert(const float* x, long long* out) {
    long long* row = out + threadIdx.x * 6;
    const float v = x[threadIdx.x];
    row[0] = __float2int_rn(v); row[1] = __float2int_rz(v); row[2] = __float2int_rd(v); row[3] = __float2int_ru(v);
    row[4] = __float2uint_rn(v); row[5] = static_cast<long long>(__float2ll_rn(v));
}
extern "C" __global__ void functions(const float* x, float* out) {
    const float v = x[threadIdx.x];
    float* row = out + threadIdx.x * 8;
    row[0] = __expf(v); row[1] = exp2f(v); row[2] = rsqrtf(fabsf(v) + 1); row[3] = __fdividef(v, 3.0f);
    row[4] = fmaf(v, v, 1.0f); row[5] = __saturatef(v); row[6] = min(v, 1.0f); row[7] = __logf(fabsf(v) + 1);
}
"""

WORDS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 0x80808080]))


def signed(word: int, bits: int = 32) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


@FEW
@given(words=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=32))
def test_integer_intrinsics(words: list[tuple[int, int, int]]) -> None:
    columns = np.array(words, np.uint32).T.copy()
    out = np.zeros((len(words), 13), np.int64)
    run(INTEGERS, "integers", len(words), *columns, out)
    for (a, b, c), row in zip(words, out.tolist(), strict=True):
        wide = b << 32 | a
        picked = []
        for selector in range(4):
            pick = c >> 4 * selector & 15
            byte = wide >> 8 * (pick & 7) & 255
            picked.append((255 if byte >> 7 else 0) if pick & 8 else byte)
        dot = sum(signed(a >> k & 255, 8) * signed(b >> k & 255, 8) for k in (0, 8, 16, 24))
        assert row == [
            a.bit_count(),
            32 - a.bit_length(),
            (a & -a).bit_length(),
            int(f"{a:032b}"[::-1], 2),
            sum(byte << 8 * k for k, byte in enumerate(picked)),
            wide << (c & 31) >> 32 & (2**32 - 1),
            wide >> (c & 31) & (2**32 - 1),
            a * b >> 32,
            signed(a) * signed(b) >> 32,
            signed((dot + c) % 2**32),
            (64 - wide.bit_length()) * 100 + wide.bit_count(),
            min(a, b),
            max(signed(a), signed(b)),
        ]


def test_conversions_to_integers_saturate_as_on_the_device() -> None:
    x = np.array([0.5, 1.5, -0.5, -2.7, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan, 1e20], np.float32)
    out = np.zeros((len(x), 6), np.int64)
    run(INTEGERS, "convert", len(x), x, out)
    for value, row in zip(x.tolist(), out.tolist(), strict=True):
        if math.isnan(value):
            assert row == [0] * 6
            continue

        def clamped(rounded: float, low: int, high: int) -> int:
            return low if rounded <= low else high if rounded >= high else int(rounded)

        nearest = round(value) if math.isfinite(value) else value
        down = math.floor(value) if math.isfinite(value) else value
        up = math.ceil(value) if math.isfinite(value) else value
        towards_zero = math.trunc(value) if math.isfinite(value) else value
        int32 = (-(2**31), 2**31 - 1)
        assert row[:4] == [clamped(r, *int32) for r in (nearest, towards_zero, down, up)]
        assert row[4:] == [clamped(nearest, 0, 2**32 - 1), clamped(nearest, -(2**63), 2**63 - 1)]


def test_functions_agree_with_float64_to_a_few_ulp() -> None:
    x = np.linspace(-20, 20, 500, dtype=np.float32)
    out = np.zeros((500, 8), np.float32)
    run(INTEGERS, "functions", 500, x, out)
    v = x.astype(np.float64)
    expected = [
        np.exp(v),
        np.exp2(v),
        1 / np.sqrt(abs(v) + 1),
        v / 3,
        v * v + 1,
        np.clip(v, 0, 1),
        np.minimum(v, 1),
    ]
    expected.append(np.log((abs(x) + np.float32(1)).astype(np.float64)))
    np.testing.assert_allclose(out.T, expected, rtol=5e-7)
