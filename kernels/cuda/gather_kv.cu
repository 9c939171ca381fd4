// Gather the keys and values that block tables name into contiguous arrays, one sequence after the other.
//
// Grid (num_seqs, block columns), THREADS threads: a block takes one block of one sequence (and, where the
// grid has fewer columns than the table, every gridDim.y-th after it). Writes are contiguous over the whole
// block.
//
// Versions
//   1  one thread block a pool block; not yet timed on a GPU. Compiled for sm_90: 48 registers, no spills.
//
// Specialised by: T, HEAD_DIM, THREADS

#include "device.cuh"
#include "pool.cuh"

constexpr int VEC = Vec16<T>::SIZE;
constexpr int ROW_VECS = HEAD_DIM / VEC;

extern "C" __global__ void __launch_bounds__(THREADS) gather_kv(
    // [total_tokens, num_kv_heads, HEAD_DIM]
    T* key,
    // [total_tokens, num_kv_heads, HEAD_DIM]
    T* value,
    // [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, HEAD_DIM]
    const T* pool,
    // [num_seqs, table_stride]: entries past a sequence's blocks are garbage
    const int* block_tables,
    // [num_seqs + 1]: sequence s goes to the tokens [token_start[s], token_start[s + 1])
    const int* token_start,
    int table_stride,
    int num_layers,
    int layer,
    int num_kv_heads,
    int log2_tokens_per_block) {
    const int sequence = blockIdx.x;
    const PoolShape shape{num_layers, num_kv_heads, log2_tokens_per_block};
    const int tokens_per_block = 1 << log2_tokens_per_block;
    const long long first = token_start[sequence];
    const int length = static_cast<int>(token_start[sequence + 1] - first);
    const int num_blocks = (length + tokens_per_block - 1) >> log2_tokens_per_block;
    const int row_vecs = num_kv_heads * ROW_VECS;  // of one token

    for (int column = blockIdx.y; column < num_blocks; column += gridDim.y) {
        const int block = block_tables[static_cast<long long>(sequence) * table_stride + column];
        const int start = column << log2_tokens_per_block;
        const int tokens = min(tokens_per_block, length - start);
        const T* source = pool + block * shape.block_stride();
        const long long destination = (first + start) * num_kv_heads * HEAD_DIM;
        for (int index = threadIdx.x; index < tokens * row_vecs; index += THREADS) {
            const int token = index / row_vecs;
            const int head = index % row_vecs / ROW_VECS;
            const T* key_row = source + shape.head_offset(layer, head) + token * HEAD_DIM;
            const int offset = index % ROW_VECS * VEC;
            const uint4 key_bits = load16_streaming(key_row + offset);
            const uint4 value_bits = load16_streaming(key_row + shape.value_stride() + offset);
            store16(key + destination + static_cast<long long>(index) * VEC, key_bits);
            store16(value + destination + static_cast<long long>(index) * VEC, value_bits);
        }
    }
}
