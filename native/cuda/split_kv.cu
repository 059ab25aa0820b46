// split_kv: attention for few new tokens over long caches, at the speed of memory.
//
//   line of tiles   │ seq 0 head 0 │ seq 0 head 1 │ seq 1 head 0 │ …     a unit: 16 rows of one sequence and head
//   cut into shares └ CTA 0 ┴ CTA 1 ┴ CTA 2 ┴ CTA 3 ┴ CTA 4 ┴ …          equal whatever the lengths
//
// The grid is fixed and each CTA finds its share from the lengths on the device, so that a captured graph serves every
// batch within its maxima (equal shares: Osama et al., Stream-K, 2023).
//
// A unit within one share is finished there. Of a cut one each CTA leaves its part in the workspace and counts itself;
// the last one combines the parts. Counts start at the call's own number, so that the workspace needs no preparation:
// whoever has a part starts the count before it computes, unless that was done; the last one resets it for the next
// replay of a graph.
//
// Within a CTA, one warp loads tiles of 128 tokens into a ring of stages, across the borders of units; eight compute.
// For the logits each takes 16 of the tokens, for the values slices of 16 dims, and in between the logits pass through
// shared memory: every byte of K and V is read from there once, and no warp has to be merged with another.
#include <algorithm>
#include <random>

#include "split_kv_products.cuh"

namespace pagemgr {
namespace {

// The queries of the unit at hand, in the computing warps. Each thread knows rows g and g + 8 (g = lane / 4); what is
// past the last row repeats it. `R` is 1 if no row is past the eighth, else 2.
template <typename T, typename S, int DIM> struct Queries {
    using Memory = Shared<T, S, DIM>;
    int position[2], first[2], last[2];  // of the query, of the first and the last key that it sees
    float slope[2];
    const Sequence &sequence;

    __device__ __forceinline__ Queries(const Problem &problem, const Cursor<Memory::TOKENS> &at, Memory &shared)
        : sequence(at.sequence) {
        load_queries<T, DIM>(problem, sequence, at.kv_head, at.unit * ROWS, ROWS, &shared.query[0][0],
                             Memory::QUERY_STRIDE, threadIdx.x, READERS);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row =
                min(at.unit * ROWS + threadIdx.x % 32 / 4 + 8 * r, sequence.num_queries * problem.group - 1);
            const Row where(problem, sequence, at.kv_head, row);
            position[r] = sequence.position + where.token - sequence.query_begin;
            const Visible visible(problem, sequence, position[r]);
            first[r] = visible.first;
            last[r] = visible.last;
            slope[r] = slope_of(problem, where.head);
        }
        meet<READERS>();
    }

    // The logits of one tile: each warp those of tokens `warp` and `warp + 8` of each run, at 8 columns each.
    template <int R>
    __device__ __forceinline__ void score(const Problem &problem, int first_token, Memory &shared, int stage,
                                          int buffer) const {
        constexpr int MATRICES = Memory::RUN_TOKENS / RUNS;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        float dots[MATRICES][2][4] = {};  // of even and odd steps, which need not wait for each other
        multiply_keys<R>(shared, stage, dots);
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
            const int within = 2 * t * Memory::RUN_TOKENS + warp + 8 * m, column = 8 * (warp + 8 * m) + 2 * t;
            float2 scale = make_float2(1, 1);
            if constexpr (Memory::QUANTISED) {
                const auto &scales = shared.stage[stage].scales.of;
                scale = make_float2(scales[0][within], scales[0][within + Memory::RUN_TOKENS]);
                if (g == 0) {
                    const auto factor = [&](int key) {
                        const bool readable = first_token + key >= sequence.first && first_token + key < sequence.stop;
                        return readable ? FACTOR * scales[1][key] : 0.0f;
                    };
                    *reinterpret_cast<float2 *>(&shared.factors.of[buffer][column]) =
                        make_float2(factor(within), factor(within + Memory::RUN_TOKENS));
                }
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float x[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int key = first_token + within + j * Memory::RUN_TOKENS;
                    float dot = dots[m][0][2 * r + j] + dots[m][1][2 * r + j];
                    if (Memory::QUANTISED) dot *= j == 0 ? scale.x : scale.y;
                    x[j] = logit(problem, dot, slope[r], key - position[r]);
                    if (key < first[r] || key > last[r]) x[j] = -INFINITY;
                }
                *reinterpret_cast<float2 *>(&shared.scores[buffer][g + 8 * r][column]) = make_float2(x[0], x[1]);
            }
        }
    }
};

// The part of a unit that this CTA has seen. Each thread has rows g and g + 8, and of their outputs the dims of its
// warp; largest and sum are the same in all warps, but sums are still to be added over the four lanes of a row.
template <typename T, typename S, int DIM> struct Part {
    using Memory = Shared<T, S, DIM>;
    static constexpr int TOKENS = Memory::TOKENS;
    float out[SLICES<DIM>][2][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

    // Adds a tile, whose logits are in shared.scores.
    template <int R> __device__ __forceinline__ void add(const Memory &shared, int stage, int buffer) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        uint32_t weights[TOKENS / 16][4] = {};
#pragma unroll
        for (int r = 0; r < R; ++r) {
            float2 x[TOKENS / 8];  // columns 8k + 2t and the next
            float top = largest[r];
#pragma unroll
            for (int k = 0; k < TOKENS / 8; ++k) {
                x[k] = *reinterpret_cast<const float2 *>(&shared.scores[buffer][g + 8 * r][8 * k + 2 * t]);
                top = fmaxf(top, fmaxf(x[k].x, x[k].y));
            }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float base = top == -INFINITY ? 0.0f : top, shrink = exp2_fast(largest[r] - base);
            largest[r] = top;
            sum[r] *= shrink;
#pragma unroll
            for (int i = 0; i < SLICES<DIM>; ++i) {
#pragma unroll
                for (int n = 0; n < 2; ++n) out[i][n][2 * r] *= shrink, out[i][n][2 * r + 1] *= shrink;
            }
#pragma unroll
            for (int k = 0; k < TOKENS / 8; ++k) {
                float low = exp2_fast(x[k].x - base), high = exp2_fast(x[k].y - base);
                sum[r] += low + high;
                if constexpr (Memory::QUANTISED) {
                    const float2 factor = *reinterpret_cast<const float2 *>(&shared.factors.of[buffer][8 * k + 2 * t]);
                    low *= factor.x, high *= factor.y;
                }
                weights[k / 2][r + k % 2 * 2] = pack<T>(low, high);
            }
        }
        multiply_values(shared, stage, weights, out);
    }

    // After the last tile: adds the sums of the lanes.
    __device__ __forceinline__ void close() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        }
        if constexpr (Memory::QUANTISED) {
            for (int i = 0; i < SLICES<DIM> * 8; ++i) (&out[0][0][0])[i] *= 1 / FACTOR;
        }
    }

    // Calls `act(row, r, column, pair)`: two neighbouring outputs each time.
    template <typename Act> __device__ __forceinline__ void for_each(const Act &act) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < SLICES<DIM>; ++i) {
            const int slice = warp + i * (READERS / 32);
            if (slice >= DIM / 16) break;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    // Of a quantised pool, even dims are in the first product, odd ones in the second.
                    constexpr bool SPLIT = Memory::QUANTISED;
                    const float2 pair = SPLIT ? make_float2(out[i][0][2 * r + n], out[i][1][2 * r + n])
                                              : make_float2(out[i][n][2 * r], out[i][n][2 * r + 1]);
                    const int within = SPLIT ? 4 * (lane % 4) + 2 * n : 8 * n + 2 * (lane % 4);
                    act(lane / 4 + 8 * r, r, 16 * slice + within, pair);
                }
            }
        }
    }
};

// A unit that this CTA has seen from end to end.
template <typename T, typename S, int DIM>
__device__ __forceinline__ void finish(const Problem &problem, const Cursor<tile_tokens(DIM)> &at,
                                       const Part<T, S, DIM> &part) {
    const pagemgr_attention_args &args = problem.args;
    const int rows = at.sequence.num_queries * problem.group, lane = threadIdx.x % 32;
    float factor[2];
    int64_t offset[2];  // of the row in lse
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = at.unit * ROWS + lane / 4 + 8 * r;
        const Row where(problem, at.sequence, at.kv_head, min(row, rows - 1));
        const Closing closing(problem, where.head, part.largest[r], part.sum[r]);
        factor[r] = closing.factor;
        offset[r] = row < rows ? static_cast<int64_t>(where.token) * args.num_q_heads + where.head : -1;
        if (args.lse && offset[r] >= 0 && threadIdx.x < 32 && lane % 4 == 0) args.lse[offset[r]] = closing.lse;
    }
    part.for_each([&](int, int r, int column, float2 pair) {
        if (offset[r] < 0) return;
        *reinterpret_cast<uint32_t *>(static_cast<T *>(args.out) + offset[r] * DIM + column) =
            pack<T>(pair.x * factor[r], pair.y * factor[r]);
    });
}

// One that is to be combined with others.
template <typename T, typename S, int DIM>
__device__ __forceinline__ void leave(float2 *sums, float *outs, int rows, const Part<T, S, DIM> &part) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32 && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[lane / 4 + 8 * r] = make_float2(part.largest[r], part.sum[r]);
    }
    part.for_each([&](int row, int, int column, float2 pair) {
        if (row < rows) *reinterpret_cast<float2 *>(&outs[row * DIM + column]) = pair;
    });
}

// Adds tiles `done` to `stop` of the share, which are all of the unit at hand.
template <typename T, typename S, int DIM>
__device__ __forceinline__ Part<T, S, DIM> add_tiles(const Problem &problem, Shared<T, S, DIM> &shared,
                                                     Cursor<tile_tokens(DIM)> &at, int rows, int &done, int stop,
                                                     Turn &turn) {
    const Queries<T, S, DIM> queries(problem, at, shared);
    Part<T, S, DIM> part;
    for (; done < stop; ++done, ++at.tile, turn.advance(problem.stages)) {
        const int stage = turn.stage, buffer = done % 2;
        wait_at(shared_address(&shared.full[stage]), turn.parity);
        if (rows <= 8) queries.template score<1>(problem, at.first_token(), shared, stage, buffer);
        else queries.template score<2>(problem, at.first_token(), shared, stage, buffer);
        meet<READERS>();
        if (rows <= 8) part.template add<1>(shared, stage, buffer);
        else part.template add<2>(shared, stage, buffer);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive_at(shared_address(&shared.empty[stage]));
    }
    part.close();
    return part;
}

// The warps that compute.
template <typename T, typename S, int DIM>
__device__ __forceinline__ void read_all(const Problem &problem, Shared<T, S, DIM> &shared,
                                         Cursor<tile_tokens(DIM)> at, const Share &share) {
    const Workspace workspace(problem.args.workspace, gridDim.x);
    if (threadIdx.x == 0 && share.count > 0) {
        workspace.open(blockIdx.x, problem.number);
        if (at.tile > 0) workspace.open((share.start - at.tile) / share.size, problem.number);
    }
    Turn turn;
    for (int done = 0; done < share.count;) {
        const int start = share.start + done - at.tile, stop = start + at.tiles;  // of the unit, among all tiles
        const int here = min(stop, share.start + share.count) - share.start;
        const int rows = min(ROWS, at.sequence.num_queries * problem.group - at.unit * ROWS);
        const Part<T, S, DIM> part = add_tiles(problem, shared, at, rows, done, here, turn);
        --at.tile;
        if (start >= share.start && stop <= share.start + share.count) {
            finish(problem, at, part);
        } else {
            const int slot = 2 * blockIdx.x + (start >= share.start ? 1 : 0);
            const Parts parts{start / share.size, (stop - 1) / share.size};
            leave(workspace.sums + slot * ROWS, workspace.outs + static_cast<int64_t>(slot) * ROWS * DIM, rows, part);
            if (arrive(workspace, problem.number, parts))
                combine<T, DIM>(problem, workspace, at.sequence, at.unit, at.kv_head, parts, &shared.scores[0][0][0]);
        }
        if (done < share.count) at.advance(problem);
    }
}

// The rows past the last sequence's, which pad a batch to a fixed size. By a warp.
template <typename T, int DIM> __device__ __forceinline__ void clear_padding(const Problem &problem) {
    const pagemgr_attention_args &args = problem.args;
    const int64_t first =
        min(max(int64_t{args.query_start[args.num_seqs]}, int64_t{0}), args.num_tokens) * args.num_q_heads;
    for (int64_t row = first + blockIdx.x; row < args.num_tokens * args.num_q_heads; row += gridDim.x) {
        for (int i = threadIdx.x % 32; i < DIM; i += 32) static_cast<T *>(args.out)[row * DIM + i] = from_float<T>(0);
        if (args.lse && threadIdx.x % 32 == 0) args.lse[row] = -INFINITY;
    }
}

template <typename T, typename S, int DIM>
__global__ void __launch_bounds__(THREADS, 1) split_kv_kernel(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(128) char memory[];
    Shared<T, S, DIM> &shared = *reinterpret_cast<Shared<T, S, DIM> *>(memory);
    if (threadIdx.x == 0) {
        shared.init(problem.stages);
#if __CUDA_ARCH__ >= 900
        fence_async();
#endif
    }
    fetch_tables(problem);
    Cursor<tile_tokens(DIM)> cursor;
    const Share share = find_share(problem, cursor);  // synchronises the CTA
    if (threadIdx.x < READERS) {
        read_all(problem, shared, cursor, share);
    } else {
        Loader<T, S, DIM>{problem, shared, cursor}.run_all(share.count);
        clear_padding<T, DIM>(problem);
    }
    if (blockIdx.x == 0) {
        int *counters = static_cast<int *>(problem.prefill_workspace);
        for (int i = threadIdx.x; i < problem.num_counters; i += THREADS) counters[i] = 0;
    }
}

}  // namespace

int shared_bytes_needed(int head_dim) {
    pagemgr_kv kv{};
    kv.head_dim = head_dim;
    return with_shape(kv, [](auto type, auto dim) {
        using T = decltype(type);
        return Shared<T, T, dim.value>::bytes(1) + STATIC_BYTES;
    });
}

int plan_split_kv(Problem &problem) {
    static std::atomic<uint64_t> calls{uint64_t{std::random_device{}()} << 32 | std::random_device{}()};
    const pagemgr_attention_args &args = problem.args;
    const int64_t tokens = std::min<int64_t>(args.num_tokens, int64_t{args.num_seqs} * problem.few);
    const int64_t row_tiles = tokens * problem.group / ROWS + args.num_seqs;
    if (row_tiles * (args.max_seq_len / tile_tokens(args.kv.head_dim) + 2) > INT32_MAX / args.kv.num_kv_heads) {
        return fail(PAGEMGR_UNSUPPORTED, "so many tokens over sequences so long");
    }
    const Device *device;
    if (int status = find_device(args.run.device_index, &device)) return status;
    problem.number = calls.fetch_add(1) * 0x9e3779b97f4a7c15;  // odd, so that no two calls have the same
    // A few less than there are multiprocessors, if then the heads of a uniform batch are cut alike, or not at all.
    const int even = device->num_sms - device->num_sms % args.kv.num_kv_heads;
    problem.ctas = 16 * even >= 15 * device->num_sms ? even : device->num_sms;
    problem.stages = with_stored(args.kv, [&](auto type, auto stored, auto dim) {
        using S = decltype(stored);
        using Memory = Shared<decltype(type), S, dim.value>;
        const int left = device->max_shared_bytes - STATIC_BYTES - Memory::bytes(1);
        return std::min(1 + left / static_cast<int>(sizeof(typename Memory::Stage)), most_stages<S>(dim.value));
    });
    return PAGEMGR_OK;
}

int64_t split_kv_workspace(const Problem &problem) { return Workspace::bytes(problem.ctas, problem.args.kv.head_dim); }

int split_kv(const Problem &problem) {
    return with_stored(problem.args.kv, [&](auto type, auto stored, auto dim) {
        using T = decltype(type);
        using S = decltype(stored);
        const int shared_bytes = Shared<T, S, dim.value>::bytes(problem.stages);
        const Grid grid{dim3(problem.ctas), THREADS, shared_bytes};
        return launch<split_kv_kernel<T, S, dim.value>>(problem.args.run, grid, problem);
    });
}

}  // namespace pagemgr
