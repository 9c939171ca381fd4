// Barriers and warp operations, with CUDA's names, overloads and defaults.
#pragma once

#include "runtime.h"

inline void __syncthreads(CUDA_HOST_SITE) {
    cuda_host::barrier(cuda_host::Barrier::Plain, 0, "__syncthreads", CUDA_HOST_HERE);
}
inline int __syncthreads_count(int predicate, CUDA_HOST_SITE) {
    return cuda_host::barrier(cuda_host::Barrier::Count, predicate, "__syncthreads_count", CUDA_HOST_HERE);
}
inline int __syncthreads_and(int predicate, CUDA_HOST_SITE) {
    return cuda_host::barrier(cuda_host::Barrier::And, predicate, "__syncthreads_and", CUDA_HOST_HERE);
}
inline int __syncthreads_or(int predicate, CUDA_HOST_SITE) {
    return cuda_host::barrier(cuda_host::Barrier::Or, predicate, "__syncthreads_or", CUDA_HOST_HERE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
    cuda_host::warp_op(cuda_host::Op::SyncWarp, mask, 0, 0, "__syncwarp", CUDA_HOST_HERE);
}
inline unsigned __activemask(CUDA_HOST_SITE) { return cuda_host::active_mask(CUDA_HOST_HERE); }

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return static_cast<unsigned>(
        cuda_host::warp_op(cuda_host::Op::Ballot, mask, predicate != 0, 0, "__ballot_sync", CUDA_HOST_HERE));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return static_cast<int>(cuda_host::warp_op(cuda_host::Op::Any, mask, predicate != 0, 0, "__any_sync", CUDA_HOST_HERE));
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return static_cast<int>(cuda_host::warp_op(cuda_host::Op::All, mask, predicate != 0, 0, "__all_sync", CUDA_HOST_HERE));
}

namespace cuda_host {

inline unsigned lane_index() { return current->index; }

// Where each shuffle reads from, by the rules of PTX shfl: lanes are cut into segments of `width`; a source outside
// the caller's segment leaves the caller's own value.
inline int indexed_source(int source, int width) {
    const int lane = static_cast<int>(lane_index());
    return (lane & ~(width - 1)) | (source & (width - 1));
}
inline int up_source(unsigned delta, int width) {
    const int lane = static_cast<int>(lane_index());
    const int source = lane - static_cast<int>(delta & 31u);
    return source < (lane & ~(width - 1)) ? lane : source;
}
inline int down_source(unsigned delta, int width) {
    const int lane = static_cast<int>(lane_index());
    const int source = lane + static_cast<int>(delta & 31u);
    return source > (lane | (width - 1)) ? lane : source;
}
inline int xor_source(int lane_mask, int width) {
    const int lane = static_cast<int>(lane_index());
    const int source = lane ^ (lane_mask & 31);
    return source > (lane | (width - 1)) ? lane : source;
}

inline void check_width(int width, const char* name, Site site) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        char what[96];
        snprintf(what, sizeof what, "%s: width (%d) must be a power of two from 1 to 32", name, width);
        trap(what, site);
    }
}

template <class T>
inline T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
    return from_bits<T>(warp_op(Op::Shuffle, mask, to_bits(value), source, name, site));
}

}  // namespace cuda_host

#define CUDA_HOST_SHUFFLE(T)                                                                                  \
    inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_SITE) {                \
        cuda_host::check_width(width, "__shfl_sync", CUDA_HOST_HERE);                                                   \
        return cuda_host::shuffle(mask, value, cuda_host::indexed_source(source, width), "__shfl_sync", CUDA_HOST_HERE); \
    }                                                                                                         \
    inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {         \
        cuda_host::check_width(width, "__shfl_up_sync", CUDA_HOST_HERE);                                                \
        return cuda_host::shuffle(mask, value, cuda_host::up_source(delta, width), "__shfl_up_sync", CUDA_HOST_HERE);   \
    }                                                                                                         \
    inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {       \
        cuda_host::check_width(width, "__shfl_down_sync", CUDA_HOST_HERE);                                              \
        return cuda_host::shuffle(mask, value, cuda_host::down_source(delta, width), "__shfl_down_sync", CUDA_HOST_HERE); \
    }                                                                                                         \
    inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_HOST_SITE) {         \
        cuda_host::check_width(width, "__shfl_xor_sync", CUDA_HOST_HERE);                                               \
        return cuda_host::shuffle(mask, value, cuda_host::xor_source(lane_mask, width), "__shfl_xor_sync", CUDA_HOST_HERE); \
    }

CUDA_HOST_SHUFFLE(int)
CUDA_HOST_SHUFFLE(unsigned)
CUDA_HOST_SHUFFLE(long)
CUDA_HOST_SHUFFLE(unsigned long)
CUDA_HOST_SHUFFLE(long long)
CUDA_HOST_SHUFFLE(unsigned long long)
CUDA_HOST_SHUFFLE(float)
CUDA_HOST_SHUFFLE(double)
#undef CUDA_HOST_SHUFFLE

// NVIDIA's headers declare the half-precision shuffles for the device alone; these serve whichever type is complete
// where a kernel calls them.
struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

namespace cuda_host {
template <class T, class U, class... Others>
constexpr bool one_of = __is_same(T, U) || one_of<T, Others...>;
template <class T, class U>
constexpr bool one_of<T, U> = __is_same(T, U);
template <bool, class T>
struct Only {};
template <class T>
struct Only<true, T> {
    using type = T;
};
template <class T>
using HalfType = typename Only<one_of<T, __half, __half2, __nv_bfloat16, __nv_bfloat162>, T>::type;
}  // namespace cuda_host

template <class T>
inline cuda_host::HalfType<T> __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_SITE) {
    cuda_host::check_width(width, "__shfl_sync", CUDA_HOST_HERE);
    return cuda_host::shuffle(mask, value, cuda_host::indexed_source(source, width), "__shfl_sync", CUDA_HOST_HERE);
}
template <class T>
inline cuda_host::HalfType<T> __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                             CUDA_HOST_SITE) {
    cuda_host::check_width(width, "__shfl_up_sync", CUDA_HOST_HERE);
    return cuda_host::shuffle(mask, value, cuda_host::up_source(delta, width), "__shfl_up_sync", CUDA_HOST_HERE);
}
template <class T>
inline cuda_host::HalfType<T> __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                               CUDA_HOST_SITE) {
    cuda_host::check_width(width, "__shfl_down_sync", CUDA_HOST_HERE);
    return cuda_host::shuffle(mask, value, cuda_host::down_source(delta, width), "__shfl_down_sync", CUDA_HOST_HERE);
}
template <class T>
inline cuda_host::HalfType<T> __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                              CUDA_HOST_SITE) {
    cuda_host::check_width(width, "__shfl_xor_sync", CUDA_HOST_HERE);
    return cuda_host::shuffle(mask, value, cuda_host::xor_source(lane_mask, width), "__shfl_xor_sync", CUDA_HOST_HERE);
}

#define CUDA_HOST_MATCH(T)                                                                                   \
    inline unsigned __match_any_sync(unsigned mask, T value, CUDA_HOST_SITE) {                               \
        return static_cast<unsigned>(cuda_host::warp_op(cuda_host::Op::MatchAny, mask,                       \
                                                        cuda_host::to_bits(value), 0, "__match_any_sync", CUDA_HOST_HERE)); \
    }                                                                                                        \
    inline unsigned __match_all_sync(unsigned mask, T value, int* all_equal, CUDA_HOST_SITE) {               \
        const auto lanes = static_cast<unsigned>(cuda_host::warp_op(                                         \
            cuda_host::Op::MatchAll, mask, cuda_host::to_bits(value), 0, "__match_all_sync", CUDA_HOST_HERE));         \
        *all_equal = lanes != 0;                                                                             \
        return lanes;                                                                                        \
    }
CUDA_HOST_MATCH(int)
CUDA_HOST_MATCH(unsigned)
CUDA_HOST_MATCH(long)
CUDA_HOST_MATCH(unsigned long)
CUDA_HOST_MATCH(long long)
CUDA_HOST_MATCH(unsigned long long)
CUDA_HOST_MATCH(float)
CUDA_HOST_MATCH(double)
#undef CUDA_HOST_MATCH

#define CUDA_HOST_REDUCE(T, function, op)                                                                  \
    inline T function(unsigned mask, T value, CUDA_HOST_SITE) {                                            \
        return cuda_host::from_bits<T>(                                                                    \
            cuda_host::warp_op(cuda_host::Op::op, mask, cuda_host::to_bits(value), 0, #function, CUDA_HOST_HERE));   \
    }
CUDA_HOST_REDUCE(int, __reduce_add_sync, ReduceAdd)
CUDA_HOST_REDUCE(unsigned, __reduce_add_sync, ReduceAdd)
CUDA_HOST_REDUCE(int, __reduce_min_sync, ReduceMin)
CUDA_HOST_REDUCE(unsigned, __reduce_min_sync, ReduceMinUnsigned)
CUDA_HOST_REDUCE(int, __reduce_max_sync, ReduceMax)
CUDA_HOST_REDUCE(unsigned, __reduce_max_sync, ReduceMaxUnsigned)
CUDA_HOST_REDUCE(unsigned, __reduce_and_sync, ReduceAnd)
CUDA_HOST_REDUCE(unsigned, __reduce_or_sync, ReduceOr)
CUDA_HOST_REDUCE(unsigned, __reduce_xor_sync, ReduceXor)
#undef CUDA_HOST_REDUCE
