// attention: checks a call and hands it to the kernels.
#include <algorithm>
#include <iterator>

#include "attention.cuh"

namespace pagemgr {
namespace {

template <typename List> bool contains(const List &list, int number) {
    return std::find(std::begin(list), std::end(list), number) != std::end(list);
}

int refuse(const pagemgr_attention_args &args) {
    const pagemgr_kv &kv = args.kv;
    if (kv.dtype != PAGEMGR_FLOAT16 && kv.dtype != PAGEMGR_BFLOAT16) {
        return fail(PAGEMGR_UNSUPPORTED, "dtype %d is neither float16 nor bfloat16", kv.dtype);
    }
    if (kv.kv_dtype != PAGEMGR_KV_PLAIN && kv.kv_dtype != PAGEMGR_KV_FLOAT8_E4M3FN) {
        return fail(PAGEMGR_UNSUPPORTED, "a pool quantised otherwise than to float8_e4m3fn");
    }
    if (!contains(HEAD_DIMS, kv.head_dim)) return fail(PAGEMGR_UNSUPPORTED, "head_dim %d", kv.head_dim);
    if (!contains(BLOCK_SIZES, kv.block_size)) return fail(PAGEMGR_UNSUPPORTED, "block_size %d", kv.block_size);
    if (kv.num_kv_heads < 1 || args.num_q_heads < 1 || args.num_q_heads % kv.num_kv_heads) {
        return fail(PAGEMGR_INVALID, "%d query heads are no multiple of %d K/V heads", args.num_q_heads,
                    kv.num_kv_heads);
    }
    if (args.num_seqs < 0 || args.num_tokens < 0 || args.max_query_len < 0 || args.max_seq_len < 0 || args.window < 0) {
        return fail(PAGEMGR_INVALID, "counts, lengths and window must not be negative");
    }
    if (args.num_seqs > 0 && kv.num_blocks < 1) return fail(PAGEMGR_INVALID, "a pool without blocks");
    if (args.num_tokens > INT32_MAX / 2 || args.max_seq_len > INT32_MAX / 2) {
        return fail(PAGEMGR_UNSUPPORTED, "more than 2^30 tokens in a batch or sequence");
    }
    return PAGEMGR_OK;
}

// Whether keys, values and scales can be read 16 bytes at a time.
bool in_vectors_of_16_bytes(const pagemgr_kv &kv) {
    const bool plain = kv.kv_dtype == PAGEMGR_KV_PLAIN;
    uint64_t bits = reinterpret_cast<uint64_t>(kv.key) | reinterpret_cast<uint64_t>(kv.value);
    for (int64_t stride : {kv.block_stride, kv.head_stride, kv.token_stride})
        bits |= static_cast<uint64_t>(plain ? 2 * stride : stride);
    if (!plain) {
        bits |= reinterpret_cast<uint64_t>(kv.key_scale) | reinterpret_cast<uint64_t>(kv.value_scale) |
                static_cast<uint64_t>(4 * kv.scale_block_stride) | static_cast<uint64_t>(4 * kv.scale_head_stride);
    }
    return bits % 16 == 0;
}

Problem problem_of(const pagemgr_attention_args &args) {
    Problem problem{};
    problem.args = args;
    problem.group = args.num_q_heads / args.kv.num_kv_heads;
    while (1 << problem.block_shift < args.kv.block_size) ++problem.block_shift;
    problem.scale = args.softcap > 0 ? args.scale / args.softcap : args.scale * LOG2_E;
    problem.softcap = args.softcap * LOG2_E;
    problem.few = std::max(1, 64 / problem.group);  // four units of split_kv, of which three find K and V in the L2
    const uint64_t bits = reinterpret_cast<uint64_t>(args.query) | static_cast<uint64_t>(2 * args.query_token_stride) |
                          static_cast<uint64_t>(2 * args.query_head_stride);
    problem.vectors = bits % 16 == 0;
    return problem;
}

// Who does what, and the workspace that this takes.
int plan(Problem &problem, int64_t *workspace_bytes) {
    if (int status = plan_split_kv(problem)) return status;
    int64_t more;
    if (int status = plan_prefill_wgmma(problem, &more)) return status;
    const int64_t first = (split_kv_workspace(problem) + 63) / 64 * 64;
    problem.prefill_workspace = static_cast<char *>(problem.args.workspace) + first;
    *workspace_bytes = first + more;
    return PAGEMGR_OK;
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_attention_workspace(const pagemgr_attention_args *args, int64_t *bytes) {
    if (int status = refuse(*args)) return status;
    const OnDevice device(args->run.device_index);
    Problem problem = problem_of(*args);
    return plan(problem, bytes);
}

int32_t pagemgr_attention(const pagemgr_attention_args *args) {
    if (int status = refuse(*args)) return status;
    if (!in_vectors_of_16_bytes(args->kv)) {
        return fail(PAGEMGR_UNSUPPORTED,
                    "keys, values and scales must be aligned to 16 bytes, as must be their strides");
    }
    if (args->num_tokens == 0) return PAGEMGR_OK;
    const OnDevice device(args->run.device_index);
    Problem problem = problem_of(*args);
    int64_t needed;
    if (int status = plan(problem, &needed)) return status;
    if (args->workspace_bytes < needed) {
        return fail(PAGEMGR_INVALID, "the workspace has %lld bytes, %lld are needed", (long long)args->workspace_bytes,
                    (long long)needed);
    }
    if (int status = split_kv(problem)) return status;
    if (args->max_query_len <= problem.few) return PAGEMGR_OK;
    bool done = false;
    if (args->kv.kv_dtype == PAGEMGR_KV_PLAIN) {
        if (int status = prefill_wgmma(problem, &done)) return status;
    }
    return done ? static_cast<int>(PAGEMGR_OK) : prefill(problem);
}
