// The function and variable qualifiers that NVIDIA's own headers (vector_types.h, cuda_fp16.h, ...) expect of
// crt/host_defines.h, which the runtime wheel does not ship. On the CPU they mean nothing; a CUDA toolkit's own
// file, where there is one, comes earlier on the include path and is used instead.
#pragma once

#define __host__
#define __device__
#define __global__
#define __constant__
#define __managed__
#define __grid_constant__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __no_return__ __attribute__((noreturn))
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __specialization_static static
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_DEVICE
