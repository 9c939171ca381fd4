// Prefill attention: ragged runs of query tokens, causal, on top of whatever each sequence has cached.
//
// The rows of a KV head are its (query token, query head of the group) pairs in that order, so any group
// fills tiles of ROWS without waste and each key and value is read once for a whole tile. Grid (row tiles,
// num_kv_heads), THREADS threads. Tiles do not span sequences: sequence s owns the tiles from
// floor(query_start[s] * group / ROWS) + s on, which grows by at least ceil(n * group / ROWS) from one
// sequence to the next, so the grid needs only num_tokens and num_seqs: floor(num_tokens * group / ROWS) +
// num_seqs tiles, of which at most one per sequence is empty. Query i of a sequence's n sees its first
// context_len - n + i + 1 keys.
//
// Versions
//   1  synchronous 16-byte loads of an 8 KiB key and an 8 KiB value tile, 16 KiB of queries, float32 FMA; not yet
//      timed on a GPU. Compiled for sm_90, half, head dim 128: 163 registers, 44 KiB of shared memory, no spills.
//
// Specialised by: T, HEAD_DIM, ROWS (query rows a block), KV_TILE, THREADS, MIN_BLOCKS

using QueryElement = T;  // as floats they would not fit beside the tiles
constexpr int SCORE_ROWS = 4;
constexpr int SCORE_KEYS = 4;
constexpr int ACCUMULATORS = 64;

#include "attention.cuh"

// The first tile of a sequence. With s = num_seqs: the number of tiles.
__device__ __forceinline__ int first_tile(const int* query_start, int sequence, int group) {
    return static_cast<int>(static_cast<long long>(query_start[sequence]) * group / ROWS) + sequence;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) paged_prefill(
    // [num_tokens, num_kv_heads * group, HEAD_DIM]
    T* out,
    // [num_tokens, num_kv_heads * group]
    float* lse,
    // [num_tokens, num_kv_heads * group, HEAD_DIM], rows of a token contiguous
    const T* query,
    // elements from one token's query to the next
    long long query_stride,
    // [num_seqs + 1]: sequence s has the tokens [query_start[s], query_start[s + 1])
    const int* query_start,
    // [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, HEAD_DIM]
    const T* pool,
    // [num_seqs, table_stride]
    const int* block_tables,
    // [num_seqs]: keys to attend, this step's included
    const int* context_lens,
    int num_seqs,
    int table_stride,
    int num_layers,
    int layer,
    int num_kv_heads,
    int group,
    int log2_tokens_per_block,
    // multiplies query · key
    float scale) {
    __shared__ Shared shared;

    const int tile = blockIdx.x;
    const int kv_head = blockIdx.y;
    int sequence = 0;  // the last whose first tile is not past ours
    for (int low = 1, high = num_seqs; low < high;) {
        const int middle = (low + high) / 2;
        if (first_tile(query_start, middle, group) <= tile) {
            sequence = middle;
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const int first_token = query_start[sequence];
    const int num_queries = query_start[sequence + 1] - first_token;
    const int first_row = (tile - first_tile(query_start, sequence, group)) * ROWS;  // within the sequence
    const int rows = min(ROWS, num_queries * group - first_row);
    if (rows <= 0) return;

    const int cached = context_lens[sequence] - num_queries;  // negative: the first queries see nothing
    const int end = max(0, cached + (first_row + rows - 1) / group + 1);
    const long long num_heads = static_cast<long long>(num_kv_heads) * group;

    for (int index = threadIdx.x; index < ROWS * ROW_VECS; index += THREADS) {
        const int row = index / ROW_VECS;
        const int column = index % ROW_VECS * VEC;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (row < rows) {
            const int token = first_token + (first_row + row) / group;
            const int head = kv_head * group + (first_row + row) % group;
            bits = load16(query + token * query_stride + head * HEAD_DIM + column);
        }
        store16_shared(&shared.stage.query[row * QUERY_STRIDE + column], bits);
    }
    if (const int row = threadIdx.x; row < ROWS) {
        shared.limit[row] = row < rows ? cached + (first_row + row) / group + 1 : 0;
    }

    const PoolShape shape{num_layers, num_kv_heads, log2_tokens_per_block};
    const PagedKV kv{pool + shape.head_offset(layer, kv_head),
                     block_tables + static_cast<long long>(sequence) * table_stride, shape};
    attend(shared, kv, 0, end, scale);

    for (int index = threadIdx.x; index < rows * ROW_VECS; index += THREADS) {
        const int row = index / ROW_VECS;
        const int column = index % ROW_VECS;
        const long long token = first_token + (first_row + row) / group;
        const long long out_row = token * num_heads + kv_head * group + (first_row + row) % group;
        float values[VEC];
        row_output(shared, row, column, values);
        store_floats(out + out_row * HEAD_DIM + column * VEC, values);
        if (column == 0) lse[out_row] = row_lse(shared, row);
    }
}
