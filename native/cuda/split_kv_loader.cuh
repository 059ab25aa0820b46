// The shared memory of a CTA of split_kv, and the warp that fills it.
//
//   a tile in shared memory:   run 0: tokens 0-7 │16 B│ run 1: tokens 8-15 │16 B│ …      a run is one bulk copy
//
// The rows of an 8 × 8 matrix for ldmatrix are token j of each of the 8 runs, which by the 16 bytes lie in different
// banks. Tokens are therefore counted in the order (j, run) between the logits and the values: "columns".
#pragma once

#include "split_kv.cuh"

namespace pagemgr {

constexpr int RUNS = 8, RUN_TOKENS = TOKENS / RUNS;
constexpr int SCORE_STRIDE = TOKENS + 8;

// One or two CTAs share the 227 KiB of an H100's multiprocessor.
constexpr int ctas_per_sm(int head_dim) { return head_dim <= 128 ? 2 : 1; }
constexpr int stages(int head_dim) {
    return head_dim <= 64 ? 6 : head_dim <= 96 ? 4 : head_dim <= 128 ? 3 : head_dim <= 192 ? 4 : 3;
}

template <typename T, int DIM> struct Shared {
    static constexpr int STAGES = stages(DIM);
    static constexpr int RUN = RUN_TOKENS * DIM + 8;  // elements
    static constexpr int QUERY_STRIDE = DIM + 8;
    alignas(128) T key[STAGES][RUNS][RUN];
    alignas(128) T value[STAGES][RUNS][RUN];
    alignas(16) T query[ROWS][QUERY_STRIDE];
    alignas(16) float scores[2][ROWS][SCORE_STRIDE];  // [][][column], of this tile and the next
    uint64_t full[STAGES], empty[STAGES];

    __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
        constexpr int ARRIVALS = 1;  // and the bytes
#else
        constexpr int ARRIVALS = 32;
#endif
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(shared_address(&full[i]), ARRIVALS);
            init_barrier(shared_address(&empty[i]), READERS / 32);
        }
    }
};

// The warp that loads. Lanes 0 to 7 have the runs of K, the next 8 those of V, and each knows the block of its run in
// the tile that comes next, so that reading the table is never waited for.
template <typename T, int DIM> struct Loader {
    using Memory = Shared<T, DIM>;
    const Problem &problem;
    Memory &shared;
    Cursor cursor;
    const int kv_head, lane = threadIdx.x % 32, run = lane % RUNS;
    int block = 0;

    __device__ __forceinline__ void find_block() {
        const int token = min(cursor.first_token() + run * RUN_TOKENS, cursor.sequence.stop - 1);
        if (token >= 0)
            block = problem.args.block_table[cursor.index * problem.args.table_stride + (token >> problem.block_shift)];
    }

    __device__ __forceinline__ void load(int stage) {
        const pagemgr_kv &kv = problem.args.kv;
        const int start = cursor.first_token() + run * RUN_TOKENS;
        const int first = min(max(cursor.sequence.first - start, 0), RUN_TOKENS);    // of the run's tokens,
        const int stop = min(max(cursor.sequence.stop - start, first), RUN_TOKENS);  // those to read
        const bool of_value = lane >= RUNS;
        T *target = (of_value ? shared.value : shared.key)[stage][run];
        const T *source =
            static_cast<const T *>(of_value ? kv.value : kv.key) + kv_offset(problem, block, start, kv_head);
        const uint32_t barrier = shared_address(&shared.full[stage]);
        if (of_value && lane < 2 * RUNS && stop - first < RUN_TOKENS) clear(target, first, stop);
        __syncwarp();
#if __CUDA_ARCH__ >= 900
        const int bytes = lane < 2 * RUNS ? (stop - first) * DIM * static_cast<int>(sizeof(T)) : 0;
        const int total = __reduce_add_sync(~0u, bytes);
        if (lane == 0) arrive_expecting(barrier, total);
        __syncwarp();
        if (bytes == 0) return;
        if (kv.token_stride == DIM) {
            copy_bulk(shared_address(target + first * DIM), source + first * DIM, bytes, barrier);
        } else {
            for (int i = first; i < stop; ++i) {
                copy_bulk(shared_address(target + i * DIM), source + i * kv.token_stride, DIM * sizeof(T), barrier);
            }
        }
#else
        constexpr int CHUNKS = DIM / 8;
        for (int i = 0; i < 2 * RUNS; ++i) {  // the whole warp copies one run after the other
            T *to = (i < RUNS ? shared.key : shared.value)[stage][i % RUNS];
            const T *from = reinterpret_cast<const T *>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(source), i));
            const int begin = __shfl_sync(~0u, first, i), end = __shfl_sync(~0u, stop, i);
            for (int chunk = begin * CHUNKS + lane; chunk < end * CHUNKS; chunk += 32) {
                const int token = chunk / CHUNKS, element = chunk % CHUNKS * 8;
                copy_16_async(shared_address(to + token * DIM + element), from + token * kv.token_stride + element);
            }
        }
        arrive_after_copies(barrier);
#endif
    }

    // Values of tokens that must not be read, for whatever stood there would be multiplied by 0, and 0 * NaN is NaN.
    __device__ __forceinline__ void clear(T *target, int first, int stop) const {
        for (int i = 0; i < RUN_TOKENS; ++i) {
            if (i >= first && i < stop) continue;
            for (int j = 0; j < DIM; j += 8) *reinterpret_cast<uint4 *>(target + i * DIM + j) = make_uint4(0, 0, 0, 0);
        }
#if __CUDA_ARCH__ >= 900
        fence_async();
#endif
    }

    __device__ __forceinline__ void run_all(int count) {
        if (count > 0) find_block();
        for (int tile = 0; tile < count; ++tile) {
            const int stage = tile % Memory::STAGES, round = tile / Memory::STAGES;
            if (round > 0) wait_at(shared_address(&shared.empty[stage]), (round - 1) % 2);
            load(stage);
            if (tile + 1 < count) {
                cursor.advance(problem);
                find_block();
            }
        }
    }
};

}  // namespace pagemgr
