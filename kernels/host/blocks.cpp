// One block on one worker: its lanes' stacks, their first and last steps.
#include <stdlib.h>
#include <sys/mman.h>

#ifdef CUDA_HOST_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

#include "schedule.h"

__asm__(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_host_switch, .-cuda_host_switch
)");

namespace cuda_host {

extern "C" void cuda_host_lane_main() {
    Lane* me = current;
    RunningBlock& block = *running();
    Worker* worker = block.worker;
#ifdef CUDA_HOST_ADDRESS
    const void* low = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &low, &bytes);
    if (!worker->stack_low) worker->stack_low = low, worker->stack_bytes = bytes;
#endif
    worker->launch->spec->entry(worker->launch->spec->arguments);

    me = current;
    me->state = State::Exited;
    Warp& warp = *me->warp;
    warp.alive &= ~(1u << me->index);
    block.exited++;
    worker->progress++;
    if (__builtin_expect(block.arrived != 0, 0)) {
        const Lane& other = *block.first_arrived;
        fail(other, other.site, "%s is not reached by every thread: %s", other.name, describe(*me).text);
    }
    for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
        const Lane& other = warp.lanes[__builtin_ctz(rest)];
        if (other.mask >> me->index & 1u)
            fail(other, other.site, "%s: mask 0x%08x names lane %u, but %s", other.name, other.mask, me->index,
                 describe(*me).text);
    }
    if (block.exited == block.count) switch_to_worker(me);
    wait(block, me);
    __builtin_unreachable();
}

// A lane's first frame: the switch returns here with the stack aligned as at a function's entry.
extern "C" void cuda_host_lane_start();
__asm__(R"(
.text
.type cuda_host_lane_start, @function
cuda_host_lane_start:
    xorl %ebp, %ebp
    call cuda_host_lane_main
    ud2
.size cuda_host_lane_start, .-cuda_host_lane_start
)");

void Worker::need_stacks(unsigned count) {
    if (count <= num_stacks) return;
    while (count & (count - 1)) count += count & -count;  // to a power of two, so that stacks are seldom made anew
    if (stacks) munmap(stacks, num_stacks * STACK_BYTES);
    void* memory = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "cuda_host: no address space for %u stacks\n", count);
        abort();
    }
    stacks = static_cast<char*>(memory);
    num_stacks = count;
    // A guard page a stack, up to what leaves most of the system's limit on mappings (65,530) to others.
    static unsigned guards;
    for (unsigned i = 0; i < count && __atomic_fetch_add(&guards, 1, __ATOMIC_RELAXED) < 16384; i++)
        if (mprotect(stacks + i * STACK_BYTES, GUARD_BYTES, PROT_NONE) != 0) break;
}

static uint64_t mixed(uint64_t x) {
    // splitmix64's finaliser.
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// Fill shared memory with POISON; a sanitizer's red zones in it stay as they are.
static void poison(SharedMemory& shared) {
#ifdef CUDA_HOST_ADDRESS
    for (size_t i = 0; i < shared.bytes; i++)
        if (!__asan_address_is_poisoned(shared.begin + i)) shared.begin[i] = static_cast<char>(POISON);
#else
    if (shared.bytes) memset(shared.begin, POISON, shared.bytes);
#endif
#ifdef CUDA_HOST_WATCH
    if (shared.bytes) memset(shared.written, 0, shared.bytes);
#endif
}

void Worker::poison_shared() {
    poison(static_shared);
    poison(dynamic_shared);
}

bool Worker::run_block(uint64_t number) {
    const CudaHostLaunch& spec = *launch->spec;
    block.number = number;
    block.index = {static_cast<unsigned>(number % spec.grid[0]),
                   static_cast<unsigned>(number / spec.grid[0] % spec.grid[1]),
                   static_cast<unsigned>(number / spec.grid[0] / spec.grid[1])};
    block.exited = block.arrived = block.spinning_warps = 0;
    block_seconds = 0;
    memset(block.named, 0, sizeof block.named);
    block.random = spec.shuffled ? mixed(spec.seed ^ mixed(number)) | 1u : 0;
    for (unsigned w = 0; w < block.num_warps; w++) {
        const unsigned here = block.count - w * 32 < 32 ? block.count - w * 32 : 32;
        Warp& warp = warps[w];
        warp.alive = here == 32 ? 0xffffffffu : (1u << here) - 1;
        warp.waiting = warp.active = warp.spinning = 0;
        warp.lanes = lanes + w * 32;
        warp.ready = warp.alive;
    }
    block.ready_warps = block.num_warps == 32 ? 0xffffffffu : (1u << block.num_warps) - 1;
    for (unsigned i = 0; i < block.count; i++) {
        Lane& lane = lanes[i];
        lane.state = State::Ready;
        lane.name = nullptr;
        lane.site = Site{nullptr, 0};
        lane.spins = 0;
        lane.fake_stack = nullptr;
        // What cuda_host_switch pops: six registers, then where to return to.
        void** top = static_cast<void**>(lane.entered_with);
        *--top = reinterpret_cast<void*>(cuda_host_lane_start);
        for (int r = 0; r < 6; r++) *--top = nullptr;
        lane.stack_pointer = top;
    }

    poison_shared();
    current_block = &block;
    Lane* first = pick(block, nullptr, 0);
    current = first;
    progress++;
    in_lanes = true;
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_start_switch_fiber(&fake_stack, first->stack_low, first->stack_bytes);
#endif
    cuda_host_switch(&stack_pointer, first->stack_pointer);
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    in_lanes = false;
    current_block = nullptr;
    current = nullptr;
    return block.exited == block.count && !__atomic_load_n(&launch->failed, __ATOMIC_SEQ_CST);
}

}  // namespace cuda_host
