// CUDA's arithmetic, conversion and bit intrinsics. The fast approximations (__expf, __fdividef, ...) are computed
// accurately here: a kernel must not depend on their errors.
#pragma once

#include <math.h>

#include "runtime.h"

// min and max, with the overloads and the mixed-sign rule of CUDA's math_functions.h.
#define CUDA_HOST_MIN_MAX(A, B, R)                                                              \
    inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
    inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
CUDA_HOST_MIN_MAX(int, int, int)
CUDA_HOST_MIN_MAX(unsigned, unsigned, unsigned)
CUDA_HOST_MIN_MAX(int, unsigned, unsigned)
CUDA_HOST_MIN_MAX(unsigned, int, unsigned)
CUDA_HOST_MIN_MAX(long, long, long)
CUDA_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUDA_HOST_MIN_MAX(long, unsigned long, unsigned long)
CUDA_HOST_MIN_MAX(unsigned long, long, unsigned long)
CUDA_HOST_MIN_MAX(long long, long long, long long)
CUDA_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
CUDA_HOST_MIN_MAX(long long, unsigned long long, unsigned long long)
CUDA_HOST_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef CUDA_HOST_MIN_MAX
#define CUDA_HOST_MIN_MAX(A, B, R, suffix)                         \
    inline R min(A a, B b) { return fmin##suffix(a, b); }          \
    inline R max(A a, B b) { return fmax##suffix(a, b); }
CUDA_HOST_MIN_MAX(float, float, float, f)
CUDA_HOST_MIN_MAX(double, double, double, )
CUDA_HOST_MIN_MAX(float, double, double, )
CUDA_HOST_MIN_MAX(double, float, double, )
#undef CUDA_HOST_MIN_MAX

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN gives 0, as CUDA has it
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// The C library declares functions of these names, so they are macros.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

inline int __float_as_int(float x) { return cuda_host::from_bits<int>(cuda_host::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cuda_host::from_bits<unsigned>(cuda_host::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_host::from_bits<float>(cuda_host::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_host::from_bits<float>(cuda_host::to_bits(x)); }
inline long long __double_as_longlong(double x) { return cuda_host::from_bits<long long>(cuda_host::to_bits(x)); }
inline double __longlong_as_double(long long x) { return cuda_host::from_bits<double>(cuda_host::to_bits(x)); }

namespace cuda_host {
// Device conversions to integers saturate, and turn NaN into 0; C++ leaves both undefined.
template <class T>
inline T saturated(double x) {
    constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(0);
    constexpr T lowest = is_signed ? static_cast<T>(static_cast<T>(1) << (sizeof(T) * 8 - 1)) : static_cast<T>(0);
    constexpr T highest = static_cast<T>(~lowest);
    if (x != x) return 0;
    if (x <= static_cast<double>(lowest)) return lowest;
    if (x >= static_cast<double>(highest)) return highest;
    return static_cast<T>(x);
}
}  // namespace cuda_host

#define CUDA_HOST_CONVERT(name, T)                                                                       \
    inline T __float2##name##_rn(float x) { return cuda_host::saturated<T>(nearbyint(static_cast<double>(x))); } \
    inline T __float2##name##_rz(float x) { return cuda_host::saturated<T>(trunc(static_cast<double>(x))); }     \
    inline T __float2##name##_rd(float x) { return cuda_host::saturated<T>(floor(static_cast<double>(x))); }     \
    inline T __float2##name##_ru(float x) { return cuda_host::saturated<T>(ceil(static_cast<double>(x))); }      \
    inline T __double2##name##_rn(double x) { return cuda_host::saturated<T>(nearbyint(x)); }            \
    inline T __double2##name##_rz(double x) { return cuda_host::saturated<T>(trunc(x)); }                \
    inline T __double2##name##_rd(double x) { return cuda_host::saturated<T>(floor(x)); }                \
    inline T __double2##name##_ru(double x) { return cuda_host::saturated<T>(ceil(x)); }
CUDA_HOST_CONVERT(int, int)
CUDA_HOST_CONVERT(uint, unsigned)
CUDA_HOST_CONVERT(ll, long long)
CUDA_HOST_CONVERT(ull, unsigned long long)
#undef CUDA_HOST_CONVERT
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    x = (x & 0x55555555u) << 1 | (x >> 1 & 0x55555555u);
    x = (x & 0x33333333u) << 2 | (x >> 2 & 0x33333333u);
    x = (x & 0x0f0f0f0fu) << 4 | (x >> 4 & 0x0f0f0f0fu);
    return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
    return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
           __brev(static_cast<unsigned>(x >> 32));
}
// Each selector nibble picks one of the 8 bytes of y:x, its top bit replicates that byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned pick = selector >> (4 * i) & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 255u;
        if (pick & 8u) byte = byte & 128u ? 255u : 0u;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
    return sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255u) * (b >> i & 255u);
    return sum;
}

// Loads and stores with a cache hint: the hint means nothing here.
#define CUDA_HOST_LOAD(function)             \
    template <class T>                       \
    inline T function(const T* address) {    \
        return *address;                     \
    }
CUDA_HOST_LOAD(__ldg)
CUDA_HOST_LOAD(__ldca)
CUDA_HOST_LOAD(__ldcg)
CUDA_HOST_LOAD(__ldcs)
CUDA_HOST_LOAD(__ldcv)
CUDA_HOST_LOAD(__ldlu)
#undef CUDA_HOST_LOAD
#define CUDA_HOST_STORE(function)               \
    template <class T>                          \
    inline void function(T* address, T value) { \
        *address = value;                       \
    }
CUDA_HOST_STORE(__stwb)
CUDA_HOST_STORE(__stcg)
CUDA_HOST_STORE(__stcs)
CUDA_HOST_STORE(__stwt)
#undef CUDA_HOST_STORE

inline long long clock64() {
    unsigned low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return static_cast<long long>(static_cast<uint64_t>(high) << 32 | low);
}
