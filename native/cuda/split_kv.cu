// split_kv: attention for few new tokens over long caches, at the speed of memory.
//
//   line of tiles   │ seq 0 head 0 │ seq 0 head 1 │ seq 1 head 0 │ …     a unit: 16 rows of one sequence and head
//   cut into shares └ CTA 0 ┴ CTA 1 ┴ CTA 2 ┴ CTA 3 ┴ CTA 4 ┴ …          equal whatever the lengths
//
// The grid is fixed and each CTA finds its share from the lengths on the device, so that a captured graph serves every
// batch within its maxima (equal shares: Osama et al., Stream-K, 2023).
//
// A unit within one share is finished there. Of a cut one each CTA leaves its part in the workspace and raises a flag;
// whoever then sees all flags of the unit up combines the parts. Flags are up when they hold the call's own number, so
// that the workspace needs no preparation; the combiner takes them down for the next replay of a graph.
//
// Within a CTA, one warp loads tiles of 128 tokens into a ring of stages, across the borders of units; eight compute.
// For the logits each takes 16 of the tokens, for the values slices of 16 dims, and in between the logits pass through
// shared memory: every byte of K and V is read from there once, and no warp has to be merged with another.
#include <algorithm>
#include <random>

#include "split_kv_loader.cuh"

namespace pagemgr {
namespace {

// The queries of the unit at hand, in the computing warps. Each thread knows rows g and g + 8 (g = lane / 4); what is
// past the last row repeats it. `R` is 1 if no row is past the eighth, else 2.
template <typename T, int DIM> struct Queries {
    int position[2], first[2], last[2];  // of the query, of the first and the last key that it sees
    float slope[2];

    __device__ __forceinline__ Queries(const Problem &problem, const Cursor<Shared<T, DIM>::TOKENS> &at,
                                       Shared<T, DIM> &shared) {
        const Sequence &sequence = at.sequence;
        load_queries<T, DIM>(problem, sequence, at.kv_head, at.unit * ROWS, ROWS, &shared.query[0][0],
                             Shared<T, DIM>::QUERY_STRIDE, threadIdx.x, READERS);
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
    __device__ __forceinline__ void score(const Problem &problem, int first_token, Shared<T, DIM> &shared, int stage,
                                          int buffer) const {
        using Memory = Shared<T, DIM>;
        constexpr int MATRICES = Memory::RUN_TOKENS / RUNS;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        float dots[MATRICES][2][4] = {};  // of even and odd steps, which need not wait for each other
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
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float x[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int key = first_token + (2 * t + j) * Memory::RUN_TOKENS + warp + 8 * m;
                    x[j] = logit(problem, dots[m][0][2 * r + j] + dots[m][1][2 * r + j], slope[r], key - position[r]);
                    if (key < first[r] || key > last[r]) x[j] = -INFINITY;
                }
                *reinterpret_cast<float2 *>(&shared.scores[buffer][g + 8 * r][8 * (warp + 8 * m) + 2 * t]) =
                    make_float2(x[0], x[1]);
            }
        }
    }
};

// The part of a unit that this CTA has seen. Each thread has rows g and g + 8, and of their outputs the dims of its
// warp; largest and sum are the same in all warps, but sums are still to be added over the four lanes of a row.
template <typename T, int DIM> struct Part {
    static constexpr int TOKENS = Shared<T, DIM>::TOKENS;
    static constexpr int SLICES = (DIM / 16 + READERS / 32 - 1) / (READERS / 32);  // of 16 dims, for each warp
    float out[SLICES][2][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

    // Adds a tile, whose logits are in shared.scores.
    template <int R> __device__ __forceinline__ void add(const Shared<T, DIM> &shared, int stage, int buffer) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
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
            for (int i = 0; i < SLICES; ++i) {
#pragma unroll
                for (int n = 0; n < 2; ++n) out[i][n][2 * r] *= shrink, out[i][n][2 * r + 1] *= shrink;
            }
#pragma unroll
            for (int k = 0; k < TOKENS / 8; ++k) {
                const float low = exp2_fast(x[k].x - base), high = exp2_fast(x[k].y - base);
                sum[r] += low + high;
                weights[k / 2][r + k % 2 * 2] = pack<T>(low, high);
            }
        }
#pragma unroll
        for (int i = 0; i < SLICES; ++i) {
            const int slice = warp + i * (READERS / 32);
            if (slice >= DIM / 16) break;
            const uint32_t values =
                shared_address(
                &shared.stage[stage].value[lane % 8][lane / 8 % 2 * DIM + 16 * slice + lane / 16 * 8]);
#pragma unroll
            for (int k = 0; k < TOKENS / 16; ++k) {
                uint32_t value[4];
                load_transposed(value, values + 2 * k * DIM * static_cast<int>(sizeof(T)));
                multiply<T>(out[i][0], weights[k], value[0], value[1]);
                multiply<T>(out[i][1], weights[k], value[2], value[3]);
            }
        }
    }

    __device__ __forceinline__ void add_sums_of_lanes() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        }
    }

    // Calls `act(row, r, column, pair)`: two neighbouring outputs each time.
    template <typename Act> __device__ __forceinline__ void for_each(const Act &act) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < SLICES; ++i) {
            const int slice = warp + i * (READERS / 32);
            if (slice >= DIM / 16) break;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int column = 16 * slice + 8 * n + 2 * (lane % 4);
                    act(lane / 4 + 8 * r, r, column, make_float2(out[i][n][2 * r], out[i][n][2 * r + 1]));
                }
            }
        }
    }
};

// A unit that this CTA has seen from end to end.
template <typename T, int DIM>
__device__ __forceinline__ void finish(const Problem &problem, const Cursor<Shared<T, DIM>::TOKENS> &at,
                                       const Part<T, DIM> &part) {
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

template <typename T, int DIM>
__device__ __forceinline__ void leave(const Workspace &workspace, int slot, int rows, const Part<T, DIM> &part) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32 && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            workspace.sums[slot * ROWS + lane / 4 + 8 * r] = make_float2(part.largest[r], part.sum[r]);
    }
    part.for_each([&](int row, int, int column, float2 pair) {
        if (row >= rows) return;
        *reinterpret_cast<float2 *>(&workspace.outs[(static_cast<int64_t>(slot) * ROWS + row) * DIM + column]) = pair;
    });
}

// The warps that compute.
template <typename T, int DIM>
__device__ __forceinline__ void read_all(const Problem &problem, Shared<T, DIM> &shared,
                                         Cursor<Shared<T, DIM>::TOKENS> at, const Share &share) {
    const Workspace workspace(problem.args.workspace, gridDim.x);
    Turn turn;
    for (int done = 0; done < share.count;) {
        const Queries<T, DIM> queries(problem, at, shared);
        const int start = share.start + done - at.tile, stop = start + at.tiles;  // of the unit, among all tiles
        const int here = min(stop, share.start + share.count) - share.start;
        const int rows = min(ROWS, at.sequence.num_queries * problem.group - at.unit * ROWS);
        Part<T, DIM> part;
        for (; done < here; ++done, ++at.tile, turn.advance(problem.stages)) {
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
        --at.tile;
        part.add_sums_of_lanes();
        if (start >= share.start && stop <= share.start + share.count) {
            finish(problem, at, part);
        } else {
            const int slot = 2 * blockIdx.x + (start >= share.start ? 1 : 0);
            const Parts parts{start / share.size, (stop - 1) / share.size};
            leave(workspace, slot, rows, part);
            if (arrive(workspace, problem.number, parts, slot))
                combine<T, DIM>(problem, workspace, at.sequence, at.unit, at.kv_head, parts, &shared.scores[0][0][0]);
        }
        if (done < share.count) at.advance(problem);
    }
}

// The rows past the last sequence's, which pad a batch to a fixed size.
template <typename T, int DIM> __device__ __forceinline__ void clear_padding(const Problem &problem) {
    const pagemgr_attention_args &args = problem.args;
    const int64_t first =
        min(max(int64_t{args.query_start[args.num_seqs]}, int64_t{0}), args.num_tokens) * args.num_q_heads;
    for (int64_t row = first + blockIdx.x; row < args.num_tokens * args.num_q_heads; row += gridDim.x) {
        for (int i = threadIdx.x; i < DIM; i += THREADS) static_cast<T *>(args.out)[row * DIM + i] = from_float<T>(0);
        if (args.lse && threadIdx.x == 0) args.lse[row] = -INFINITY;
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1) split_kv_kernel(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(128) char memory[];
    Shared<T, DIM> &shared = *reinterpret_cast<Shared<T, DIM> *>(memory);
    if (threadIdx.x == 0) {
        shared.init(problem.stages);
#if __CUDA_ARCH__ >= 900
        fence_async();
#endif
    }
    Cursor<Shared<T, DIM>::TOKENS> cursor;
    const Share share = find_share(problem, cursor);  // synchronises the CTA
    if (threadIdx.x < READERS) {
        read_all(problem, shared, cursor, share);
    } else {
        Loader<T, DIM>{problem, shared, cursor}.run_all(share.count);
    }
    clear_padding<T, DIM>(problem);
    if (blockIdx.x == 0) {
        int *counters = static_cast<int *>(problem.prefill_workspace);
        for (int i = threadIdx.x; i < problem.num_counters; i += THREADS) counters[i] = 0;
    }
}

}  // namespace

int shared_bytes_needed(int head_dim) {
    pagemgr_kv kv{};
    kv.head_dim = head_dim;
    return with_shape(
        kv, [](auto type, auto dim) { return Shared<decltype(type), dim.value>::bytes(1) + STATIC_BYTES; });
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
    // A few less than there are multiprocessors, if then the heads of a uniform batch are cut alike, or not at all.
    const int even = device->num_sms - device->num_sms % args.kv.num_kv_heads;
    problem.ctas = 16 * even >= 15 * device->num_sms ? even : device->num_sms;
    problem.stages = with_shape(args.kv, [&](auto type, auto dim) {
        using Memory = Shared<decltype(type), dim.value>;
        const int left = device->max_shared_bytes - STATIC_BYTES - Memory::bytes(1);
        return std::min(1 + left / static_cast<int>(sizeof(typename Memory::Stage)), most_stages(dim.value));
    });
    problem.number = calls.fetch_add(1) * 0x9e3779b97f4a7c15;  // odd, so that no two calls have the same
    return PAGEMGR_OK;
}

int64_t split_kv_workspace(const Problem &problem) { return Workspace::bytes(problem.ctas, problem.args.kv.head_dim); }

int split_kv(const Problem &problem) {
    return with_shape(problem.args.kv, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int DIM = dim.value;
        const Grid grid{dim3(problem.ctas), THREADS, Shared<T, DIM>::bytes(problem.stages)};
        return launch<split_kv_kernel<T, DIM>>(problem.args.run, grid, problem);
    });
}

}  // namespace pagemgr
