// The header that stands in for the GPU: put before a CUDA source, it makes the source compile as C++17.
//
// NVIDIA's own vector_types.h, cuda_fp16.h, cuda_bf16.h and cuda_fp8.h serve as they are. Left out, with a compile
// error where a kernel uses them: inline PTX (put it behind a function with a KV_HOST twin), textures, cooperative
// groups, dynamic parallelism.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector_functions.h>

#include "runtime.h"

#define KV_HOST 1

#undef __global__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#ifdef CUDA_HOST_ADDRESS
// One block at a time, in a section that the sanitizer puts red zones into.
#define __shared__ static __attribute__((section(".cuda_shared")))
#else
// One copy a worker: a worker runs one block at a time.
#define __shared__ static thread_local
#endif

#define threadIdx (::cuda_host::current->thread)
#define blockIdx (::cuda_host::current_block->index)
#define blockDim (::cuda_host::current_block->threads)
#define gridDim (::cuda_host::current_block->grid)
constexpr int warpSize = 32;

#include "atomics.h"
#include "device_math.h"
#include "warp.h"

#undef assert
#define assert(condition)                                                                          \
    ((condition) ? (void)0                                                                         \
                 : ::cuda_host::trap("assertion failed: " #condition, {__builtin_FILE(), __builtin_LINE()}))

inline void __trap(CUDA_HOST_SITE) { ::cuda_host::trap("__trap() called", CUDA_HOST_HERE); }

#ifndef CUDA_HOST_ADDRESS
namespace cuda_host {
// Its address tells the runner where this library keeps the calling worker's __shared__ variables.
inline thread_local char shared_anchor[16];
}  // namespace cuda_host

extern "C" inline __attribute__((used, visibility("default"))) void* cuda_host_shared_anchor() {
    return cuda_host::shared_anchor;
}
#endif
