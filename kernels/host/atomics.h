// Atomics and fences. They are atomic across the blocks that run in parallel, on global and on shared memory, and
// each is a point where a thread that keeps retrying lets the others of its block run.
#pragma once

#include "runtime.h"

namespace cuda_host {

// Apply `update` to *address until no other writer came in between; returns the value before.
template <class T, class Bits, class Update>
inline CUDA_HOST_UNWATCHED T exchange_loop(T* address, Update update) {
    static_assert(sizeof(T) == sizeof(Bits), "the word compared must be the value's own size");
    Bits* const word = reinterpret_cast<Bits*>(address);
    Bits seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        const Bits wanted = static_cast<Bits>(to_bits(update(from_bits<T>(seen))));
        if (__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return from_bits<T>(seen);
    }
}

}  // namespace cuda_host

#define CUDA_HOST_FETCH(T, function, builtin) \
    CUDA_HOST_UNWATCHED_CALL T function(T* address, T value, CUDA_HOST_SITE) { \
        cuda_host::before_atomic(address, #function, CUDA_HOST_HERE); \
        return builtin(address, value, __ATOMIC_SEQ_CST); \
    }
#define CUDA_HOST_UPDATE(T, Bits, function, expression) \
    CUDA_HOST_UNWATCHED_CALL T function(T* address, T value, CUDA_HOST_SITE) { \
        cuda_host::before_atomic(address, #function, CUDA_HOST_HERE); \
        return cuda_host::exchange_loop<T, Bits>(address, [value](T old) CUDA_HOST_UNWATCHED -> T { return expression; }); \
    }
#define CUDA_HOST_CAS(T, function) \
    CUDA_HOST_UNWATCHED_CALL T function(T* address, T compare, T value, CUDA_HOST_SITE) { \
        cuda_host::before_atomic(address, #function, CUDA_HOST_HERE); \
        __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        return compare; \
    }

// Every atomic exists for the device, the block (_block) and the system (_system); on the CPU they are one.
#define CUDA_HOST_ATOMICS(SCOPE) \
    CUDA_HOST_FETCH(int, atomicAdd##SCOPE, __atomic_fetch_add) \
    CUDA_HOST_FETCH(unsigned, atomicAdd##SCOPE, __atomic_fetch_add) \
    CUDA_HOST_FETCH(unsigned long long, atomicAdd##SCOPE, __atomic_fetch_add) \
    CUDA_HOST_UPDATE(float, uint32_t, atomicAdd##SCOPE, old + value) \
    CUDA_HOST_UPDATE(double, uint64_t, atomicAdd##SCOPE, old + value) \
    CUDA_HOST_FETCH(int, atomicSub##SCOPE, __atomic_fetch_sub) \
    CUDA_HOST_FETCH(unsigned, atomicSub##SCOPE, __atomic_fetch_sub) \
    CUDA_HOST_FETCH(int, atomicExch##SCOPE, __atomic_exchange_n) \
    CUDA_HOST_FETCH(unsigned, atomicExch##SCOPE, __atomic_exchange_n) \
    CUDA_HOST_FETCH(unsigned long long, atomicExch##SCOPE, __atomic_exchange_n) \
    CUDA_HOST_UPDATE(float, uint32_t, atomicExch##SCOPE, ((void)old, value)) \
    CUDA_HOST_UPDATE(int, uint32_t, atomicMin##SCOPE, value < old ? value : old) \
    CUDA_HOST_UPDATE(unsigned, uint32_t, atomicMin##SCOPE, value < old ? value : old) \
    CUDA_HOST_UPDATE(long long, uint64_t, atomicMin##SCOPE, value < old ? value : old) \
    CUDA_HOST_UPDATE(unsigned long long, uint64_t, atomicMin##SCOPE, value < old ? value : old) \
    CUDA_HOST_UPDATE(int, uint32_t, atomicMax##SCOPE, value > old ? value : old) \
    CUDA_HOST_UPDATE(unsigned, uint32_t, atomicMax##SCOPE, value > old ? value : old) \
    CUDA_HOST_UPDATE(long long, uint64_t, atomicMax##SCOPE, value > old ? value : old) \
    CUDA_HOST_UPDATE(unsigned long long, uint64_t, atomicMax##SCOPE, value > old ? value : old) \
    CUDA_HOST_UPDATE(unsigned, uint32_t, atomicInc##SCOPE, old >= value ? 0u : old + 1u) \
    CUDA_HOST_UPDATE(unsigned, uint32_t, atomicDec##SCOPE, old == 0u || old > value ? value : old - 1u) \
    CUDA_HOST_FETCH(int, atomicAnd##SCOPE, __atomic_fetch_and) \
    CUDA_HOST_FETCH(unsigned, atomicAnd##SCOPE, __atomic_fetch_and) \
    CUDA_HOST_FETCH(unsigned long long, atomicAnd##SCOPE, __atomic_fetch_and) \
    CUDA_HOST_FETCH(int, atomicOr##SCOPE, __atomic_fetch_or) \
    CUDA_HOST_FETCH(unsigned, atomicOr##SCOPE, __atomic_fetch_or) \
    CUDA_HOST_FETCH(unsigned long long, atomicOr##SCOPE, __atomic_fetch_or) \
    CUDA_HOST_FETCH(int, atomicXor##SCOPE, __atomic_fetch_xor) \
    CUDA_HOST_FETCH(unsigned, atomicXor##SCOPE, __atomic_fetch_xor) \
    CUDA_HOST_FETCH(unsigned long long, atomicXor##SCOPE, __atomic_fetch_xor) \
    CUDA_HOST_CAS(int, atomicCAS##SCOPE) \
    CUDA_HOST_CAS(unsigned, atomicCAS##SCOPE) \
    CUDA_HOST_CAS(unsigned long long, atomicCAS##SCOPE) \
    CUDA_HOST_CAS(unsigned short, atomicCAS##SCOPE)

CUDA_HOST_ATOMICS()
CUDA_HOST_ATOMICS(_block)
CUDA_HOST_ATOMICS(_system)
#undef CUDA_HOST_ATOMICS
#undef CUDA_HOST_CAS
#undef CUDA_HOST_UPDATE
#undef CUDA_HOST_FETCH

CUDA_HOST_UNWATCHED_CALL void __threadfence(CUDA_HOST_SITE) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    cuda_host::spin_point("__threadfence", CUDA_HOST_HERE);
}
inline void __threadfence_block(CUDA_HOST_SITE) { __threadfence(site_file, site_line); }
inline void __threadfence_system(CUDA_HOST_SITE) { __threadfence(site_file, site_line); }
inline void __nanosleep(unsigned, CUDA_HOST_SITE) {
    cuda_host::spin_point("__nanosleep", CUDA_HOST_HERE, cuda_host::SPINS_PER_SWITCH);
}
