// The machine that runs a kernel on the CPU: what launches, workers, blocks and warps hold.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "runtime.h"

extern "C" {

// Saves the registers a C++ call preserves on the running stack, leaves its stack pointer in *from, and continues on
// the stack `to`. The floating-point control words are not saved: kernels do not change them.
void cuda_host_switch(void** from, void* to);

// What one launch asks for. Filled by Python (ctypes): keep the two in step.
struct CudaHostLaunch {
    void (*entry)(void* const* arguments);
    void* const* arguments;
    void* (*shared_anchor)();  // null where __shared__ variables are not thread-local
    void* shared_begin;        // then: where they are
    uint64_t shared_bytes_static;
    uint32_t grid[3];
    uint32_t block[3];
    uint64_t shared_bytes;  // dynamic
    uint64_t seed;
    uint32_t shuffled;
    uint32_t workers;
    double spin_seconds;
};

// Where and why a launch failed: the failing block with the lowest index, of those that ran.
struct CudaHostFailure {
    uint32_t failed;
    int32_t line;      // 0: unknown, then `address` may tell
    uint64_t address;  // of the code, within its library
    uint32_t space;    // of shared memory that `offset` lies in: 0 none, 1 static, 2 dynamic
    uint64_t offset;
    uint64_t block_number;
    uint32_t block[3];
    uint32_t thread[3];
    char file[512];
    char message[1024];
};

}  // extern "C"

// Only the C library is used, so that no C++ library need be there (the ziglang wheel would first build its own).
namespace cuda_host {

class Lock {
public:
    explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
    ~Lock() { pthread_mutex_unlock(&mutex_); }
    Lock(const Lock&) = delete;

private:
    pthread_mutex_t& mutex_;
};

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t GUARD_BYTES = 4096;
constexpr int NAMED_BARRIERS = 16;
constexpr int POISON = 0xff;  // NaN as float, half and bfloat16

struct Warp {
    unsigned ready;    // can run
    unsigned alive;    // exist and have not exited
    unsigned waiting;  // in a warp operation
    bool uniform;      // all of these in the same, with the same mask
    const Lane* first_waiting;
    unsigned active;   // in __activemask
    unsigned spinning;  // could run, but wait for another
    Lane* lanes;
    uint64_t value[32];
    uint64_t result[32];
    unsigned char source[32];
};

struct NamedBarrier {
    int expected;
    int arrived;
};

struct Worker;

// The block that a worker runs, and what its lanes share.
struct RunningBlock : Block {
    Worker* worker;
    unsigned count;  // threads
    unsigned exited;
    unsigned ready_warps;
    unsigned spinning_warps;
    unsigned num_warps;
    unsigned arrived;  // at the barrier
    const Lane* first_arrived;
    Barrier barrier_kind;
    int barrier_value;   // accumulated
    int barrier_result;  // of the last complete one; nobody can complete the next before all have read it
    NamedBarrier named[NAMED_BARRIERS];
    uint64_t random;
    uint64_t number;
};

struct Launch {
    const CudaHostLaunch* spec;
    CudaHostFailure* failure;
    pthread_mutex_t failure_lock = PTHREAD_MUTEX_INITIALIZER;
    bool failed = false;  // this and the next: atomic accesses only
    uint64_t next = 0;
    uint64_t num_blocks;
    uint32_t* order = nullptr;  // null: as numbered
};

// A stretch of shared memory, and (where watched) which of its bytes the block has written.
struct SharedMemory {
    char* begin = nullptr;
    size_t bytes = 0;
    unsigned char* written = nullptr;
};

struct Worker {
    void* stack_pointer = nullptr;  // of run_block, while lanes run
    void* fake_stack = nullptr;
    const void* stack_low = nullptr;
    size_t stack_bytes = 0;
    bool in_lanes = false;
    Launch* launch = nullptr;
    RunningBlock block;
    Lane lanes[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    char signal_stack_memory[64 * 1024];  // for a fault whose cause is a lane's stack
    char* stacks = nullptr;
    unsigned num_stacks = 0;
    SharedMemory static_shared;
    SharedMemory dynamic_shared;
    // What the timer that finds a spin looks at: `progress` counts what only a living block does.
    uint64_t progress = 0;
    uint64_t progress_seen = 0;
    double stuck_seconds = 0;
    double block_seconds = 0;
    uint64_t switches = 0;
    uint64_t switches_seen = 0;
    uintptr_t code_base = 0;
    uintptr_t code_low = 0;
    uintptr_t code_high = 0;

    void need_stacks(unsigned count);
    void find_memory();
    void poison_shared();
    void run(Launch& launch);
    bool run_block(uint64_t number);
};

static __attribute__((tls_model("initial-exec"))) __thread Worker* this_worker;

static RunningBlock* running() { return static_cast<RunningBlock*>(current_block); }

}  // namespace cuda_host
