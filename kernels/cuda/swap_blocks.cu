// Move whole blocks from one pool to another: between the GPU's memory and the host's.
//
// Grid (num_swaps, parts), THREADS threads. A block is contiguous and holds all layers, keys and values, so one swap
// is one run of 16-byte vectors, cut into gridDim.y parts that interleave; one compiled kernel serves every layout.
// The host's pool is pinned memory that the GPU reaches through the bus at the same address. An access to it takes
// microseconds, so a thread has UNROLL loads in flight before it stores the first. The swaps of one list run in
// parallel: no destination appears twice, and the pools do not overlap.
//
// Versions
//   1  UNROLL loads ahead of the stores; not yet timed on a GPU. Compiled for sm_90: 40 registers, no spills.
//
// Specialised by: THREADS, UNROLL

#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) swap_blocks(
    // [num_destination_blocks, vectors_per_block]
    uint4* destination,
    // [num_source_blocks, vectors_per_block]
    const uint4* source,
    // [num_swaps, 2]: source block, destination block
    const int* swaps,
    long long vectors_per_block) {
    const int* swap = swaps + 2ll * blockIdx.x;
    const uint4* from = source + swap[0] * vectors_per_block;
    uint4* to = destination + swap[1] * vectors_per_block;
    const long long stride = static_cast<long long>(gridDim.y) * THREADS;
    const long long first = static_cast<long long>(blockIdx.y) * THREADS + threadIdx.x;
    for (long long start = first; start < vectors_per_block; start += UNROLL * stride) {
        uint4 bits[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long index = start + i * stride;
            if (index < vectors_per_block) bits[i] = load16_streaming(from + index);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long index = start + i * stride;
            if (index < vectors_per_block) store16(to + index, bits[i]);
        }
    }
}
