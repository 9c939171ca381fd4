// Store the keys and values of this step's tokens in their slots of the pool.
//
// Grid num_tokens, THREADS threads: a block takes one token, its threads the 16-byte vectors of that token's
// heads. A negative slot is skipped. Two tokens never share a slot.
//
// Versions
//   1  one block a token; not yet timed on a GPU. Compiled for sm_90: 32 registers, no spills.
//
// Specialised by: T, HEAD_DIM, THREADS

#include "device.cuh"
#include "pool.cuh"

constexpr int VEC = Vec16<T>::SIZE;
constexpr int ROW_VECS = HEAD_DIM / VEC;

extern "C" __global__ void __launch_bounds__(THREADS) write_kv(
    // [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, HEAD_DIM]
    T* pool,
    // [num_tokens, num_kv_heads, HEAD_DIM], rows of a token contiguous
    const T* key,
    // [num_tokens, num_kv_heads, HEAD_DIM], rows of a token contiguous
    const T* value,
    // elements from one token's key to the next
    long long key_stride,
    // elements from one token's value to the next
    long long value_stride,
    // [num_tokens]: block * tokens_per_block + offset, or negative
    const long long* slot_mapping,
    int num_layers,
    int layer,
    int num_kv_heads,
    int log2_tokens_per_block) {
    const long long token = blockIdx.x;
    const long long slot = slot_mapping[token];
    if (slot < 0) return;

    const PoolShape shape{num_layers, num_kv_heads, log2_tokens_per_block};
    T* block = pool + shape.block_of(slot) * shape.block_stride();
    for (int index = threadIdx.x; index < num_kv_heads * ROW_VECS; index += THREADS) {
        const int head = index / ROW_VECS;
        const int column = index % ROW_VECS * VEC;
        T* key_row = block + shape.head_offset(layer, head) + shape.offset_of(slot) * HEAD_DIM;
        const long long source = head * HEAD_DIM + column;
        const uint4 key_bits = load16_streaming(key + token * key_stride + source);
        const uint4 value_bits = load16_streaming(value + token * value_stride + source);
        store16(key_row + column, key_bits);
        store16(key_row + shape.value_stride() + column, value_bits);
    }
}
