// What the attention kernels share: the problem, who may see whom, how a dot product becomes a logit.
//
// The rows of one sequence and K/V head are its (new token, query head of the group) pairs, token by token: row r is
// token r / group, head r % group of the group. A tile of rows therefore reads each key once for the whole group.
// Logits are kept in base 2: log2(e) is folded into the scale, so that a weight is one exp2.
#pragma once

#include "tile.cuh"

namespace pagemgr {

constexpr int HEAD_DIMS[] = {64, 80, 96, 128, 192, 256};
constexpr int BLOCK_SIZES[] = {8, 16, 32, 64, 128};

// Shared memory that a CTA needs for this head dim.
int shared_bytes_needed(int head_dim);

struct Problem {
    pagemgr_attention_args args;
    int group;        // query heads per K/V head
    int block_shift;  // log2 of the block size
    int few;          // sequences of at most so many new tokens are split_kv's, the others prefill's
    bool vectors;     // queries can be read 16 bytes at a time
    float scale;      // of dot products: to base-2 logits or, with a softcap, to the argument of tanh
    float softcap;    // base 2; 0 is none

    // Of split_kv, set by plan_split_kv:
    uint64_t number;  // of the call
    int ctas, stages;

    // Of prefill_wgmma: its part of the workspace, in which split_kv sets so many counters at the front to 0.
    void *prefill_workspace;
    int num_counters;
};

// One sequence, as the kernels see it: lengths are clamped, so that no table entry past max_seq_len is read.
struct Sequence {
    int query_begin;  // its first row of query and out
    int num_queries;
    int position;     // of its first new token
    int first, stop;  // positions [first, stop) hold all that its new tokens see, and nothing unwritten

    __device__ __forceinline__ Sequence() : query_begin(0), num_queries(0), position(0), first(0), stop(0) {}

    __device__ __forceinline__ Sequence(const Problem &problem, int index) {
        const pagemgr_attention_args &args = problem.args;
        const int num_tokens = static_cast<int>(args.num_tokens);
        query_begin = min(max(args.query_start[index], 0), num_tokens);
        num_queries = min(max(args.query_start[index + 1], query_begin), num_tokens) - query_begin;
        stop = min(max(args.seq_lens[index], 0), static_cast<int>(args.max_seq_len));
        position = stop - num_queries;
        first = args.window > 0 ? max(0, position - args.window + 1) : 0;
    }
};

// The keys that a query at this position sees are those at [first, last].
struct Visible {
    int first, last;

    __device__ __forceinline__ Visible(const Problem &problem, const Sequence &sequence, int position) {
        first = problem.args.window > 0 ? max(sequence.first, position - problem.args.window + 1) : sequence.first;
        last = problem.args.causal ? min(position, sequence.stop - 1) : sequence.stop - 1;
    }
    __device__ __forceinline__ bool holds(int key) const { return key >= first && key <= last; }
};

// softcap * tanh(x)
__device__ __forceinline__ float capped(const Problem &problem, float x) {
    return problem.softcap * (1 - __fdividef(2, 1 + exp2_fast(2 * LOG2_E * x)));
}

// The base-2 logit of a dot product; `slope` is base 2 as well, `distance` is key position - query position.
__device__ __forceinline__ float logit(const Problem &problem, float dot, float slope, int distance) {
    float x = dot * problem.scale;
    if (problem.softcap > 0) x = capped(problem, x);
    return fmaf(slope, static_cast<float>(distance), x);
}

// Base-2 slope of a head.
__device__ __forceinline__ float slope_of(const Problem &problem, int head) {
    return problem.args.alibi_slopes ? problem.args.alibi_slopes[head] * LOG2_E : 0.0f;
}

// What closes a row: the factor that turns the sum of weighted values into the output, and the log denominator.
struct Closing {
    float factor, lse;

    // `largest` and `sum` are over the keys seen: max of the logits, sum of exp2(logit - largest).
    __device__ __forceinline__ Closing(const Problem &problem, int head, float largest, float sum) {
        float top = largest;
        if (problem.args.sinks) {
            const float sink = problem.args.sinks[head] * LOG2_E;
            top = fmaxf(largest, sink);
            sum = (largest == -INFINITY ? 0.0f : sum * exp2_fast(largest - top)) + exp2_fast(sink - top);
        }
        factor = largest == -INFINITY ? 0.0f : exp2_fast(largest - top) / sum;
        lse = top == -INFINITY ? -INFINITY : (top + log2f(sum)) * LN_2;
    }
};

// Where a tile's row `row` of the sequence's packed rows lies.
struct Row {
    int token, head;  // of all new tokens; of all query heads

    __device__ __forceinline__ Row(const Problem &problem, const Sequence &sequence, int kv_head, int row) {
        const int within = row / problem.group;
        token = sequence.query_begin + within;
        head = kv_head * problem.group + row - within * problem.group;
    }
};

// A block id from a table that is to be read; if there is no such block it is reported, and block 0 is read instead.
__device__ __forceinline__ int64_t existing(const Problem &problem, int block) {
    if (block >= 0 && block < problem.args.kv.num_blocks) return block;
    report(problem.args.run, PAGEMGR_BAD_BLOCK);
    return 0;
}

// Element offset of a token's row in key and value.
__device__ __forceinline__ int64_t kv_offset(const Problem &problem, int64_t block, int token, int kv_head) {
    const pagemgr_kv &kv = problem.args.kv;
    return block * kv.block_stride + kv_head * kv.head_stride + (token & (kv.block_size - 1)) * kv.token_stride;
}

// Rows of queries into shared memory, [count][stride], zeros past the sequence's last row.
template <typename T, int DIM>
__device__ __forceinline__ void load_queries(const Problem &problem, const Sequence &sequence, int kv_head,
                                             int first_row, int count, T *target, int stride, int thread, int threads) {
    const pagemgr_attention_args &args = problem.args;
    constexpr int CHUNKS = DIM / 8;
    const int rows = sequence.num_queries * problem.group;
    for (int i = thread; i < count * CHUNKS; i += threads) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (first_row + row < rows) {
            const Row at(problem, sequence, kv_head, first_row + row);
            const T *source = static_cast<const T *>(args.query) + at.token * args.query_token_stride +
                              at.head * args.query_head_stride + chunk * 8;
            if (problem.vectors) vector = *reinterpret_cast<const uint4 *>(source);
            else
                for (int j = 0; j < 8; ++j) reinterpret_cast<T *>(&vector)[j] = source[j];
        }
        *reinterpret_cast<uint4 *>(target + row * stride + chunk * 8) = vector;
    }
}

// split_kv.cu: any batch, at the speed of memory if its sequences have few new tokens.
int plan_split_kv(Problem &problem);
int64_t split_kv_workspace(const Problem &problem);  // bytes
int split_kv(const Problem &problem);

// prefill.cu: the sequences with more than problem.few new tokens.
int prefill(const Problem &problem);

// prefill_wgmma.cu: the same, faster, on compute capability 9.0. `done` is false if something there does not fit.
int plan_prefill_wgmma(Problem &problem, int64_t *workspace_bytes);
int prefill_wgmma(const Problem &problem, bool *done);

// Where the scale of a token's row lies among those of keys or values.
__device__ __forceinline__ int64_t scale_offset(const Problem &problem, int64_t block, int token, int kv_head) {
    const pagemgr_kv &kv = problem.args.kv;
    return block * kv.scale_block_stride + kv_head * kv.scale_head_stride + (token & (kv.block_size - 1));
}

// Calls `act(T{}, std::integral_constant<int, head_dim>{})` for a dtype and head dim among those declared.
template <typename Act> auto with_shape(const pagemgr_kv &kv, const Act &act) {
    const auto with_dim = [&](auto type) {
        switch (kv.head_dim) {
            case 64: return act(type, std::integral_constant<int, 64>{});
            case 80: return act(type, std::integral_constant<int, 80>{});
            case 96: return act(type, std::integral_constant<int, 96>{});
            case 128: return act(type, std::integral_constant<int, 128>{});
            case 192: return act(type, std::integral_constant<int, 192>{});
            default: return act(type, std::integral_constant<int, 256>{});
        }
    };
    return kv.dtype == PAGEMGR_FLOAT16 ? with_dim(__half{}) : with_dim(__nv_bfloat16{});
}

// The same, with what the pool holds between the two: `act(T{}, S{}, …)`, S being T or E4m3.
template <typename Act> auto with_stored(const pagemgr_kv &kv, const Act &act) {
    return with_shape(kv, [&](auto type, auto dim) {
        return kv.kv_dtype == PAGEMGR_KV_PLAIN ? act(type, type, dim) : act(type, E4m3{}, dim);
    });
}

}  // namespace pagemgr
