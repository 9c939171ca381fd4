// Copy the first `valid` tokens of one pool block to another, in every layer, head, key and value.
//
// Grid (num_copies, planes), THREADS threads. A plane is the [tokens_per_block, head_dim] of one layer, one
// of key and value, and one head; its valid tokens are contiguous at both ends, so whatever the element type
// they are moved as 16-byte vectors, and one compiled kernel serves every layout. The copies of one list run
// in parallel: no block is both a source and a destination, and no destination appears twice.
//
// Versions
//   1  one block a plane; not yet timed on a GPU. Compiled for sm_90: 32 registers, no spills.
//
// Specialised by: THREADS

#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(
    // [num_blocks, planes, tokens_per_block, vectors_per_row]
    uint4* pool,
    // [num_copies, 3]: source block, destination block, valid tokens
    const int* copies,
    int planes,
    int tokens_per_block,
    int vectors_per_row) {
    const int* copy = copies + 3ll * blockIdx.x;
    const long long plane_vectors = static_cast<long long>(tokens_per_block) * vectors_per_row;
    const int valid_vectors = copy[2] * vectors_per_row;
    for (int plane = blockIdx.y; plane < planes; plane += gridDim.y) {
        const uint4* source = pool + (static_cast<long long>(copy[0]) * planes + plane) * plane_vectors;
        uint4* destination = pool + (static_cast<long long>(copy[1]) * planes + plane) * plane_vectors;
        for (int index = threadIdx.x; index < valid_vectors; index += THREADS) {
            store16(destination + index, load16(source + index));
        }
    }
}
