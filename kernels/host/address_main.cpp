// The program that runs one launch of address-sanitised kernels, given and answered in a file.
//
// Each array of the launch gets its own allocation of exactly its size, so that the first byte beyond it lies in a red
// zone. When a sanitizer aborts, the handler below adds what the sanitizer cannot know: block, thread, arrays.
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <vector>

#include "machine.h"

extern const cuda_host::Entry cuda_host_entries[];
extern "C" void cuda_host_launch(const CudaHostLaunch* spec, CudaHostFailure* failure);

namespace {

// Written by Python (struct): keep the two in step.
struct Request {
    char kernel[256];
    CudaHostLaunch launch;    // addresses within the process are filled in here
    uint64_t shared_section;  // address of .cuda_shared within the program
    uint64_t num_regions;
    uint64_t num_arguments;
    CudaHostFailure failure;  // the answer
};

struct Region {
    uint64_t bytes;
    uint64_t skew;  // of the first byte from a multiple of 16, as in the caller's array
};

struct Argument {
    int64_t region;  // -1: a scalar or null
    uint64_t value;  // its bits, or the offset within the region
};

std::vector<char*> regions;
std::vector<uint64_t> sizes;

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say(const char* format, ...) {
    char line[256];
    va_list values;
    va_start(values, format);
    const int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (write(STDERR_FILENO, line, static_cast<size_t>(length)) != length) _exit(87);
}

void on_abort(int) {
    if (cuda_host::current && cuda_host::current_block) {
        const uint3& block = cuda_host::current_block->index;
        const uint3& thread = cuda_host::current->thread;
        say("cuda_host: at %u %u %u %u %u %u\n", block.x, block.y, block.z, thread.x, thread.y, thread.z);
        const auto* running = static_cast<cuda_host::RunningBlock*>(cuda_host::current_block);
        const cuda_host::SharedMemory& shared = running->worker->dynamic_shared;
        if (shared.bytes) say("cuda_host: region -1 %p %zu\n", static_cast<void*>(shared.begin), shared.bytes);
    }
    for (size_t i = 0; i < regions.size(); i++)
        say("cuda_host: region %zu %p %zu\n", i, static_cast<void*>(regions[i]), static_cast<size_t>(sizes[i]));
    _exit(86);
}

int first_object(dl_phdr_info* info, size_t, void* base) {
    *static_cast<uint64_t*>(base) = info->dlpi_addr;
    return 1;
}

template <class T>
void get(FILE* file, T* out, size_t count) {
    if (fread(out, sizeof(T), count, file) != count) {
        fprintf(stderr, "cuda_host: the request is cut short\n");
        exit(87);
    }
}

}  // namespace

int main(int, char** arguments) {
    FILE* file = fopen(arguments[1], "r+b");
    if (!file) {
        perror(arguments[1]);
        return 87;
    }
    Request request;
    get(file, &request, 1);
    std::vector<Region> wanted(request.num_regions);
    get(file, wanted.data(), wanted.size());
    std::vector<Argument> given(request.num_arguments);
    get(file, given.data(), given.size());
    const long data = ftell(file);
    for (const Region& region : wanted) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, region.bytes + region.skew) != 0) return 87;
        regions.push_back(static_cast<char*>(memory) + region.skew);
        sizes.push_back(region.bytes);
        get(file, regions.back(), region.bytes);
    }
    std::vector<uint64_t> values;
    for (const Argument& argument : given) {
        const bool scalar = argument.region < 0;
        values.push_back(scalar ? argument.value
                                : reinterpret_cast<uint64_t>(regions[static_cast<size_t>(argument.region)]) +
                                      argument.value);
    }
    std::vector<void*> pointers;
    for (uint64_t& value : values) pointers.push_back(&value);

    CudaHostLaunch& launch = request.launch;
    const cuda_host::Entry* entry = cuda_host_entries;
    while (entry->kernel && strcmp(entry->kernel, request.kernel) != 0) entry++;
    launch.entry = entry->call;
    launch.arguments = pointers.data();
    launch.shared_anchor = nullptr;
    uint64_t base = 0;
    dl_iterate_phdr(first_object, &base);
    launch.shared_begin = reinterpret_cast<void*>(base + request.shared_section);

    signal(SIGABRT, on_abort);
    cuda_host_launch(&launch, &request.failure);

    rewind(file);
    fwrite(&request, sizeof request, 1, file);
    fseek(file, data, SEEK_SET);
    for (size_t i = 0; i < regions.size(); i++) fwrite(regions[i], 1, sizes[i], file);
    return fclose(file) == 0 ? 0 : 87;
}
