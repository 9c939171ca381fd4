// A kernel compiled with -fsanitize=thread calls the functions below at each of its memory accesses. They stand in for
// the sanitizer's own library, and look at shared memory alone: a byte that is read must have been written by the
// same block.
//
// Atomics, and the runner's own code, are not instrumented; atomics call `watch_atomic` instead.
#include "schedule.h"

namespace cuda_host {

[[noreturn]] static void report_unwritten(unsigned space, const SharedMemory& shared, const char* at, size_t bytes,
                                          const Place& where) {
    Lane* const me = current;
    size_t first = static_cast<size_t>(at - shared.begin);
    size_t unwritten = 0;
    for (size_t i = 0; i < bytes; i++) unwritten += shared.written[first + i] == 0;
    while (shared.written[first]) first++;
    char message[256];
    snprintf(message, sizeof message, "reads %zu bytes of shared memory that no thread of the block has written",
             unwritten);
    record(*running()->worker->launch, *running(), me->thread, Place{where.site, where.address, space, first},
           message);
    switch_to_worker(me);
    __builtin_unreachable();
}

static inline void access(const void* address, size_t bytes, bool write, const Place& where) {
    if (!current) return;
    Worker& worker = *running()->worker;
    const char* at = static_cast<const char*>(address);
    SharedMemory* shared = &worker.static_shared;
    unsigned space = 1;
    if (static_cast<size_t>(at - shared->begin) >= shared->bytes) {
        shared = &worker.dynamic_shared;
        space = 2;
        if (static_cast<size_t>(at - shared->begin) >= shared->bytes) return;
    }
    const size_t first = static_cast<size_t>(at - shared->begin);
    if (bytes > shared->bytes - first) bytes = shared->bytes - first;
    unsigned char* const written = shared->written + first;
    if (write) {
        memset(written, 1, bytes);
    } else if (memchr(written, 0, bytes)) {
        report_unwritten(space, *shared, at, bytes, where);
    }
}

void watch_atomic(const void* address, size_t bytes, Site site) {
    access(address, bytes, false, Place{site, 0, 0, 0});
    access(address, bytes, true, Place{site, 0, 0, 0});
}

}  // namespace cuda_host

// The return address lies behind the call: one less lies in the line that makes it.
#define CUDA_HOST_ACCESS(bytes, write)                                                              \
    cuda_host::access(address, bytes, write,                                                        \
                      cuda_host::Place{cuda_host::Site{nullptr, 0},                                 \
                                       reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1, 0, 0})

extern "C" {
#pragma GCC visibility push(default)
#define CUDA_HOST_HOOKS(bytes)                                                              \
    void __tsan_read##bytes(void* address) { CUDA_HOST_ACCESS(bytes, false); }              \
    void __tsan_write##bytes(void* address) { CUDA_HOST_ACCESS(bytes, true); }              \
    void __tsan_volatile_read##bytes(void* address) { CUDA_HOST_ACCESS(bytes, false); }     \
    void __tsan_volatile_write##bytes(void* address) { CUDA_HOST_ACCESS(bytes, true); }     \
    void __tsan_unaligned_read##bytes(void* address) { CUDA_HOST_ACCESS(bytes, false); }    \
    void __tsan_unaligned_write##bytes(void* address) { CUDA_HOST_ACCESS(bytes, true); }    \
    void __tsan_read_write##bytes(void* address) {                                          \
        CUDA_HOST_ACCESS(bytes, false);                                                     \
        CUDA_HOST_ACCESS(bytes, true);                                                      \
    }
CUDA_HOST_HOOKS(1)
CUDA_HOST_HOOKS(2)
CUDA_HOST_HOOKS(4)
CUDA_HOST_HOOKS(8)
CUDA_HOST_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) { CUDA_HOST_ACCESS(bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { CUDA_HOST_ACCESS(bytes, true); }
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
#pragma GCC visibility pop
}
