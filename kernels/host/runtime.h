// What a kernel, compiled for the CPU, sees of the machine that runs it.
//
// A thread of a block is a fiber (Lane); 32 of them are a Warp, the warps of a block are a Block, and a worker (one
// operating-system thread) runs one block at a time. `current` is the lane that is running on this worker. Lanes
// switch only inside the functions declared here, or when a timer finds one that never switches.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector_types.h>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the CPU runner switches stacks with x86-64 Linux code"
#endif

namespace cuda_host {

struct Warp;
struct Block;
struct Worker;

// The warp operations that lanes rendezvous in. Lanes that meet must ask for the same one.
enum class Op : unsigned char {
    Shuffle,
    SyncWarp,
    Ballot,
    Any,
    All,
    MatchAny,
    MatchAll,
    ReduceAdd,
    ReduceMin,
    ReduceMax,
    ReduceMinUnsigned,
    ReduceMaxUnsigned,
    ReduceAnd,
    ReduceOr,
    ReduceXor,
};

enum class Barrier : unsigned char { Plain, Count, And, Or };

enum class State : unsigned char { Ready, AtWarpOp, AtActiveMask, AtBarrier, AtNamedBarrier, Exited };

// A place in the kernel's source. A function ends its parameters with CUDA_HOST_SITE to learn its caller's place,
// which it then calls CUDA_HOST_HERE.
struct Site {
    const char* file;
    int line;
};

#define CUDA_HOST_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define CUDA_HOST_HERE ::cuda_host::Site{site_file, site_line}

struct Lane {
    void* stack_pointer;  // saved while another lane runs
    uint3 thread;         // threadIdx
    unsigned index;       // within the warp
    Warp* warp;
    Block* block;
    // Why the lane does not run, for the errors that name it:
    State state;
    Op op;
    const char* name;  // of the function it waits in, or of the atomic it last called
    Site site;
    unsigned mask;
    int barrier;             // of a named barrier
    unsigned spins;          // atomics and sleeps since the lane last switched
    void* fake_stack;        // AddressSanitizer's, while another lane runs
    const void* stack_low;   // lowest usable byte
    size_t stack_bytes;
    void* entered_with;      // where the stack pointer starts
};

struct Block {
    uint3 index;  // blockIdx
    dim3 threads; // blockDim
    dim3 grid;    // gridDim
    void* dynamic_shared;
};

// A kernel as the runner calls it: arguments by address.
struct Entry {
    const char* kernel;
    void (*call)(void* const* arguments);
};

#pragma GCC visibility push(default)
// One word of thread-local storage each, addressed without a call.
extern __attribute__((tls_model("initial-exec"))) __thread Lane* current;
extern __attribute__((tls_model("initial-exec"))) __thread Block* current_block;

// Meet the lanes of `mask`; returns this lane's result. `name` is the CUDA function, for errors.
uint64_t warp_op(Op op, unsigned mask, uint64_t value, int source, const char* name, Site site);
unsigned active_mask(Site site);
int barrier(Barrier kind, int predicate, const char* name, Site site);
void named_barrier(int id, int count, Site site);
// Called by atomics, fences and sleeps, whose callers may be waiting for another thread.
void spin_point_slow(const char* name, Site site);
[[noreturn]] void trap(const char* what, Site site);
// An atomic on `address`, where memory is watched.
void watch_atomic(const void* address, size_t bytes, Site site);
#pragma GCC visibility pop

// What the code around an atomic is compiled with, so that the atomic itself is left to watch_atomic.
#ifndef CUDA_HOST_WATCH
#define CUDA_HOST_UNWATCHED
#define CUDA_HOST_UNWATCHED_CALL inline
#else
#ifdef __clang__
#define CUDA_HOST_UNWATCHED __attribute__((disable_sanitizer_instrumentation))
#else
#define CUDA_HOST_UNWATCHED __attribute__((no_sanitize("thread")))
#endif
// Inlined into a kernel, the code would be watched.
#define CUDA_HOST_UNWATCHED_CALL inline CUDA_HOST_UNWATCHED __attribute__((noinline))
#endif

constexpr unsigned SPINS_PER_SWITCH = 32;

inline __attribute__((always_inline)) CUDA_HOST_UNWATCHED void spin_point(const char* name, Site site, unsigned weight = 1) {
    Lane* lane = current;
    if ((lane->spins += weight) >= SPINS_PER_SWITCH) spin_point_slow(name, site);
}

// Before each atomic.
template <class T>
inline __attribute__((always_inline)) CUDA_HOST_UNWATCHED void before_atomic(const T* address, const char* name,
                                                                             Site site) {
    spin_point(name, site);
#ifdef CUDA_HOST_WATCH
    watch_atomic(address, sizeof(T), site);
#else
    (void)address;
#endif
}

template <class T>
inline T* dynamic_shared() {
    return static_cast<T*>(current_block->dynamic_shared);
}

template <class T>
inline __attribute__((always_inline)) CUDA_HOST_UNWATCHED uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a warp operation moves at most 8 bytes a lane");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
inline __attribute__((always_inline)) CUDA_HOST_UNWATCHED T from_bits(uint64_t bits) {
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

}  // namespace cuda_host
