// The errors that end a launch, and how they name who waits where.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include "machine.h"

namespace cuda_host {

// What is known of an error besides its message: the source line, or the code's address; and, where the error is one
// of shared memory, the place in it.
struct Place {
    Site site;
    uintptr_t address;
    unsigned space;
    size_t offset;
};

static void record(Launch& launch, const RunningBlock& block, const uint3& thread, const Place& place,
                   const char* message) {
    const Lock hold(launch.failure_lock);
    CudaHostFailure& failure = *launch.failure;
    if (failure.failed && failure.block_number <= block.number) return;
    failure.failed = 1;
    failure.block_number = block.number;
    failure.line = place.site.line;
    failure.address = place.address ? place.address - block.worker->code_base : 0;
    failure.space = place.space;
    failure.offset = place.offset;
    const uint32_t b[3] = {block.index.x, block.index.y, block.index.z};
    const uint32_t t[3] = {thread.x, thread.y, thread.z};
    memcpy(failure.block, b, sizeof b);
    memcpy(failure.thread, t, sizeof t);
    snprintf(failure.file, sizeof failure.file, "%s", place.site.file ? place.site.file : "");
    snprintf(failure.message, sizeof failure.message, "%s", message);
    __atomic_store_n(&launch.failed, true, __ATOMIC_SEQ_CST);
}

static void switch_to_worker(Lane* from) {
    Worker* worker = running()->worker;
    current = nullptr;
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_start_switch_fiber(nullptr, worker->stack_low, worker->stack_bytes);
#endif
    cuda_host_switch(&from->stack_pointer, worker->stack_pointer);
    __builtin_unreachable();
}

// Record an error of `culprit` and leave the block for good.
__attribute__((format(printf, 3, 4), noreturn)) static void fail(const Lane& culprit, Site site, const char* format,
                                                                  ...) {
    char message[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    record(*running()->worker->launch, *running(), culprit.thread, Place{site, 0, 0, 0}, message);
    switch_to_worker(current);
    __builtin_unreachable();
}

struct Text {
    char text[384];
};

static const char* base_name(const char* file) {
    const char* slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

static Text describe(const Lane& lane) {
    Text out;
    const uint3& t = lane.thread;
    int used = snprintf(out.text, sizeof out.text, "thread (%u, %u, %u) ", t.x, t.y, t.z);
    char* const rest = out.text + used;
    const size_t room = sizeof out.text - static_cast<size_t>(used);
    if (lane.state == State::Exited)
        snprintf(rest, room, "has exited");
    else if (lane.state == State::Ready)
        snprintf(rest, room, "runs");
    else if (lane.state == State::AtWarpOp)
        snprintf(rest, room, "waits in %s (mask 0x%08x) at %s:%d", lane.name, lane.mask, base_name(lane.site.file),
                 lane.site.line);
    else
        snprintf(rest, room, "waits in %s at %s:%d", lane.name, base_name(lane.site.file), lane.site.line);
    return out;
}

}  // namespace cuda_host
