// Decode attention: one query token a sequence, over the keys and values that its block table names.
//
// Grid (num_seqs, num_kv_heads * head tiles, num_splits), THREADS threads. A head tile is ROWS of the `group`
// query heads of a KV head (a ragged last tile has idle rows), so groups up to ROWS read each key and value
// once. The context is cut into num_splits runs of whole KV tiles; with more than one, each leaves a float32
// partial output and the two parts of its log-sum-exp, and merge_attention.cu joins them. (Added up, a
// log-sum-exp of -524288 would round the weight of a split by 3%.) A split without keys writes a maximum of
// -infinity alone.
//
// Versions
//   1  synchronous 16-byte loads of an 8 KiB key and an 8 KiB value tile, float32 FMA; not yet timed on a GPU.
//      Compiled for sm_90, half, head dim 128, ROWS 1 / 2 / 4 / 8 / 16: 72 / 88 / 106 / 140 / 146 registers,
//      18 / 19 / 22 / 26 / 34 KiB of shared memory, no spills: 6 / 5 / 3 / 3 / 3 blocks a multiprocessor or more, each
//      with 16 KiB of loads in flight.
//
// Specialised by: T, HEAD_DIM, ROWS (query heads a block), KV_TILE, THREADS, MIN_BLOCKS

using QueryElement = float;  // converted once, read ROWS x KV_TILE times
constexpr int SCORE_ROWS = ROWS;
constexpr int SCORE_KEYS = 1;
constexpr int ACCUMULATORS = 32;

#include "attention.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) paged_attention(
    // [num_seqs, num_kv_heads * group, HEAD_DIM]; written when num_splits is 1
    T* out,
    // [num_seqs, num_kv_heads * group]; written when num_splits is 1
    float* lse,
    // [num_splits, num_seqs, num_kv_heads * group, HEAD_DIM]; written when num_splits is above 1
    float* partial_out,
    // [num_splits, num_seqs, num_kv_heads * group]: largest score; written when num_splits is above 1
    float* partial_maximum,
    // [num_splits, num_seqs, num_kv_heads * group]: sum of exp(score - largest); as partial_out
    float* partial_total,
    // [num_seqs, num_kv_heads * group, HEAD_DIM], rows of a token contiguous
    const T* query,
    // elements from one token's query to the next
    long long query_stride,
    // [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, HEAD_DIM]
    const T* pool,
    // [num_seqs, table_stride]
    const int* block_tables,
    // [num_seqs]: keys to attend, this step's included
    const int* context_lens,
    int table_stride,
    int num_layers,
    int layer,
    int num_kv_heads,
    int group,
    int log2_tokens_per_block,
    // multiplies query · key
    float scale) {
    __shared__ Shared shared;

    const int sequence = blockIdx.x;
    const int head_tiles = (group + ROWS - 1) / ROWS;
    const int kv_head = blockIdx.y / head_tiles;
    const int first_head = blockIdx.y % head_tiles * ROWS;  // within the group
    const int rows = min(ROWS, group - first_head);
    const int split = blockIdx.z;
    const int num_splits = gridDim.z;

    const int context_len = context_lens[sequence];
    const int tiles = (context_len + KV_TILE - 1) / KV_TILE;
    const int keys_per_split = (tiles + num_splits - 1) / num_splits * KV_TILE;
    const int begin = split * keys_per_split;
    const int end = min(context_len, begin + keys_per_split);

    const long long num_heads = static_cast<long long>(num_kv_heads) * group;
    const long long first_row = kv_head * group + first_head;

    const T* queries = query + sequence * query_stride + first_row * HEAD_DIM;
    for (int index = threadIdx.x; index < ROWS * ROW_VECS; index += THREADS) {
        const int row = index / ROW_VECS;
        const int column = index % ROW_VECS * VEC;
        float values[VEC] = {};
        if (row < rows) load_floats(queries + row * HEAD_DIM + column, values);
        store_floats_shared(&shared.stage.query[row * QUERY_STRIDE + column], values);
    }
    if (threadIdx.x < ROWS) shared.limit[threadIdx.x] = end;

    const PoolShape shape{num_layers, num_kv_heads, log2_tokens_per_block};
    const PagedKV kv{pool + shape.head_offset(layer, kv_head),
                     block_tables + static_cast<long long>(sequence) * table_stride, shape};
    attend(shared, kv, begin, end, scale);

    const long long out_row = sequence * num_heads + first_row;
    const long long partial_row = static_cast<long long>(split) * gridDim.x * num_heads + out_row;
    if (const int row = threadIdx.x; row < rows) {
        if (num_splits > 1) {
            partial_maximum[partial_row + row] = shared.maximum[row];
            partial_total[partial_row + row] = shared.total[row];
        } else {
            lse[out_row + row] = row_lse(shared, row);
        }
    }
    if (num_splits > 1 && begin >= end) return;  // nothing that merge_attention would read
    for (int index = threadIdx.x; index < rows * ROW_VECS; index += THREADS) {
        const int row = index / ROW_VECS;
        const int column = index % ROW_VECS;
        float values[VEC];
        row_output(shared, row, column, values);
        if (num_splits > 1) {
            store_floats(partial_out + (partial_row + row) * HEAD_DIM + column * VEC, values);
        } else {
            store_floats(out + (out_row + row) * HEAD_DIM + column * VEC, values);
        }
    }
}
