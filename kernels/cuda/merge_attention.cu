// Merge attention outputs over disjoint sets of keys into the output over all of them, by their log-sum-exps.
//
//   out = sum_i exp(lse_i - lse) * out_i,   lse = log sum_i exp(lse_i)
//
// A part with log-sum-exp -infinity saw no keys: nothing else of it is read. A row without keys in any part gives
// output 0 and log-sum-exp -infinity. A thread takes 16 bytes of one output row.
//
// Versions
//   1  each thread walks the parts of its row; the row's threads read the same log-sum-exps (from cache).
//      Not yet timed on a GPU. Compiled for sm_90: 32 registers, no shared memory, no spills.
//
// Specialised by: T (outputs), PART (parts: float between the splits of one call, T between calls), HEAD_DIM, THREADS

#include "device.cuh"

constexpr int VEC = Vec16<T>::SIZE;
constexpr int ROW_VECS = HEAD_DIM / VEC;

extern "C" __global__ void __launch_bounds__(THREADS) merge_attention(
    // [rows, HEAD_DIM], a row being one head of one token
    T* out,
    // [rows]
    float* lse,
    // [num_parts, rows, HEAD_DIM]
    const PART* part_outs,
    // [num_parts, rows]: log-sum-exp of a part, or its largest score where part_totals are given
    const float* part_lses,
    // [num_parts, rows]: sum of exp(score - largest), or null: part_lses are whole
    const float* part_totals,
    long long rows,
    int num_parts) {
    const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long row = index / ROW_VECS;
    const int column = static_cast<int>(index % ROW_VECS) * VEC;
    if (row >= rows) return;

    float maximum = NEGATIVE_INFINITY;
    for (int part = 0; part < num_parts; ++part) maximum = fmaxf(maximum, part_lses[part * rows + row]);

    float total = 0.0f;
    float sum[VEC] = {};
    for (int part = 0; part < num_parts; ++part) {
        const float part_lse = part_lses[part * rows + row];
        if (part_lse == NEGATIVE_INFINITY) continue;
        float weight = fast_exp(part_lse - maximum);
        if (part_totals != nullptr) weight *= part_totals[part * rows + row];
        float values[VEC];
        load_floats(part_outs + (part * rows + row) * HEAD_DIM + column, values);
        total += weight;
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] += weight * values[e];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] *= inverse;
    store_floats(out + row * HEAD_DIM + column, sum);
    if (column == 0) lse[row] = total > 0.0f ? maximum + logf(total) : NEGATIVE_INFINITY;
}
