// The machine that runs a kernel on the CPU: fibers, warps, barriers, workers, and the errors they report.
//
// Scheduling of a block: lanes that can run are bits in their warp's `ready` mask, warps with such lanes are bits in
// `ready_warps`. A lane runs until it must wait, then switches straight to the next ready lane, of its own warp if
// there is one. Whoever arrives last at a rendezvous computes the result for all, marks them ready and goes on. When
// no lane is ready and not all have exited, the block has deadlocked.
#include "runtime.h"

#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef CUDA_HOST_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

__attribute__((tls_model("initial-exec"))) __thread Lane* current;
__attribute__((tls_model("initial-exec"))) __thread Block* current_block;

}  // namespace cuda_host

using namespace cuda_host;

// Saves the registers a C++ call preserves on the running stack, leaves its stack pointer in *from, and continues on
// the stack `to`. The floating-point control words are not saved: kernels do not change them.
extern "C" void cuda_host_switch(void** from, void* to);
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

extern "C" {

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
    int32_t line;  // 0: unknown, then `address` may tell
    uint64_t address;
    uint64_t block_number;
    uint32_t block[3];
    uint32_t thread[3];
    char file[512];
    char message[1024];
};

}  // extern "C"

namespace cuda_host {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t GUARD_BYTES = 4096;
constexpr int NAMED_BARRIERS = 16;
constexpr int POISON = 0xff;  // NaN as float, half and bfloat16

struct Warp {
    unsigned ready;    // can run
    unsigned alive;    // exist and have not exited
    unsigned waiting;  // in a warp operation
    unsigned active;   // in __activemask
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
    std::mutex failure_lock;
    std::atomic<bool> failed{false};
    std::atomic<uint64_t> next{0};
    uint64_t num_blocks;
    std::vector<uint32_t> order;  // empty: as numbered
};

struct Worker {
    void* stack_pointer = nullptr;  // of run_block, while lanes run
    void* fake_stack = nullptr;
    const void* stack_low = nullptr;
    size_t stack_bytes = 0;
    bool in_lanes = false;
    bool deadlocked = false;
    Launch* launch = nullptr;
    RunningBlock block;
    Lane lanes[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    char* stacks = nullptr;
    unsigned num_stacks = 0;
    void* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    // The timer that finds a spin: `progress` counts what only a living block does.
    uint64_t progress = 0;
    uint64_t progress_seen = 0;
    double stuck_seconds = 0;
    uint64_t switches = 0;
    uint64_t switches_seen = 0;
    uintptr_t code_low = 0;
    uintptr_t code_high = 0;

    ~Worker();
    void need_stacks(unsigned count);
    void run(Launch& launch);
    bool run_block(uint64_t number);
};

static __attribute__((tls_model("initial-exec"))) __thread Worker* this_worker;

static RunningBlock* running() { return static_cast<RunningBlock*>(current_block); }

// --- failures -----------------------------------------------------------------------------------------------------

static void record(Launch& launch, const RunningBlock& block, const uint3& thread, Site site, uint64_t address,
                   const char* message) {
    std::lock_guard<std::mutex> hold(launch.failure_lock);
    CudaHostFailure& failure = *launch.failure;
    if (failure.failed && failure.block_number <= block.number) return;
    failure.failed = 1;
    failure.block_number = block.number;
    failure.line = site.line;
    failure.address = address;
    const uint32_t b[3] = {block.index.x, block.index.y, block.index.z};
    const uint32_t t[3] = {thread.x, thread.y, thread.z};
    memcpy(failure.block, b, sizeof b);
    memcpy(failure.thread, t, sizeof t);
    snprintf(failure.file, sizeof failure.file, "%s", site.file ? site.file : "");
    snprintf(failure.message, sizeof failure.message, "%s", message);
    launch.failed.store(true);
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
    record(*running()->worker->launch, *running(), culprit.thread, site, 0, message);
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

// --- switching ----------------------------------------------------------------------------------------------------

static inline unsigned next_random(RunningBlock& block) {
    // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled".
    uint64_t x = block.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    block.random = x;
    return static_cast<unsigned>(x * 0x2545f4914f6cdd1dull >> 32);
}

static inline unsigned first_bit_from(unsigned bits, unsigned start) {
    const unsigned rotated = bits >> (start & 31u) | bits << (-start & 31u);
    return (static_cast<unsigned>(__builtin_ctz(rotated)) + start) & 31u;
}

// Take the next lane to run, or null: `after` is the warp to prefer, from the lane behind `lane` on.
static inline Lane* pick(RunningBlock& block, Warp* prefer, unsigned lane) {
    Warp* warps = block.worker->warps;
    Warp* warp = prefer;
    unsigned start = lane + 1;
    bool stay = warp && warp->ready;
    if (block.random) {
        const unsigned random = next_random(block);
        start = random;
        stay = stay && (random >> 5 & 3u) != 0;  // now and then, another warp goes first
    }
    if (!stay) {
        if (!block.ready_warps) return nullptr;
        const unsigned from = block.random ? next_random(block) : prefer ? static_cast<unsigned>(prefer - warps) : 0;
        warp = warps + first_bit_from(block.ready_warps, from);
        if (!block.random && warp != prefer) start = 0;
    }
    const unsigned chosen = first_bit_from(warp->ready, start);
    warp->ready &= ~(1u << chosen);
    if (!warp->ready) block.ready_warps &= ~(1u << (warp - warps));
    return warp->lanes + chosen;
}

static inline void make_ready(RunningBlock& block, Warp* warp, unsigned lanes) {
    if (!lanes) return;
    warp->ready |= lanes;
    block.ready_warps |= 1u << (warp - block.worker->warps);
}

static inline void switch_lanes(Lane* from, Lane* to) {
    current = to;
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_start_switch_fiber(from->state == State::Exited ? nullptr : &from->fake_stack, to->stack_low,
                                   to->stack_bytes);
#endif
    cuda_host_switch(&from->stack_pointer, to->stack_pointer);
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Let the lanes parked in __activemask go whose warp has nothing else to run: they have converged.
static bool release_active(RunningBlock& block) {
    bool released = false;
    for (unsigned w = 0; w < block.num_warps; w++) {
        Warp& warp = block.worker->warps[w];
        if (warp.ready || !warp.active) continue;
        const Site site = warp.lanes[__builtin_ctz(warp.active)].site;
        unsigned together = 0;
        for (unsigned rest = warp.active; rest; rest &= rest - 1) {
            const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
            if (warp.lanes[lane].site.line == site.line) together |= 1u << lane;
        }
        for (unsigned rest = together; rest; rest &= rest - 1) {
            const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
            warp.result[lane] = together;
            warp.lanes[lane].state = State::Ready;
        }
        warp.active &= ~together;
        make_ready(block, &warp, together);
        released = true;
    }
    return released;
}

[[noreturn]] static void report_deadlock(RunningBlock& block) {
    // Name a lane that waits in a warp operation and one it waits for, else one at a barrier and one elsewhere.
    Lane* lanes = block.worker->lanes;
    const Lane* waiter = nullptr;
    const Lane* missing = nullptr;
    for (unsigned i = 0; i < block.count && !missing; i++) {
        Lane& lane = lanes[i];
        if (lane.state == State::AtWarpOp) {
            const unsigned absent = lane.mask & ~lane.warp->waiting;
            if (absent) waiter = &lane, missing = lane.warp->lanes + __builtin_ctz(absent);
        }
    }
    for (unsigned i = 0; i < block.count && !missing; i++)
        if (lanes[i].state == State::AtBarrier || lanes[i].state == State::AtNamedBarrier) {
            waiter = &lanes[i];
            for (unsigned j = 0; j < block.count; j++)
                if (lanes[j].state != lanes[i].state || lanes[j].barrier != lanes[i].barrier) missing = &lanes[j];
            if (!missing) break;
        }
    if (!waiter) waiter = lanes;
    const Text other = missing ? describe(*missing) : Text{"no thread is left to arrive"};
    fail(*waiter, waiter->site, "%s can never complete: %s", waiter->name ? waiter->name : "the block", other.text);
}

// Run others until something makes `me` ready again.
static inline void wait(RunningBlock& block, Lane* me) {
    me->spins = 0;
    block.worker->switches++;
    Lane* next = pick(block, me->warp, me->index);
    if (__builtin_expect(!next, 0)) {
        if (release_active(block)) next = pick(block, me->warp, me->index);
        if (!next) report_deadlock(block);
    }
    if (next != me) switch_lanes(me, next);
}

// --- warp operations ----------------------------------------------------------------------------------------------

[[noreturn]] static void bad_mask(const Lane& me, unsigned mask, const char* name, Site site) {
    if (!(mask >> me.index & 1u))
        fail(me, site, "%s: mask 0x%08x does not name the calling lane %u", name, mask, me.index);
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(mask & ~me.warp->alive));
    const Lane& other = me.warp->lanes[lane];
    if (&other >= running()->worker->lanes + running()->count)
        fail(me, site, "%s: mask 0x%08x names lane %u, but the block's last warp has only %u lanes", name, mask, lane,
             (running()->count - 1) % 32 + 1);
    fail(me, site, "%s: mask 0x%08x names lane %u, but %s", name, mask, lane, describe(other).text);
}

static void complete(Warp& warp, Op op, unsigned mask, const char* name, Site site) {
    unsigned bits = 0;
    switch (op) {
        case Op::Shuffle:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                const unsigned source = warp.source[lane];
                if (__builtin_expect(!(mask >> source & 1u), 0))
                    fail(warp.lanes[lane], warp.lanes[lane].site, "%s: lane %u reads lane %u, which mask 0x%08x does not name",
                         name, lane, source, mask);
                warp.result[lane] = warp.value[source];
            }
            return;
        case Op::SyncWarp:
            return;
        case Op::Ballot:
        case Op::Any:
        case Op::All:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                bits |= static_cast<unsigned>(warp.value[lane]) << lane;
            }
            if (op == Op::Any) bits = bits != 0;
            if (op == Op::All) bits = bits == mask;
            for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = bits;
            return;
        case Op::MatchAny:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                uint64_t same = 0;
                for (unsigned others = mask; others; others &= others - 1) {
                    const unsigned other = static_cast<unsigned>(__builtin_ctz(others));
                    if (warp.value[other] == warp.value[lane]) same |= 1ull << other;
                }
                warp.result[lane] = same;
            }
            return;
        case Op::MatchAll:
            bits = mask;
            for (unsigned rest = mask; rest; rest &= rest - 1)
                if (warp.value[__builtin_ctz(rest)] != warp.value[__builtin_ctz(mask)]) bits = 0;
            for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = bits;
            return;
        default:
            break;
    }
    uint32_t total = static_cast<uint32_t>(warp.value[__builtin_ctz(mask)]);
    for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) {
        const uint32_t value = static_cast<uint32_t>(warp.value[__builtin_ctz(rest)]);
        const int32_t a = static_cast<int32_t>(total), b = static_cast<int32_t>(value);
        if (op == Op::ReduceAdd) total += value;
        if (op == Op::ReduceMin) total = a < b ? total : value;
        if (op == Op::ReduceMax) total = a > b ? total : value;
        if (op == Op::ReduceMinUnsigned) total = total < value ? total : value;
        if (op == Op::ReduceMaxUnsigned) total = total > value ? total : value;
        if (op == Op::ReduceAnd) total &= value;
        if (op == Op::ReduceOr) total |= value;
        if (op == Op::ReduceXor) total ^= value;
    }
    (void)site;
    for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = total;
}

uint64_t warp_op(Op op, unsigned mask, uint64_t value, int source, const char* name, Site site) {
    Lane* const me = current;
    Warp& warp = *me->warp;
    RunningBlock& block = *running();
    const unsigned bit = 1u << me->index;
    me->name = name;
    me->site = site;
    me->mask = mask;
    me->op = op;
    if (__builtin_expect(!(mask & bit) || (mask & ~warp.alive), 0)) bad_mask(*me, mask, name, site);
    warp.value[me->index] = value;
    warp.source[me->index] = static_cast<unsigned char>(source);
    const unsigned met = warp.waiting & mask;
    if (met) {
        const Lane& other = warp.lanes[__builtin_ctz(met)];
        if (__builtin_expect(other.mask != mask || other.op != op, 0))
            fail(*me, site, "%s (mask 0x%08x) meets another operation: %s", name, mask, describe(other).text);
    }
    if ((met | bit) != mask) {
        warp.waiting |= bit;
        me->state = State::AtWarpOp;
        wait(block, me);
        return warp.result[me->index];
    }
    complete(warp, op, mask, name, site);
    warp.waiting &= ~mask;
    for (unsigned rest = met; rest; rest &= rest - 1) warp.lanes[__builtin_ctz(rest)].state = State::Ready;
    make_ready(block, &warp, met);
    block.worker->progress++;
    me->spins = 0;
    return warp.result[me->index];
}

unsigned active_mask(Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = "__activemask";
    me->site = site;
    me->state = State::AtActiveMask;
    me->warp->active |= 1u << me->index;
    wait(block, me);
    return static_cast<unsigned>(me->warp->result[me->index]);
}

// --- barriers -----------------------------------------------------------------------------------------------------

static void release_everyone(RunningBlock& block, const Lane* but) {
    for (unsigned i = 0; i < block.count; i++) block.worker->lanes[i].state = State::Ready;
    for (unsigned w = 0; w < block.num_warps; w++) make_ready(block, &block.worker->warps[w], block.worker->warps[w].alive);
    Warp* warp = but->warp;
    warp->ready &= ~(1u << but->index);
    if (!warp->ready) block.ready_warps &= ~(1u << (warp - block.worker->warps));
}

static const Lane& first_exited(const RunningBlock& block) {
    const Lane* lane = block.worker->lanes;
    while (lane->state != State::Exited) lane++;
    return *lane;
}

int barrier(Barrier kind, int predicate, const char* name, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = name;
    me->site = site;
    me->barrier = 0;
    me->state = State::AtBarrier;
    if (__builtin_expect(block.exited != 0, 0))
        fail(*me, site, "%s is not reached by every thread: %s", name, describe(first_exited(block)).text);
    if (block.arrived == 0) {
        block.first_arrived = me;
        block.barrier_kind = kind;
        block.barrier_value = kind == Barrier::And;
    } else if (__builtin_expect(block.first_arrived->site.line != site.line || block.barrier_kind != kind, 0)) {
        fail(*me, site, "%s is not reached by every thread: %s", name, describe(*block.first_arrived).text);
    }
    if (kind == Barrier::Count) block.barrier_value += predicate != 0;
    if (kind == Barrier::And) block.barrier_value &= predicate != 0;
    if (kind == Barrier::Or) block.barrier_value |= predicate != 0;
    if (++block.arrived < block.count) {
        wait(block, me);
        return block.barrier_result;
    }
    block.arrived = 0;
    block.barrier_result = block.barrier_value;
    release_everyone(block, me);
    block.worker->progress++;
    me->spins = 0;
    return block.barrier_result;
}

void named_barrier(int id, int count, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = "named barrier";
    me->site = site;
    me->barrier = id;
    if (id < 1 || id >= NAMED_BARRIERS)
        fail(*me, site, "named barrier (%d) must be from 1 to %d", id, NAMED_BARRIERS - 1);
    if (count < 32 || count % 32 != 0 || static_cast<unsigned>(count) > (block.count + 31) / 32 * 32)
        fail(*me, site, "named barrier %d: count (%d) must be a multiple of 32 within the block", id, count);
    NamedBarrier& meeting = block.named[id];
    if (meeting.arrived == 0) meeting.expected = count;
    if (meeting.expected != count)
        fail(*me, site, "named barrier %d: count (%d) differs from that of the threads that wait (%d)", id, count,
             meeting.expected);
    if (++meeting.arrived < count) {
        me->state = State::AtNamedBarrier;
        wait(block, me);
        return;
    }
    meeting.arrived = 0;
    for (unsigned i = 0; i < block.count; i++) {
        Lane& lane = block.worker->lanes[i];
        if (lane.state != State::AtNamedBarrier || lane.barrier != id) continue;
        lane.state = State::Ready;
        make_ready(block, lane.warp, 1u << lane.index);
    }
    block.worker->progress++;
}

// --- spins --------------------------------------------------------------------------------------------------------

void spin_point_slow(const char* name, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = name;
    me->site = site;
    if (block.worker->stuck_seconds >= block.worker->launch->spec->spin_seconds)
        fail(*me, site, "%s: no thread of the block has got any further for %g s: a loop that never ends", name,
             block.worker->stuck_seconds);
    make_ready(block, me->warp, 1u << me->index);
    wait(block, me);
}

void trap(const char* what, Site site) { fail(*current, site, "%s", what); }

constexpr double TICK_SECONDS = 0.02;
static int tick_signal() { return SIGRTMAX - 2; }

// A worker's processor-time timer: find a block that makes no progress, and let others run where a lane neither
// waits nor calls anything (a loop on a volatile word).
static void tick(int, siginfo_t*, void* context) {
    Worker* worker = this_worker;
    if (!worker || !worker->in_lanes || !current) return;
    const uint64_t progress = worker->progress;
    const double limit = worker->launch->spec->spin_seconds;
    if (progress != worker->progress_seen) {
        worker->progress_seen = progress;
        worker->stuck_seconds = 0;
        worker->switches_seen = worker->switches;
        return;
    }
    worker->stuck_seconds += TICK_SECONDS;
    const bool switching = worker->switches != worker->switches_seen;
    worker->switches_seen = worker->switches;
    // Only inside the kernel's own code is it safe to leave: no lock of the C library, nothing of this file half done.
    const auto address = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (address < worker->code_low || address >= worker->code_high || switching) return;
    Lane* const me = current;
    RunningBlock& block = *running();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, tick_signal());
    if (worker->stuck_seconds >= limit) {
        pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
        worker->in_lanes = false;
        char message[256];
        snprintf(message, sizeof message, "no thread of the block has got any further for %g s: a loop that never ends",
                 worker->stuck_seconds);
        record(*worker->launch, block, me->thread, Site{me->site.file, 0}, address, message);
        switch_to_worker(me);
    }
    if (!block.ready_warps) return;
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    make_ready(block, me->warp, 1u << me->index);
    wait(block, me);
}

// --- a block ------------------------------------------------------------------------------------------------------

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
    if (stacks) munmap(stacks, num_stacks * STACK_BYTES);
    void* memory = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "cuda_host: no address space for %u stacks\n", count);
        abort();
    }
    stacks = static_cast<char*>(memory);
    num_stacks = count;
    // A guard page a stack, as far as the kernel's limit on mappings goes.
    for (unsigned i = 0; i < count; i++)
        if (mprotect(stacks + i * STACK_BYTES, GUARD_BYTES, PROT_NONE) != 0) break;
}

Worker::~Worker() {
    if (stacks) munmap(stacks, num_stacks * STACK_BYTES);
    free(dynamic);
}

static uint64_t mixed(uint64_t x) {
    // splitmix64's finaliser.
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

bool Worker::run_block(uint64_t number) {
    const CudaHostLaunch& spec = *launch->spec;
    block.number = number;
    block.index = {static_cast<unsigned>(number % spec.grid[0]),
                   static_cast<unsigned>(number / spec.grid[0] % spec.grid[1]),
                   static_cast<unsigned>(number / spec.grid[0] / spec.grid[1])};
    block.exited = block.arrived = block.ready_warps = 0;
    memset(block.named, 0, sizeof block.named);
    block.random = spec.shuffled ? mixed(spec.seed ^ mixed(number)) | 1u : 0;
    for (unsigned w = 0; w < block.num_warps; w++) {
        const unsigned here = block.count - w * 32 < 32 ? block.count - w * 32 : 32;
        Warp& warp = warps[w];
        warp.alive = here == 32 ? 0xffffffffu : (1u << here) - 1;
        warp.waiting = warp.active = 0;
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
    return block.exited == block.count && !launch->failed.load();
}

// --- a worker -----------------------------------------------------------------------------------------------------

struct SharedRange {
    const char* anchor;
    char* begin;
    size_t bytes;
};

static int find_shared(dl_phdr_info* info, size_t, void* data) {
    SharedRange& range = *static_cast<SharedRange*>(data);
    const char* begin = static_cast<const char*>(info->dlpi_tls_data);
    if (!begin) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_TLS || range.anchor < begin || range.anchor >= begin + header.p_memsz) continue;
        range.begin = const_cast<char*>(begin);
        range.bytes = header.p_memsz;
        return 1;
    }
    return 0;
}

struct CodeRange {
    uintptr_t entry;
    uintptr_t low;
    uintptr_t high;
};

static int find_code(dl_phdr_info* info, size_t, void* data) {
    CodeRange& range = *static_cast<CodeRange*>(data);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        const uintptr_t low = info->dlpi_addr + header.p_vaddr;
        if (header.p_type != PT_LOAD || range.entry < low || range.entry >= low + header.p_memsz) continue;
        range.low = low;
        range.high = low + header.p_memsz;
        return 1;
    }
    return 0;
}

void Worker::run(Launch& given) {
    this_worker = this;
    launch = &given;
    const CudaHostLaunch& spec = *given.spec;
    block.worker = this;
    block.threads = dim3(spec.block[0], spec.block[1], spec.block[2]);
    block.grid = dim3(spec.grid[0], spec.grid[1], spec.grid[2]);
    block.count = spec.block[0] * spec.block[1] * spec.block[2];
    block.num_warps = (block.count + 31) / 32;
    need_stacks(block.count);
    for (unsigned i = 0; i < block.count; i++) {
        Lane& lane = lanes[i];
        lane.thread = {i % spec.block[0], i / spec.block[0] % spec.block[1], i / spec.block[0] / spec.block[1]};
        lane.index = i % 32;
        lane.warp = &warps[i / 32];
        lane.block = &block;
        char* low = stacks + i * STACK_BYTES + GUARD_BYTES;
        char* high = stacks + (i + 1) * STACK_BYTES;
        lane.stack_low = low;
        lane.stack_bytes = static_cast<size_t>(high - low);
        // Stagger the tops: stacks a power of two apart would all want the same cache lines.
        lane.entered_with = high - 16 - (i % 61) * 192;
    }

    SharedRange shared{nullptr, static_cast<char*>(spec.shared_begin), spec.shared_bytes_static};
    if (spec.shared_anchor) {
        shared.anchor = static_cast<const char*>(spec.shared_anchor());
        dl_iterate_phdr(find_shared, &shared);
    }
    CodeRange code{reinterpret_cast<uintptr_t>(spec.entry), 0, 0};
    dl_iterate_phdr(find_code, &code);
    code_low = code.low;
    code_high = code.high;

    if (spec.shared_bytes != dynamic_bytes) {
        free(dynamic);
        // Exactly as long as asked for, so that a sanitizer sees the first byte beyond.
        dynamic = nullptr;
        if (spec.shared_bytes && posix_memalign(&dynamic, 128, spec.shared_bytes) != 0) abort();
        dynamic_bytes = spec.shared_bytes;
    }
    block.dynamic_shared = dynamic;
    block.dynamic_bytes = dynamic_bytes;

    timer_t timer{};
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = tick_signal();
    event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
    const bool has_timer = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    itimerspec every{};
    every.it_value.tv_nsec = every.it_interval.tv_nsec = static_cast<long>(TICK_SECONDS * 1e9);
    if (has_timer) timer_settime(timer, 0, &every, nullptr);
    progress_seen = progress;
    stuck_seconds = 0;

    while (!given.failed.load(std::memory_order_relaxed)) {
        const uint64_t at = given.next.fetch_add(1);
        if (at >= given.num_blocks) break;
        if (shared.bytes) memset(shared.begin, POISON, shared.bytes);
        if (dynamic_bytes) memset(dynamic, POISON, dynamic_bytes);
        if (!run_block(given.order.empty() ? at : given.order[at])) break;
    }
    if (has_timer) timer_delete(timer);
    this_worker = nullptr;
}

// --- the pool -----------------------------------------------------------------------------------------------------

// Threads that live as long as the process. A forked child has none of them, and starts its own.
class Pool {
public:
    void run(Launch& launch, unsigned workers) {
        std::lock_guard<std::mutex> one_launch(launching_);
        if (!own_) own_ = new Worker;
        while (threads_ + 1 < workers) {
            std::thread(&Pool::serve, this, threads_).detach();
            threads_++;
        }
        {
            std::lock_guard<std::mutex> hold(lock_);
            launch_ = &launch;
            wanted_ = workers - 1;
            busy_ = workers - 1;
            turn_++;
        }
        if (workers > 1) start_.notify_all();
        own_->run(launch);
        std::unique_lock<std::mutex> hold(lock_);
        done_.wait(hold, [this] { return busy_ == 0; });
    }

private:
    void serve(unsigned number) {
        auto* worker = new Worker;
        uint64_t seen = 0;
        for (;;) {
            Launch* launch;
            {
                std::unique_lock<std::mutex> hold(lock_);
                start_.wait(hold, [&] { return turn_ != seen && number < wanted_; });
                seen = turn_;
                launch = launch_;
            }
            worker->run(*launch);
            {
                std::lock_guard<std::mutex> hold(lock_);
                busy_--;
            }
            done_.notify_one();
        }
    }

    std::mutex launching_, lock_;
    std::condition_variable start_, done_;
    Launch* launch_ = nullptr;
    Worker* own_ = nullptr;
    unsigned threads_ = 0, wanted_ = 0, busy_ = 0;
    uint64_t turn_ = 0;
};

static Pool* pool = new Pool;

static bool prepare() {
    struct sigaction action {};
    action.sa_sigaction = tick;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigaction(tick_signal(), &action, nullptr);
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
}
static const bool prepared = prepare();

}  // namespace cuda_host

extern "C" __attribute__((visibility("default"))) void cuda_host_launch(const CudaHostLaunch* spec,
                                                                        CudaHostFailure* failure) {
    (void)prepared;
    Launch launch;
    launch.spec = spec;
    launch.failure = failure;
    launch.num_blocks = static_cast<uint64_t>(spec->grid[0]) * spec->grid[1] * spec->grid[2];
    if (spec->shuffled) {
        launch.order.resize(launch.num_blocks);
        uint64_t state = mixed(spec->seed);
        for (uint64_t i = 0; i < launch.num_blocks; i++) {
            state = mixed(state);
            const uint64_t j = state % (i + 1);
            launch.order[i] = launch.order[j];
            launch.order[j] = static_cast<uint32_t>(i);
        }
    }
    unsigned workers = spec->workers ? spec->workers : 1;
    if (workers > launch.num_blocks) workers = static_cast<unsigned>(launch.num_blocks);
    pool->run(launch, workers);
}
