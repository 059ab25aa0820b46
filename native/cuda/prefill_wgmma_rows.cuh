// What a warpgroup of prefill_wgmma keeps of its rows in registers, and does with it.
#pragma once

#include "prefill_wgmma.cuh"

namespace pagemgr {
namespace hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Weights may exceed 1 by so many powers of two before the largest logit is looked at anew (as FlashAttention-4 does):
// then outputs and sums rarely have to shrink.
constexpr float LAZY = 8;
constexpr int CHAINS = 4;

// A thread's share of its warpgroup's 64 rows: rows g and g + 8 of its warp's 16, with lane = 4 * g + t.
template <typename T, int DIM> struct Rows {
    using Memory = Shared<T, DIM>;
    static constexpr int KEYS = Memory::KEYS, PANELS = Memory::PANELS;
    static constexpr int PART_PANELS = PANELS % 2 ? 1 : 2, PARTS = PANELS / PART_PANELS;  // of the outputs
    float logits[KEYS / 2];
    uint32_t weights[KEYS / 4];
    using Outs = float[PARTS][PART_PANELS * PANEL / 2];
    Outs out;
    float largest[2], sum[2];
    int position[2], first[2], last[2];  // of the query; of the first and the last key that it sees
    float slope[2], shrink[2];

    // The token of a tile of queries that a row of the tile belongs to: row / group.
    static __device__ __forceinline__ int token_of(const Problem &problem, int row) {
        return static_cast<int>((static_cast<float>(row) + 0.5f) * __frcp_rn(static_cast<float>(problem.group)));
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; ++r) largest[r] = -INFINITY, sum[r] = 0;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < PART_PANELS * PANEL / 2; ++i) out[part][i] = 0;
        }
    }

    __device__ __forceinline__ void look(const Problem &problem, const Work &work) {
        const int thread = threadIdx.x - 128, lane = thread % 32;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = thread / 32 * 16 + lane / 4 + 8 * r, within = token_of(problem, row);
            position[r] = work.sequence.position + min(work.first_token + within, work.sequence.num_queries - 1);
            const Visible visible(problem, work.sequence, position[r]);
            first[r] = visible.first;
            last[r] = visible.last;
            slope[r] = slope_of(problem, work.kv_head * problem.group + row - within * problem.group);
        }
    }

    // logits = queries × keysᵀ, under way
    __device__ __forceinline__ void multiply_keys(const Memory &shared, int warpgroup, int query_place, int key_place) {
        constexpr int QUERY_PANEL = ROWS / 8 * GROUP_BYTES;
        const T *mine = shared.query[query_place][0][warpgroup * 64];
        const Descriptor queries(shared_address(mine), QUERY_PANEL, GROUP_BYTES);
        const Descriptor keys(shared_address(shared.key[key_place]), GROUP_BYTES, PANELS * GROUP_BYTES);
#pragma unroll
        for (int column = 0; column < DIM; column += 16) {
            const int panel = column / PANEL, within = column - panel_column(DIM, panel);
            multiply_async<T>(logits, queries.at(panel * QUERY_PANEL + column % PANEL * 2),
                              keys.at(panel * GROUP_BYTES + within * 2), column > 0);
        }
        close_products();
    }

    // out += weights × values, under way
    __device__ __forceinline__ void multiply_values(const Memory &shared, int place) {
        const Descriptor values(shared_address(shared.value[place]), GROUP_BYTES, PANELS * GROUP_BYTES);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k)
                multiply_async<T>(out[part], &weights[4 * k],
                                  values.at((2 * k * PANELS + part * PART_PANELS) * GROUP_BYTES));
        }
        close_products();
    }

    __device__ __forceinline__ void pin_outputs() {
        pin(weights);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) pin(out[part]);
    }
    __device__ __forceinline__ void pin_all() {
        pin(logits);
        pin_outputs();
    }

    // Dot products become base-2 logits by the rule of `logit`, with one branch for all. Where that is nothing but a
    // scale, it is left to `weigh`.
    __device__ __forceinline__ void bend(const Problem &problem, int first_key) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) logits[i] *= problem.scale;
        if (problem.softcap > 0) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) logits[i] = capped(problem, logits[i]);
        }
        if (problem.args.alibi_slopes) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                const int r = i / 2 % 2, distance = first_key + i / 4 * 8 + i % 2 - position[r];
                logits[i] = fmaf(slope[r], static_cast<float>(distance), logits[i]);
            }
        }
    }

    // Logits become weights, in float32 as yet; `shrink` is the factor for what was added up so far.
    __device__ __forceinline__ void weigh(const Problem &problem, const Work &work, int tile, bool plain) {
        const int token = work.origin + tile * KEYS, column = threadIdx.x % 4 * 2;
        if (!plain) bend(problem, token + column);
        if (token + KEYS - 1 > work.all_until) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                if (i / 4 * 8 + i % 2 > last[i / 2 % 2] - token - column) logits[i] = -INFINITY;
            }
        }
        if (token < work.all_from) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                if (i / 4 * 8 + i % 2 < first[i / 2 % 2] - token - column) logits[i] = -INFINITY;
            }
        }
        // Several chains for each row, as one after the other they would take longer than the products.
        const float scale = plain ? problem.scale : 1.0f;
        float tops[2][CHAINS], sums[2][CHAINS] = {}, base[2];
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            float &top = tops[i / 2 % 2][i / 4 % CHAINS];
            top = i / 4 < CHAINS && i % 2 == 0 ? logits[i] : fmaxf(top, logits[i]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = largest[r];
#pragma unroll
            for (int chain = 0; chain < CHAINS; ++chain) top = fmaxf(top, tops[r][chain]);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float rise = (top - largest[r]) * scale;
            shrink[r] = rise > LAZY ? exp2_fast(-rise) : 1.0f;
            if (rise > LAZY) largest[r] = top;
            base[r] = largest[r] == -INFINITY ? 0.0f : largest[r] * scale;
        }
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            logits[i] = exp2_fast(fmaf(logits[i], scale, -base[i / 2 % 2]));
            sums[i / 2 % 2][i / 4 % CHAINS] += logits[i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] *= shrink[r];
#pragma unroll
            for (int chain = 0; chain < CHAINS; ++chain) sum[r] += sums[r][chain];
        }
    }

    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack<T>(logits[2 * i], logits[2 * i + 1]);
    }

    __device__ __forceinline__ void shrink_outputs() {
        if (!__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) return;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < PART_PANELS * PANEL / 2; ++i) out[part][i] *= shrink[i / 2 % 2];
        }
    }

    // This thread's vectors of the part that a CTA leaves, so many apart.
    static constexpr int READING = 128 * READERS;
    static __device__ __forceinline__ float4 *part_of(const Workspace &workspace, int slot) {
        return workspace.parts + slot * part_vectors(DIM) * READING + threadIdx.x - 128;
    }

    // Two neighbouring outputs of each row.
    template <typename O> static __device__ __forceinline__ auto *vector(O &outs, int index) {
        constexpr int VECTORS = PART_PANELS * PANEL / 8;
        return &outs[index / VECTORS][index % VECTORS * 4];
    }

    // What was added up goes to the workspace, for `gather`.
    __device__ __forceinline__ void leave(const Workspace &workspace, int slot) const {
        float4 *part = part_of(workspace, slot);
        part[0] = make_float4(largest[0], largest[1], sum[0], sum[1]);
#pragma unroll
        for (int i = 0; i < PANELS * PANEL / 8; ++i) {
            const float *four = vector(out, i);
            part[(1 + i) * READING] = make_float4(four[0], four[1], four[2], four[3]);
        }
    }

    // Writes what the parts of all CTAs, in their order, come to.
    static __device__ __forceinline__ void gather(const Problem &problem, const Workspace &workspace, const Work &work,
                                                  Memory &shared, float scale) {
        float tops[2] = {-INFINITY, -INFINITY}, sums[2] = {};
        Outs outs = {};
        for (int cta = work.first_cta; cta <= work.last_cta; ++cta) {
            const float4 state = __ldcg(part_of(workspace, Workspace::slot(work, cta)));
            tops[0] = fmaxf(tops[0], state.x), tops[1] = fmaxf(tops[1], state.y);
        }
        for (int cta = work.first_cta; cta <= work.last_cta; ++cta) {
            const float4 *from = part_of(workspace, Workspace::slot(work, cta)), state = __ldcg(from);
            const float weight[2] = {state.x == -INFINITY ? 0.0f : exp2_fast((state.x - tops[0]) * scale),
                                     state.y == -INFINITY ? 0.0f : exp2_fast((state.y - tops[1]) * scale)};
            sums[0] = fmaf(state.z, weight[0], sums[0]), sums[1] = fmaf(state.w, weight[1], sums[1]);
#pragma unroll
            for (int i = 0; i < PANELS * PANEL / 8; ++i) {
                const float4 others = __ldcg(from + (1 + i) * READING);
                float *four = vector(outs, i);
                four[0] = fmaf(others.x, weight[0], four[0]), four[1] = fmaf(others.y, weight[0], four[1]);
                four[2] = fmaf(others.z, weight[1], four[2]), four[3] = fmaf(others.w, weight[1], four[3]);
            }
        }
        __syncwarp();  // what `write` needs to know is looked up after this, as registers are scarce
        write(problem, work, shared, 0, scale, tops, sums, outs);
    }

    // Through the rows' own place among the queries, which nobody reads any more, so that whole rows are stored.
    static __device__ __forceinline__ void write(const Problem &problem, const Work &work, Memory &shared, int place,
                                                 float scale, const float (&largest)[2], const float (&sums)[2],
                                                 const Outs &out) {
        const pagemgr_attention_args &args = problem.args;
        const int thread = threadIdx.x - 128, lane = thread % 32, g = lane / 4, t = lane % 4;
        const int first_row = thread / 32 * 16, tokens = ROWS / problem.group;
        const int count = min(tokens, work.sequence.num_queries - work.first_token) * problem.group;
        // Of row 0 in lse, and what each further token adds to its row number.
        const int64_t origin = int64_t{work.sequence.query_begin + work.first_token} * args.num_q_heads +
                               work.kv_head * problem.group;
        const int further = args.num_q_heads - problem.group;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = sums[r] + __shfl_xor_sync(~0u, sums[r], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int row = first_row + g + 8 * r, within = token_of(problem, row);
            const Closing closing(problem, work.kv_head * problem.group + row - within * problem.group,
                                  largest[r] == -INFINITY ? -INFINITY : largest[r] * scale, sum);
            if (args.lse && row < count && t == 0) args.lse[origin + row + within * further] = closing.lse;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int i = 2 * r; i < PART_PANELS * PANEL / 2; i += 4) {
                    const int panel = part * PART_PANELS + i / 32, chunk = panel_column(DIM, panel) / 8 + i / 4 % 8;
                    T *target = &shared.query[place][chunk / 8][row][(chunk % 8 ^ g) * 8 + 2 * t];
                    *reinterpret_cast<uint32_t *>(target) =
                        pack<T>(out[part][i] * closing.factor, out[part][i + 1] * closing.factor);
                }
            }
        }
        fence_async();  // the copy engine writes there next
        __syncwarp();
        constexpr int CHUNKS = DIM / 8;  // of a row
        T *out_rows = static_cast<T *>(args.out) + origin * DIM;
#pragma unroll 4
        for (int i = 0; i < CHUNKS / 2; ++i) {
            const int row = first_row + (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
            const uint4 vector =
                *reinterpret_cast<const uint4 *>(&shared.query[place][chunk / 8][row][(chunk % 8 ^ row % 8) * 8]);
            const int64_t at = (row + int64_t{token_of(problem, row)} * further) * DIM + chunk * 8;
            if (row < count) *reinterpret_cast<uint4 *>(out_rows + at) = vector;
        }
    }
};

#endif

}  // namespace hopper
}  // namespace pagemgr
