// What interrupts a lane: a loop that waits, which must let others run and must not last for ever; a processor fault.
#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

#include "schedule.h"

namespace cuda_host {

static struct sigaction faults_before[NSIG];
constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE};

#define STUCK "no thread of the block has got any further for %g s: a loop that never ends"

void spin_point_slow(const char* name, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = name;
    me->site = site;
    if (block.worker->stuck_seconds >= block.worker->launch->spec->spin_seconds)
        fail(*me, site, STUCK, block.worker->launch->spec->spin_seconds);
    give_way(block, me);
}

void trap(const char* what, Site site) { fail(*current, site, "%s", what); }

constexpr double TICK_SECONDS = 0.01;
// A loop that passes barriers makes progress, as far as anyone can tell: it may last so many times longer.
constexpr double BLOCK_LIMITS = 30;
// The plain and the watching runtime may both be loaded: each has a signal of its own.
#ifdef CUDA_HOST_WATCH
static int tick_signal() { return SIGRTMAX - 3; }
#else
static int tick_signal() { return SIGRTMAX - 2; }
#endif

// A worker's processor-time timer: find a block that makes no progress, and let others run where a lane neither
// waits nor calls anything (a loop on a volatile word).
static void tick(int, siginfo_t*, void* context) {
    Worker* worker = this_worker;
    if (!worker || !worker->in_lanes || !current) return;
    const double limit = worker->launch->spec->spin_seconds;
    worker->block_seconds += TICK_SECONDS;
    worker->stuck_seconds = worker->progress == worker->progress_seen ? worker->stuck_seconds + TICK_SECONDS : 0;
    worker->progress_seen = worker->progress;
    const bool switching = worker->switches != worker->switches_seen;
    worker->switches_seen = worker->switches;
    const bool stuck = worker->stuck_seconds >= limit;
    const bool endless = worker->block_seconds >= limit * BLOCK_LIMITS;
    // Only inside the kernel's own code is it safe to leave: no lock of the C library, nothing of this file half done.
    const auto address = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (address < worker->code_low || address >= worker->code_high || !(stuck || endless || !switching))
        return;
    Lane* const me = current;
    RunningBlock& block = *running();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, tick_signal());
    if (stuck || endless) {
        pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
        worker->in_lanes = false;
        char message[256];
        snprintf(message, sizeof message, stuck ? STUCK : "the block has run for %g s: a loop that never ends",
                 stuck ? limit : limit * BLOCK_LIMITS);
        record(*worker->launch, block, me->thread, Place{Site{nullptr, 0}, address, 0, 0}, message);
        switch_to_worker(me);
    }
    if (!block.ready_warps && !block.spinning_warps) return;
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    give_way(block, me);
}

// A fault of the processor while a lane runs is an error of the kernel, unless a sanitizer is there to say more.
static void fault(int number, siginfo_t* info, void* context) {
    Worker* worker = this_worker;
    if (!worker || !worker->in_lanes || !current) {
        // Not a kernel's: as it was before the launch, where the instruction then faults again.
        sigaction(number, &faults_before[number], nullptr);
        return;
    }
    Lane* const me = current;
    char message[128];
    if (number == SIGFPE)
        snprintf(message, sizeof message, "divides an integer by zero");
    else if (info->si_code == SI_KERNEL)
        snprintf(message, sizeof message, "accesses a misaligned address");
    else if (reinterpret_cast<uintptr_t>(info->si_addr) - reinterpret_cast<uintptr_t>(me->stack_low) + GUARD_BYTES < GUARD_BYTES)
        snprintf(message, sizeof message, "overflows its stack of %zu KiB", me->stack_bytes >> 10);
    else
        snprintf(message, sizeof message, "accesses address %p, where there is no memory", info->si_addr);
    const auto address = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    const bool inside = address >= worker->code_low && address < worker->code_high;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    worker->in_lanes = false;
    record(*worker->launch, *running(), me->thread, Place{Site{nullptr, 0}, inside ? address : 0, 0, 0}, message);
    switch_to_worker(me);
}

}  // namespace cuda_host
