// Workers, each running blocks until none is left, and the launch that sets them going.
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <initializer_list>
#include <new>

#include "schedule.h"

namespace cuda_host {

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
    uintptr_t base;
    uintptr_t low;
    uintptr_t high;
};

static int find_code(dl_phdr_info* info, size_t, void* data) {
    CodeRange& range = *static_cast<CodeRange*>(data);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        const uintptr_t low = info->dlpi_addr + header.p_vaddr;
        if (header.p_type != PT_LOAD || range.entry < low || range.entry >= low + header.p_memsz) continue;
        range.base = info->dlpi_addr;
        range.low = low;
        range.high = low + header.p_memsz;
        return 1;
    }
    return 0;
}

// Find the kernel's code and shared memory, and make its dynamic shared memory.
void Worker::find_memory() {
    const CudaHostLaunch& spec = *launch->spec;
    CodeRange code{reinterpret_cast<uintptr_t>(spec.entry), 0, 0, 0};
    dl_iterate_phdr(find_code, &code);
    code_base = code.base;
    code_low = code.low;
    code_high = code.high;

    static_shared.begin = static_cast<char*>(spec.shared_begin);
    static_shared.bytes = spec.shared_bytes_static;
    if (spec.shared_anchor) {
        SharedRange shared{static_cast<const char*>(spec.shared_anchor()), nullptr, 0};
        dl_iterate_phdr(find_shared, &shared);
        static_shared.begin = shared.begin;
        static_shared.bytes = shared.bytes;
    }
    if (spec.shared_bytes != dynamic_shared.bytes) {
        free(dynamic_shared.begin);
        // Exactly as long as asked for, so that a sanitizer sees the first byte beyond.
        void* memory = nullptr;
        if (spec.shared_bytes && posix_memalign(&memory, 128, spec.shared_bytes) != 0) abort();
        dynamic_shared.begin = static_cast<char*>(memory);
        dynamic_shared.bytes = spec.shared_bytes;
    }
#ifdef CUDA_HOST_WATCH
    for (SharedMemory* shared : {&static_shared, &dynamic_shared})
        shared->written = static_cast<unsigned char*>(realloc(shared->written, shared->bytes + 1));
#endif
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

    find_memory();
    block.dynamic_shared = dynamic_shared.begin;

    stack_t before{};
    const stack_t signal_stack{signal_stack_memory, 0, sizeof signal_stack_memory};
    sigaltstack(&signal_stack, &before);
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

    while (!__atomic_load_n(&given.failed, __ATOMIC_RELAXED)) {
        const uint64_t at = __atomic_fetch_add(&given.next, 1, __ATOMIC_RELAXED);
        if (at >= given.num_blocks) break;
        if (!run_block(given.order ? given.order[at] : at)) break;
    }
    if (has_timer) timer_delete(timer);
    sigaltstack(&before, nullptr);
    this_worker = nullptr;
}

template <class T>
static T* make() {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(T)) != 0) abort();
    return new (memory) T;
}

// Threads that live as long as the process. A forked child has none of them, and starts its own.
class Pool {
public:
    void run(Launch& launch, unsigned workers) {
        const Lock one_launch(launching_);
        if (!own_) own_ = make<Worker>();
        while (threads_ + 1 < workers && start_thread()) threads_++;
        if (workers > threads_ + 1) workers = threads_ + 1;
        {
            const Lock hold(lock_);
            launch_ = &launch;
            wanted_ = busy_ = workers - 1;
            turn_++;
        }
        if (workers > 1) pthread_cond_broadcast(&start_);
        own_->run(launch);
        const Lock hold(lock_);
        while (busy_ != 0) pthread_cond_wait(&done_, &lock_);
    }

private:
    struct Member {
        Pool* pool;
        unsigned number;
        uint64_t turn;
    };

    bool start_thread() {
        auto* member = make<Member>();
        *member = Member{this, threads_, turn_};
        pthread_t thread;
        if (pthread_create(&thread, nullptr, [](void* given) -> void* { serve(*static_cast<Member*>(given)); }, member) != 0)
            return false;
        pthread_detach(thread);
        return true;
    }

    [[noreturn]] static void serve(const Member& member) {
        Pool& pool = *member.pool;
        auto* worker = make<Worker>();
        for (uint64_t seen = member.turn;;) {
            Launch* launch;
            {
                const Lock hold(pool.lock_);
                while (pool.turn_ == seen || member.number >= pool.wanted_) pthread_cond_wait(&pool.start_, &pool.lock_);
                seen = pool.turn_;
                launch = pool.launch_;
            }
            worker->run(*launch);
            const Lock hold(pool.lock_);
            pool.busy_--;
            pthread_cond_signal(&pool.done_);
        }
    }

    pthread_mutex_t launching_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t start_ = PTHREAD_COND_INITIALIZER;
    pthread_cond_t done_ = PTHREAD_COND_INITIALIZER;
    Launch* launch_ = nullptr;
    Worker* own_ = nullptr;
    unsigned threads_ = 0, wanted_ = 0, busy_ = 0;
    uint64_t turn_ = 0;
};

static Pool* pool = make<Pool>();

static bool prepare() {
    struct sigaction action {};
    action.sa_sigaction = tick;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigaction(tick_signal(), &action, nullptr);
    pthread_atfork(nullptr, nullptr, [] { pool = make<Pool>(); });
    return true;
}
[[maybe_unused]] static const bool prepared = prepare();

static void run_launch(const CudaHostLaunch* spec, CudaHostFailure* failure) {
    Launch launch;
    launch.spec = spec;
    launch.failure = failure;
    launch.num_blocks = static_cast<uint64_t>(spec->grid[0]) * spec->grid[1] * spec->grid[2];
    if (spec->shuffled) {
        launch.order = static_cast<uint32_t*>(malloc(launch.num_blocks * sizeof(uint32_t)));
        if (!launch.order) abort();
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
#ifndef CUDA_HOST_ADDRESS
    struct sigaction action {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int number : FAULTS) sigaction(number, &action, &faults_before[number]);
#endif
    pool->run(launch, workers);
    free(launch.order);
#ifndef CUDA_HOST_ADDRESS
    for (const int number : FAULTS) sigaction(number, &faults_before[number], nullptr);
#endif
}

}  // namespace cuda_host

extern "C" __attribute__((visibility("default"))) void cuda_host_launch(const CudaHostLaunch* spec,
                                                                        CudaHostFailure* failure) {
    cuda_host::run_launch(spec, failure);
}
