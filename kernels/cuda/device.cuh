// What the kernels ask of the machine, by name: 16-byte accesses, conversions, fast arithmetic.
//
// Everything that is a special instruction stands here behind a function with a host twin (KV_HOST is defined
// where the source is compiled for the CPU); the kernels themselves are plain CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

constexpr int WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;
#define NEGATIVE_INFINITY (-CUDART_INF_F)

// Load 16 bytes from any memory. Here and below `address` is a multiple of 16.
__device__ __forceinline__ uint4 load16(const void* address) {
    return *static_cast<const uint4*>(address);
}

// Load 16 bytes of global memory that nothing writes in this launch and that this multiprocessor reads once: the
// read-only path, past the L1 cache.
__device__ __forceinline__ uint4 load16_streaming(const void* address) {
#ifdef KV_HOST
    return load16(address);
#else
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(address));
    return bits;
#endif
}

// Store 16 bytes to shared memory.
__device__ __forceinline__ void store16_shared(void* address, uint4 bits) {
    *static_cast<uint4*>(address) = bits;
}

// Store 16 bytes to global memory, in one access: left to itself the compiler may take four.
__device__ __forceinline__ void store16(void* address, uint4 bits) {
#ifdef KV_HOST
    *static_cast<uint4*>(address) = bits;
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
#endif
}

// e^x to about 2 ulp of the result for small |x|; exactly 0 for -infinity.
__device__ __forceinline__ float fast_exp(float x) {
#ifdef KV_HOST
    return expf(x);
#else
    return __expf(x);
#endif
}

// Vec16<E>: the SIZE elements of type E in 16 bytes, to and from float.
template <typename E>
struct Vec16;

template <>
struct Vec16<float> {
    static constexpr int SIZE = 4;

    static __device__ __forceinline__ void unpack(uint4 bits, float* out) {
        out[0] = __uint_as_float(bits.x);
        out[1] = __uint_as_float(bits.y);
        out[2] = __uint_as_float(bits.z);
        out[3] = __uint_as_float(bits.w);
    }

    static __device__ __forceinline__ uint4 pack(const float* in) {
        return make_uint4(__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]),
                          __float_as_uint(in[3]));
    }
};

template <>
struct Vec16<__half> {
    static constexpr int SIZE = 8;

    static __device__ __forceinline__ void unpack2(unsigned word, float* out) {
        out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
        out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
    }

    static __device__ __forceinline__ unsigned pack2(const float* in) {
        const __half2 pair = __floats2half2_rn(in[0], in[1]);
        return __half_as_ushort(__low2half(pair)) |
               static_cast<unsigned>(__half_as_ushort(__high2half(pair))) << 16;
    }

    static __device__ __forceinline__ void unpack(uint4 bits, float* out) {
        unpack2(bits.x, out);
        unpack2(bits.y, out + 2);
        unpack2(bits.z, out + 4);
        unpack2(bits.w, out + 6);
    }

    static __device__ __forceinline__ uint4 pack(const float* in) {
        return make_uint4(pack2(in), pack2(in + 2), pack2(in + 4), pack2(in + 6));
    }
};

template <>
struct Vec16<__nv_bfloat16> {
    static constexpr int SIZE = 8;

    // A bfloat16 is the upper half of a float.
    static __device__ __forceinline__ void unpack2(unsigned word, float* out) {
        out[0] = __uint_as_float(word << 16);
        out[1] = __uint_as_float(word & 0xffff0000u);
    }

    static __device__ __forceinline__ unsigned pack2(const float* in) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
        return __bfloat16_as_ushort(__low2bfloat16(pair)) |
               static_cast<unsigned>(__bfloat16_as_ushort(__high2bfloat16(pair))) << 16;
    }

    static __device__ __forceinline__ void unpack(uint4 bits, float* out) {
        unpack2(bits.x, out);
        unpack2(bits.y, out + 2);
        unpack2(bits.z, out + 4);
        unpack2(bits.w, out + 6);
    }

    static __device__ __forceinline__ uint4 pack(const float* in) {
        return make_uint4(pack2(in), pack2(in + 2), pack2(in + 4), pack2(in + 6));
    }
};

// Load COUNT consecutive elements as floats. `address` is a multiple of 16, COUNT of Vec16<E>::SIZE.
template <int COUNT, typename E>
__device__ __forceinline__ void load_floats(const E* address, float (&out)[COUNT]) {
    constexpr int SIZE = Vec16<E>::SIZE;
    static_assert(COUNT % SIZE == 0, "load_floats reads whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < COUNT; i += SIZE) Vec16<E>::unpack(load16(address + i), out + i);
}

// Round COUNT floats to E and store them to global memory. `address` is a multiple of 16, COUNT of Vec16<E>::SIZE.
template <int COUNT, typename E>
__device__ __forceinline__ void store_floats(E* address, const float (&in)[COUNT]) {
    constexpr int SIZE = Vec16<E>::SIZE;
    static_assert(COUNT % SIZE == 0, "store_floats writes whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < COUNT; i += SIZE) store16(address + i, Vec16<E>::pack(in + i));
}

// The same to shared memory, as float.
template <int COUNT>
__device__ __forceinline__ void store_floats_shared(float* address, const float (&in)[COUNT]) {
    static_assert(COUNT % 4 == 0, "store_floats_shared writes whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) store16_shared(address + i, Vec16<float>::pack(in + i));
}

// Reduce over aligned runs of WIDTH lanes (a power of two); every lane of the warp takes part.
template <int WIDTH>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, step));
    return x;
}

template <int WIDTH>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}
