// The products of split_kv: a tile in shared memory, by the computing warps.
//
// Of a quantised pool ldmatrix takes its matrices as pairs of bytes. A lane then has four neighbouring dims of a key, so
// that dims are counted in the order (4t and 4t + 1 of all lanes, then 4t + 2 and 4t + 3) within 16 of them; the queries
// are read likewise. And it has two neighbouring dims of values for each of two tokens: the even dims of 16 make one
// product, the odd ones the other.
#pragma once

#include "split_kv_loader.cuh"

namespace pagemgr {

// Of 16 dims, for each computing warp.
template <int DIM> constexpr int SLICES = (DIM / 16 + READERS / 32 - 1) / (READERS / 32);

// What scales of values are multiplied by, so that with weights in float16 their products are no subnormals: with
// 65504 / 448, the largest scale of a float16 pool, they are no more than 37427.
constexpr float FACTOR = 256;

// The dot products of a tile: each warp those of tokens `warp` and `warp + 8` of each run, at 8 columns each. `R` is 1
// if there are at most 8 rows, else 2.
template <int R, typename T, int DIM, int MATRICES>
__device__ __forceinline__ void multiply_keys(const Shared<T, T, DIM> &shared, int stage,
                                              float (&dots)[MATRICES][2][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t queries = R == 2 ? shared_address(&shared.query[lane % 16][lane / 16 * 8])
                                    : shared_address(&shared.query[lane % 8][lane / 8 % 2 * 8]);
    const uint32_t keys = shared_address(&shared.stage[stage].key[lane % 8][warp * DIM + lane / 8 * 8]);
#pragma unroll
    for (int k = 0; k < DIM / 16; k += 2) {
        uint32_t query[2][4] = {};
#pragma unroll
        for (int i = 0; i < 2 && k + i < DIM / 16; ++i) {
            if (R == 2) {
                load_matrices(query[i], queries + 32 * (k + i));
            } else {
                load_two_matrices(query[i], queries + 32 * (k + i));
                query[i][2] = query[i][1], query[i][1] = 0;
            }
        }
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
            const uint32_t from = keys + m * 8 * DIM * static_cast<int>(sizeof(T)) + 32 * k;
            uint32_t key[4];
            if (k + 1 < DIM / 16) load_matrices(key, from);
            else load_two_matrices(key, from);
#pragma unroll
            for (int i = 0; i < 2 && k + i < DIM / 16; ++i)
                multiply<T>(dots[m][i], query[i], key[2 * i], key[2 * i + 1]);
        }
    }
}

template <int R, typename T, int DIM, int MATRICES>
__device__ __forceinline__ void multiply_keys(const Shared<T, E4m3, DIM> &shared, int stage,
                                              float (&dots)[MATRICES][2][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t keys = shared_address(&shared.stage[stage].key[lane % 8][warp * DIM + lane / 8 * 16]);
#pragma unroll
    for (int k = 0; k < DIM / 16; k += 4) {
        uint32_t query[4][4] = {};
#pragma unroll
        for (int i = 0; i < 4 && k + i < DIM / 16; ++i) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const uint2 four = *reinterpret_cast<const uint2 *>(
                    &shared.query[lane / 4 + 8 * r][16 * (k + i) + 4 * (lane % 4)]);
                query[i][r] = four.x, query[i][2 + r] = four.y;
            }
        }
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
            uint32_t key[4];  // past the last dim something else, which nobody looks at
            load_matrices(key, keys + m * 8 * DIM + 16 * k);
#pragma unroll
            for (int i = 0; i < 4 && k + i < DIM / 16; ++i) {
                uint32_t low, high;
                widen<T>(key[i], low, high);
                multiply<T>(dots[m][i % 2], query[i], low, high);
            }
        }
    }
}

// Adds the weighted values of a tile, each warp at its slices of 16 dims.
template <typename T, int DIM, int STEPS>
__device__ __forceinline__ void multiply_values(const Shared<T, T, DIM> &shared, int stage,
                                                const uint32_t (&weights)[STEPS][4], float (&out)[SLICES<DIM>][2][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < SLICES<DIM>; ++i) {
        const int slice = warp + i * (READERS / 32);
        if (slice >= DIM / 16) break;
        const uint32_t values = shared_address(
            &shared.stage[stage].value[lane % 8][lane / 8 % 2 * DIM + 16 * slice + lane / 16 * 8]);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            uint32_t value[4];
            load_transposed(value, values + 2 * k * DIM * static_cast<int>(sizeof(T)));
            multiply<T>(out[i][0], weights[k], value[0], value[1]);
            multiply<T>(out[i][1], weights[k], value[2], value[3]);
        }
    }
}

template <typename T, int DIM, int STEPS>
__device__ __forceinline__ void multiply_values(const Shared<T, E4m3, DIM> &shared, int stage,
                                                const uint32_t (&weights)[STEPS][4], float (&out)[SLICES<DIM>][2][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < SLICES<DIM>; ++i) {
        const int slice = warp + i * (READERS / 32);
        if (slice >= DIM / 16) break;
        const uint32_t values = shared_address(&shared.stage[stage].value[lane % 8][lane / 8 * DIM + 16 * slice]);
#pragma unroll
        for (int k = 0; k < STEPS; k += 2) {
            uint32_t four[4];
            load_transposed(four, values + 2 * k * DIM);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t even[2], odd[2];
                widen<T>(__byte_perm(four[2 * j], 0, 0x3120), even[0], odd[0]);
                widen<T>(__byte_perm(four[2 * j + 1], 0, 0x3120), even[1], odd[1]);
                multiply<T>(out[i][0], weights[k + j], even[0], even[1]);
                multiply<T>(out[i][1], weights[k + j], odd[0], odd[1]);
            }
        }
    }
}

}  // namespace pagemgr
