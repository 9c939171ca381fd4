// Where a token's key and value lie in the pool.
//
//   pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, HEAD_DIM]; index 0 of axis 2: keys, 1: values
//
// tokens_per_block is a run-time value (as its base-2 logarithm): one shift and one mask for a row of HEAD_DIM
// elements that are then multiplied and added, against compiling every kernel nine times. Offsets count elements and
// are 64-bit: 32,768 blocks of 128 KiB already pass 2^31 bytes.
#pragma once

struct PoolShape {
    int num_layers;
    int num_kv_heads;
    int log2_tokens_per_block;

    // Elements from a block to the next.
    __device__ __forceinline__ long long block_stride() const {
        return (2ll * num_layers * num_kv_heads << log2_tokens_per_block) * HEAD_DIM;
    }

    // Elements from a key to its value.
    __device__ __forceinline__ long long value_stride() const {
        return (static_cast<long long>(num_kv_heads) << log2_tokens_per_block) * HEAD_DIM;
    }

    // Elements from the start of a block to its first key of `kv_head` in `layer`.
    __device__ __forceinline__ long long head_offset(int layer, int kv_head) const {
        return ((2ll * layer * num_kv_heads + kv_head) << log2_tokens_per_block) * HEAD_DIM;
    }

    // A slot (block · tokens_per_block + offset in the block) or a position in a sequence, taken apart.
    __device__ __forceinline__ long long block_of(long long slot) const {
        return slot >> log2_tokens_per_block;
    }

    __device__ __forceinline__ int offset_of(long long slot) const {
        return static_cast<int>(slot) & ((1 << log2_tokens_per_block) - 1);
    }
};
