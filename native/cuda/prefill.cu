// prefill: attention for many new tokens, by mma.
//
// A CTA takes a tile of rows of one sequence and K/V head, each warp 16 or 32 of them, and goes through the keys that
// they see, 64 at a time (Dao, FlashAttention-2, 2023). While the tensor cores work on keys, the values of the same
// tokens arrive; while they work on values, the next keys do. Where tokens lie is looked up two tiles ahead.
#include "attention.cuh"

namespace pagemgr {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int TOKENS = 64;

template <typename T, int DIM> struct Shared {
    static constexpr int ROW_TILES = DIM <= 128 ? 2 : 1;  // of 16 rows, for each warp: what registers allow
    static constexpr int ROWS = 16 * ROW_TILES * WARPS;
    static constexpr int STRIDE = DIM + 8;  // 16 bytes more than a row: ldmatrix finds its 8 rows in different banks
    T query[ROWS][STRIDE];
    T key[TOKENS][STRIDE];
    T value[TOKENS][STRIDE];
    int64_t offsets[2][TOKENS];  // of each token's row in key and value; -1: not to be read
    float key_scales[2][TOKENS], value_scales[2][TOKENS];  // in a quantised pool; 0: not to be read
};

// The CTA's rows: a tile of one sequence, the tiles of all long sequences being numbered through.
struct Work {
    Sequence sequence;
    int index = -1;  // of the sequence; -1: there is no such tile
    int tile = 0;

    // All lanes of each warp call this together. The last tiles of a sequence, which see most, are numbered first.
    __device__ __forceinline__ Work(const Problem &problem, int number, int rows) {
        const int lane = threadIdx.x % 32;
        for (int first = 0; first < problem.args.num_seqs; first += 32) {
            Sequence mine;
            if (first + lane < problem.args.num_seqs) mine = Sequence(problem, first + lane);
            const int tiles = mine.num_queries > problem.few ? (mine.num_queries * problem.group + rows - 1) / rows : 0;
            int through = tiles;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(~0u, through, step);
                if (lane >= step) through += other;
            }
            const unsigned past = __ballot_sync(~0u, through > number);
            if (past) {
                const int found = __ffs(past) - 1;
                index = first + found;
                sequence = Sequence(problem, index);
                tile = __shfl_sync(~0u, through, found) - 1 - number;
                return;
            }
            number -= __shfl_sync(~0u, through, 31);
        }
    }
};

// Brings rows of K or V into shared memory.
template <typename T, int DIM>
__device__ __forceinline__ void load_rows(T (&target)[TOKENS][DIM + 8], const void *source,
                                          const int64_t (&offsets)[TOKENS]) {
    constexpr int CHUNKS = DIM / 8;  // of a row, 16 bytes each
#pragma unroll
    for (int i = 0; i < TOKENS * CHUNKS / THREADS; ++i) {
        const int vector = i * THREADS + threadIdx.x, row = vector / CHUNKS, chunk = vector % CHUNKS;
        const int64_t offset = offsets[row];
        copy_16_or_zero_async(shared_address(&target[row][chunk * 8]),
                              static_cast<const T *>(source) + max(offset, int64_t{0}) + chunk * 8, offset >= 0);
    }
    commit_copies();
}

// The same from a quantised pool, times the scales if there are any. Keys have none here: rounded to T once more, they
// would shift the logits.
template <typename T, int DIM>
__device__ __forceinline__ void widen_rows(T (&target)[TOKENS][DIM + 8], const void *source,
                                           const int64_t (&offsets)[TOKENS], const float *scales) {
    constexpr int CHUNKS = DIM / 16;  // of a row, 16 elements each
    for (int vector = threadIdx.x; vector < TOKENS * CHUNKS; vector += THREADS) {
        const int row = vector / CHUNKS, chunk = vector % CHUNKS;
        const float scale = scales ? scales[row] : 1;
        uint4 elements = make_uint4(0, 0, 0, 0);
        if (offsets[row] >= 0)
            elements = *reinterpret_cast<const uint4 *>(static_cast<const char *>(source) + offsets[row] + chunk * 16);
        const uint32_t fours[4] = {elements.x, elements.y, elements.z, elements.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint2 pairs;
            widen<__half>(fours[i], pairs.x, pairs.y);
            const float2 low = __half22float2(reinterpret_cast<const __half2 &>(pairs.x));
            const float2 high = __half22float2(reinterpret_cast<const __half2 &>(pairs.y));
            *reinterpret_cast<uint2 *>(&target[row][chunk * 16 + 4 * i]) =
                make_uint2(pack<T>(low.x * scale, low.y * scale), pack<T>(high.x * scale, high.y * scale));
        }
    }
}

// The state of a warp's rows: row g + 8r of row tile m is [m][r], with g = lane / 4.
template <typename T, int DIM> struct Rows {
    static constexpr int ROW_TILES = Shared<T, DIM>::ROW_TILES;
    float logits[ROW_TILES][TOKENS / 8][4];
    float out[ROW_TILES][DIM / 8][4] = {};
    float largest[ROW_TILES][2], sum[ROW_TILES][2] = {};

    __device__ __forceinline__ Rows() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) largest[m][0] = largest[m][1] = -INFINITY;
    }

    __device__ __forceinline__ void multiply_keys(const Shared<T, DIM> &shared) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < ROW_TILES * (TOKENS / 8) * 4; ++i) (&logits[0][0][0])[i] = 0;
        const uint32_t queries = shared_address(&shared.query[warp * 16 * ROW_TILES + lane % 16][lane / 16 * 8]);
        const uint32_t keys = shared_address(&shared.key[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
        constexpr int STRIDE = Shared<T, DIM>::STRIDE * sizeof(T);
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            uint32_t query[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) load_matrices(query[m], queries + 16 * m * STRIDE + 32 * k);
#pragma unroll
            for (int n = 0; n < TOKENS / 16; ++n) {
                uint32_t key[4];
                load_matrices(key, keys + 16 * n * STRIDE + 32 * k);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    multiply<T>(logits[m][2 * n], query[m], key[0], key[1]);
                    multiply<T>(logits[m][2 * n + 1], query[m], key[2], key[3]);
                }
            }
        }
    }

    // Calls `act(dot, m, r, token of the tile)` for each of the thread's dot products.
    template <typename Act> __device__ __forceinline__ void for_each_logit(const Act &act) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) act(logits[m][n][2 * r + j], m, r, 8 * n + 2 * (lane % 4) + j);
                }
            }
        }
    }

    // Logits, times scale, become weights; what was added up so far shrinks accordingly.
    __device__ __forceinline__ void weigh(float scale) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top = largest[m][r];
#pragma unroll
                for (int n = 0; n < TOKENS / 8; ++n)
                    top = fmaxf(top, fmaxf(logits[m][n][2 * r], logits[m][n][2 * r + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                const float base = top == -INFINITY ? 0.0f : top * scale,
                            shrink = exp2_fast(largest[m][r] * scale - base);
                largest[m][r] = top;
                sum[m][r] *= shrink;
#pragma unroll
                for (int n = 0; n < DIM / 8; ++n) out[m][n][2 * r] *= shrink, out[m][n][2 * r + 1] *= shrink;
#pragma unroll
                for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float weight = exp2_fast(fmaf(logits[m][n][2 * r + j], scale, -base));
                        sum[m][r] += weight;
                        logits[m][n][2 * r + j] = weight;
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void multiply_values(const Shared<T, DIM> &shared) {
        const int lane = threadIdx.x % 32;
        const uint32_t values = shared_address(&shared.value[lane % 16][lane / 16 * 8]);
        constexpr int STRIDE = Shared<T, DIM>::STRIDE * sizeof(T);
#pragma unroll
        for (int k = 0; k < TOKENS / 16; ++k) {
            uint32_t weights[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float *pair = &logits[m][2 * k + i / 2][i % 2 * 2];
                    weights[m][i] = pack<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                uint32_t value[4];
                load_transposed(value, values + 16 * k * STRIDE + 32 * n);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    multiply<T>(out[m][2 * n], weights[m], value[0], value[1]);
                    multiply<T>(out[m][2 * n + 1], weights[m], value[2], value[3]);
                }
            }
        }
    }
};

template <typename T, int DIM>
__device__ __forceinline__ void write_rows(const Problem &problem, const Work &work, int kv_head, Rows<T, DIM> &rows,
                                           float scale) {
    const pagemgr_attention_args &args = problem.args;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = work.sequence.num_queries * problem.group;
#pragma unroll
    for (int m = 0; m < Rows<T, DIM>::ROW_TILES; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = rows.sum[m][r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int row =
                work.tile * Shared<T, DIM>::ROWS + (warp * Rows<T, DIM>::ROW_TILES + m) * 16 + lane / 4 + 8 * r;
            if (row >= count) continue;
            const Row where(problem, work.sequence, kv_head, row);
            const float largest = rows.largest[m][r] == -INFINITY ? -INFINITY : rows.largest[m][r] * scale;
            const Closing closing(problem, where.head, largest, sum);
            const int64_t offset = static_cast<int64_t>(where.token) * args.num_q_heads + where.head;
            T *out = static_cast<T *>(args.out) + offset * DIM + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                *reinterpret_cast<uint32_t *>(out + 8 * n) =
                    pack<T>(rows.out[m][n][2 * r] * closing.factor, rows.out[m][n][2 * r + 1] * closing.factor);
            }
            if (args.lse && lane % 4 == 0) args.lse[offset] = closing.lse;
        }
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS) prefill_kernel(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(16) char memory[];
    Shared<T, DIM> &shared = *reinterpret_cast<Shared<T, DIM> *>(memory);
    constexpr int ROWS = Shared<T, DIM>::ROWS, ROW_TILES = Shared<T, DIM>::ROW_TILES;
    const pagemgr_attention_args &args = problem.args;
    const int kv_head = blockIdx.y, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Work work(problem, blockIdx.x, ROWS);
    if (work.index < 0) return;
    const Sequence &sequence = work.sequence;
    load_queries<T, DIM>(problem, sequence, kv_head, work.tile * ROWS, ROWS, &shared.query[0][0],
                         Shared<T, DIM>::STRIDE, thread, THREADS);

    // Positions of the first and last row, and the keys that any row sees: [first, stop).
    const int last_row = min((work.tile + 1) * ROWS, sequence.num_queries * problem.group) - 1;
    const int low = sequence.position + work.tile * ROWS / problem.group,
              high = sequence.position + last_row / problem.group;
    const int first = Visible(problem, sequence, low).first, stop = Visible(problem, sequence, high).last + 1;
    const int origin = first & ~(TOKENS - 1), tiles = stop > origin ? (stop - origin + TOKENS - 1) / TOKENS : 0;
    const int32_t *table = args.block_table + work.index * args.table_stride;
    const bool quantised = args.kv.kv_dtype != PAGEMGR_KV_PLAIN;
    const auto find_block = [&](int tile) {
        const int token = origin + tile * TOKENS + thread;
        return thread < TOKENS && token >= sequence.first && token < sequence.stop ? table[token >> problem.block_shift]
                                                                                   : -1;
    };
    const auto find_offset = [&](int tile, int block) {
        const int token = origin + tile * TOKENS + thread;
        if (thread >= TOKENS) return;
        const bool readable = token >= sequence.first && token < sequence.stop;
        const int64_t id = readable ? existing(problem, block) : 0;
        shared.offsets[tile % 2][thread] = readable ? kv_offset(problem, id, token, kv_head) : -1;
        if (quantised) {
            const int64_t scale = scale_offset(problem, id, token, kv_head);
            shared.key_scales[tile % 2][thread] = readable ? args.kv.key_scale[scale] : 0;
            shared.value_scales[tile % 2][thread] = readable ? args.kv.value_scale[scale] : 0;
        }
    };
    const auto load_keys = [&](int tile) {
        const auto &offsets = shared.offsets[tile % 2];
        if (quantised) widen_rows<T, DIM>(shared.key, args.kv.key, offsets, nullptr);
        else load_rows<T, DIM>(shared.key, args.kv.key, offsets);
    };
    const auto load_values = [&](int tile) {
        const auto &offsets = shared.offsets[tile % 2];
        if (quantised) widen_rows<T, DIM>(shared.value, args.kv.value, offsets, shared.value_scales[tile % 2]);
        else load_rows<T, DIM>(shared.value, args.kv.value, offsets);
    };
    Rows<T, DIM> rows;
    const bool plain = problem.softcap == 0 && !args.alibi_slopes && problem.scale > 0;
    const float scale = plain ? problem.scale : 1;
    int next_block = find_block(1);
    find_offset(0, find_block(0));
    __syncthreads();
    if (tiles > 0) load_keys(0);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies();
        __syncthreads();  // the keys are here, and nobody reads values any more
        load_values(tile);
        find_offset(tile + 1, next_block);
        next_block = find_block(tile + 2);
        rows.multiply_keys(shared);
        if (quantised)
            rows.for_each_logit([&](float &x, int, int, int column) { x *= shared.key_scales[tile % 2][column]; });
        const int token = origin + tile * TOKENS;
        const bool masked = token < first || token + TOKENS > sequence.stop ||
                            (args.causal && token + TOKENS - 1 > low) ||
                            (args.window > 0 && token <= high - args.window);
        if (masked || !plain) {
            rows.for_each_logit([&](float &x, int m, int r, int column) {
                const int row = min(work.tile * ROWS + (warp * ROW_TILES + m) * 16 + lane / 4 + 8 * r, last_row);
                const Row where(problem, sequence, kv_head, row);
                const int position = sequence.position + where.token - sequence.query_begin;
                if (!plain) x = logit(problem, x, slope_of(problem, where.head), token + column - position);
                if (!Visible(problem, sequence, position).holds(token + column)) x = -INFINITY;
            });
        }
        rows.weigh(scale);
        wait_for_copies();
        __syncthreads();  // the values are here, and nobody reads keys any more
        if (tile + 1 < tiles) load_keys(tile + 1);
        rows.multiply_values(shared);
    }
    write_rows<T, DIM>(problem, work, kv_head, rows, scale);
}

}  // namespace

int prefill(const Problem &problem) {
    return with_shape(problem.args.kv, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int DIM = dim.value, ROWS = Shared<T, DIM>::ROWS;
        const int64_t tiles =
            problem.args.num_tokens * problem.group / ROWS + problem.args.num_seqs;  // no batch has more
        const Grid grid{dim3(static_cast<unsigned>(tiles), problem.args.kv.num_kv_heads), THREADS,
                        sizeof(Shared<T, DIM>)};
        return launch<prefill_kernel<T, DIM>>(problem.args.run, grid, problem);
    });
}

}  // namespace pagemgr
