// The stages of attention over a paged cache, shared by decode and prefill.
//
// A thread block attends ROWS query rows to the keys [begin, end) of one sequence and one KV head, KV_TILE
// keys at a time. Each key and value is loaded from the pool once for all rows, with 16-byte loads, into
// shared memory; a barrier stands between the stages of a tile:
//
//   load         keys and values of the tile; rows past `end` become zeros (0 * NaN would be NaN)
//   score        query · key; a thread takes SCORE_ROWS x SCORE_KEYS products, 1 / DIM_SLICES of HEAD_DIM
//   softmax      running maximum and sum of each row (ROW_THREADS threads a row, in registers);
//                scores become weights in place, masked ones -infinity and so 0
//   accumulate   weights x values; a thread takes ROWS_PER_THREAD rows x 16 bytes of columns, 1 / KEY_SLICES
//                of the keys
//
// Specialised by (kernels/specialise.py):
//   T, HEAD_DIM, ROWS, KV_TILE, THREADS (and MIN_BLOCKS in the launch bounds)
// Chosen by the kernel that includes this:
//   QueryElement              type of the queries in shared memory
//   SCORE_ROWS, SCORE_KEYS    what one thread takes in the score stage
//   ACCUMULATORS              how many output elements one thread sums, at most
#pragma once

#include "device.cuh"
#include "pool.cuh"

constexpr int VEC = Vec16<T>::SIZE;       // elements of a 16-byte access
constexpr int ROW_VECS = HEAD_DIM / VEC;  // 16-byte accesses of a row
constexpr int TILE_LOADS = (KV_TILE * ROW_VECS + THREADS - 1) / THREADS;
// ROW_VECS is even: rows of ROW_VECS + 1 put one column of eight consecutive rows in eight different banks.
constexpr int KV_STRIDE = ROW_VECS + 1;
constexpr int QUERY_STRIDE = HEAD_DIM + Vec16<QueryElement>::SIZE;

constexpr int KEY_LANES = KV_TILE / SCORE_KEYS;
constexpr int ROW_LANES = ROWS / SCORE_ROWS;
constexpr int DIM_SLICES = THREADS / (KEY_LANES * ROW_LANES);
constexpr int SCORE_STRIDE = KV_TILE + 2;

constexpr int ROW_THREADS = THREADS / ROWS < WARP ? THREADS / ROWS : WARP;
constexpr int KEYS_PER_LANE = (KV_TILE + ROW_THREADS - 1) / ROW_THREADS;

constexpr int ROWS_PER_THREAD = ROWS * VEC < ACCUMULATORS ? ROWS : ACCUMULATORS / VEC;
constexpr int ROW_SLICES = ROWS / ROWS_PER_THREAD;
constexpr int SPARE_SLICES = THREADS / (ROW_VECS * ROW_SLICES);
constexpr int KEY_SLICES = SPARE_SLICES < KV_TILE ? SPARE_SLICES : KV_TILE;

static_assert(ROW_VECS % 2 == 0 && HEAD_DIM % VEC == 0, "a row is an even number of 16-byte vectors");
static_assert(KV_TILE % SCORE_KEYS == 0 && ROWS % SCORE_ROWS == 0, "scores cover the tile");
static_assert(DIM_SLICES >= 1, "a block has the threads for one pass over the scores");
static_assert(KV_TILE <= THREADS, "every key has a thread");
static_assert(ROWS % ROWS_PER_THREAD == 0 && KEY_SLICES >= 1, "accumulators cover the rows");
static_assert(THREADS % WARP == 0 && ROWS <= THREADS, "every row has a thread, and whole warps share rows");

struct Stage {
    uint4 key[KV_TILE * KV_STRIDE];
    uint4 value[KV_TILE * KV_STRIDE];
    alignas(16) QueryElement query[ROWS * QUERY_STRIDE];
    float score[DIM_SLICES][ROWS][SCORE_STRIDE];
    long long row_offset[KV_TILE];  // elements from the first key of block 0
};

struct Shared {
    union {
        Stage stage;
        alignas(16) float partial[KEY_SLICES][ROWS][HEAD_DIM];  // once every tile is done
    };
    float rescale[ROWS];  // what a row's sums so far are worth under its new maximum
    float maximum[ROWS];  // of a row's scores, -infinity for a row that saw no key
    float total[ROWS];    // sum of exp(score - maximum)
    int limit[ROWS];      // the row sees keys [0, limit)
};

// One sequence's keys and values of one layer and KV head.
struct PagedKV {
    const T* first_key;      // in block 0
    const int* block_table;  // entries past the sequence's blocks are garbage
    PoolShape shape;
};

// Find the rows of the tile that starts at key `tile`. Table entries at or past `end` are never read.
__device__ __forceinline__ void find_rows(Shared& shared, const PagedKV& kv, int tile, int end) {
    const int row = threadIdx.x;
    const int position = tile + row;
    if (row < KV_TILE && position < end) {
        const long long block = kv.block_table[kv.shape.block_of(position)];
        const int offset = kv.shape.offset_of(position) * HEAD_DIM;  // within the block: at most 2^16
        shared.stage.row_offset[row] = block * kv.shape.block_stride() + offset;
    }
}

__device__ __forceinline__ void load_tile(Shared& shared, const PagedKV& kv, int tile, int end) {
    const long long value_stride = kv.shape.value_stride();
    uint4 key[TILE_LOADS];
    uint4 value[TILE_LOADS];
    // All loads of the tile are in flight before the first is stored.
#pragma unroll
    for (int i = 0; i < TILE_LOADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        const int row = index / ROW_VECS;
        key[i] = value[i] = make_uint4(0, 0, 0, 0);
        if (row < KV_TILE && tile + row < end) {
            const T* source = kv.first_key + shared.stage.row_offset[row] + index % ROW_VECS * VEC;
            key[i] = load16_streaming(source);
            value[i] = load16_streaming(source + value_stride);
        }
    }
#pragma unroll
    for (int i = 0; i < TILE_LOADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        const int row = index / ROW_VECS;
        if (row < KV_TILE) {
            shared.stage.key[row * KV_STRIDE + index % ROW_VECS] = key[i];
            shared.stage.value[row * KV_STRIDE + index % ROW_VECS] = value[i];
        }
    }
}

__device__ __forceinline__ void score_tile(Shared& shared) {
    const int key_lane = threadIdx.x % KEY_LANES;
    const int row_lane = threadIdx.x / KEY_LANES % ROW_LANES;
    const int slice = threadIdx.x / (KEY_LANES * ROW_LANES);
    if (slice >= DIM_SLICES) return;

    float sum[SCORE_ROWS][SCORE_KEYS] = {};
    for (int column = slice; column < ROW_VECS; column += DIM_SLICES) {
        float key[SCORE_KEYS][VEC];
#pragma unroll
        for (int j = 0; j < SCORE_KEYS; ++j) {
            Vec16<T>::unpack(shared.stage.key[(key_lane + j * KEY_LANES) * KV_STRIDE + column], key[j]);
        }
#pragma unroll
        for (int i = 0; i < SCORE_ROWS; ++i) {
            float query[VEC];
            load_floats(&shared.stage.query[(row_lane + i * ROW_LANES) * QUERY_STRIDE + column * VEC], query);
#pragma unroll
            for (int j = 0; j < SCORE_KEYS; ++j) {
#pragma unroll
                for (int e = 0; e < VEC; ++e) sum[i][j] += query[e] * key[j][e];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < SCORE_ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < SCORE_KEYS; ++j) {
            shared.stage.score[slice][row_lane + i * ROW_LANES][key_lane + j * KEY_LANES] = sum[i][j];
        }
    }
}

// Turn the tile's scores into weights. `maximum` and `total` belong to this thread's row, the same in every
// tile.
__device__ __forceinline__ void softmax_tile(Shared& shared, int tile, float scale, float& maximum,
                                             float& total) {
    const int row = threadIdx.x / ROW_THREADS;
    const int lane = threadIdx.x % ROW_THREADS;
    if (row >= ROWS) return;  // whole warps: only where a row has a warp of its own

    const int visible = shared.limit[row] - tile;
    float score[KEYS_PER_LANE];
    float tile_maximum = NEGATIVE_INFINITY;
#pragma unroll
    for (int i = 0; i < KEYS_PER_LANE; ++i) {
        const int key = lane + i * ROW_THREADS;
        score[i] = NEGATIVE_INFINITY;
        if (key < KV_TILE && key < visible) {
            float sum = 0.0f;
#pragma unroll
            for (int slice = 0; slice < DIM_SLICES; ++slice) sum += shared.stage.score[slice][row][key];
            score[i] = sum * scale;
        }
        tile_maximum = fmaxf(tile_maximum, score[i]);
    }
    const float new_maximum = fmaxf(maximum, lanes_max<ROW_THREADS>(tile_maximum));
    // A row that has seen no key yet: -infinity - -infinity would be NaN.
    const float base = new_maximum == NEGATIVE_INFINITY ? 0.0f : new_maximum;
    float tile_total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS_PER_LANE; ++i) {
        const int key = lane + i * ROW_THREADS;
        const float weight = fast_exp(score[i] - base);
        tile_total += weight;
        if (key < KV_TILE) shared.stage.score[0][row][key] = weight;
    }
    const float factor = fast_exp(maximum - base);
    total = total * factor + lanes_sum<ROW_THREADS>(tile_total);
    maximum = new_maximum;
    if (lane == 0) shared.rescale[row] = factor;
}

// This thread's part in weights x values.
struct ValueShare {
    int column, row_slice, key_slice;

    __device__ __forceinline__ ValueShare()
        : column(threadIdx.x % ROW_VECS),
          row_slice(threadIdx.x / ROW_VECS % ROW_SLICES),
          key_slice(threadIdx.x / (ROW_VECS * ROW_SLICES)) {}

    __device__ __forceinline__ bool any() const { return key_slice < KEY_SLICES; }
    __device__ __forceinline__ int row(int i) const { return row_slice + i * ROW_SLICES; }
};

__device__ __forceinline__ void accumulate_tile(const Shared& shared, float (&sum)[ROWS_PER_THREAD][VEC]) {
    const ValueShare share;
    if (!share.any()) return;
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const float factor = shared.rescale[share.row(i)];
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[i][e] *= factor;
    }
#pragma unroll 2
    for (int key = share.key_slice; key < KV_TILE; key += KEY_SLICES) {
        float value[VEC];
        Vec16<T>::unpack(shared.stage.value[key * KV_STRIDE + share.column], value);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; ++i) {
            const float weight = shared.stage.score[0][share.row(i)][key];
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum[i][e] += weight * value[e];
        }
    }
}

// Attend the rows in shared.stage.query, each to its keys below shared.limit, over keys [begin, end).
// Leaves partial, maximum and total in shared memory for every row; the queries are gone. All threads call it.
__device__ __forceinline__ void attend(Shared& shared, const PagedKV& kv, int begin, int end, float scale) {
    float maximum = NEGATIVE_INFINITY;
    float total = 0.0f;
    float sum[ROWS_PER_THREAD][VEC] = {};

    find_rows(shared, kv, begin, end);
    __syncthreads();
    for (int tile = begin; tile < end; tile += KV_TILE) {
        load_tile(shared, kv, tile, end);
        __syncthreads();
        find_rows(shared, kv, tile + KV_TILE, end);
        score_tile(shared);
        __syncthreads();
        softmax_tile(shared, tile, scale, maximum, total);
        __syncthreads();
        accumulate_tile(shared, sum);
        __syncthreads();
    }

    const ValueShare share;
    if (share.any()) {
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; ++i) {
            store_floats_shared(&shared.partial[share.key_slice][share.row(i)][share.column * VEC], sum[i]);
        }
    }
    const int row = threadIdx.x / ROW_THREADS;
    if (row < ROWS && threadIdx.x % ROW_THREADS == 0) {
        shared.maximum[row] = maximum;
        shared.total[row] = total;
    }
    __syncthreads();
}

// A row's natural log-sum-exp after attend(): -infinity for a row that saw no key.
__device__ __forceinline__ float row_lse(const Shared& shared, int row) {
    return shared.total[row] > 0.0f ? shared.maximum[row] + logf(shared.total[row]) : NEGATIVE_INFINITY;
}

// VEC columns of a row's output after attend(): 0 for a row that saw no key.
__device__ __forceinline__ void row_output(const Shared& shared, int row, int column, float (&out)[VEC]) {
    const float inverse = shared.total[row] > 0.0f ? 1.0f / shared.total[row] : 0.0f;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float sum = 0.0f;
#pragma unroll
        for (int slice = 0; slice < KEY_SLICES; ++slice) sum += shared.partial[slice][row][column * VEC + e];
        out[e] = sum * inverse;
    }
}
