// write_kv: new tokens into their slots, K and V in one launch.
//
// Consecutive threads take consecutive vectors of one token, so that each (token, head) is one coalesced run of
// head_dim elements on both sides. All reads of a thread are issued before its first write.
#include "library.cuh"

namespace pagemgr {
namespace {

constexpr int THREADS = 256;
constexpr int VECTORS = 2;  // of K and of V, for each thread

struct Rows {
    pagemgr_write_kv_args args;
    int vectors_per_head;  // of type Vector
    int vectors_per_token;
};

template <typename Vector> __global__ void __launch_bounds__(THREADS) write_kv(const __grid_constant__ Rows rows) {
    constexpr int ELEMENTS = sizeof(Vector) / 2;
    const pagemgr_write_kv_args &args = rows.args;
    const int64_t total = args.num_tokens * rows.vectors_per_token;
    const int64_t num_slots = args.kv.num_blocks * args.kv.block_size;
    Vector key[VECTORS], value[VECTORS];
    int64_t target[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int64_t vector = (int64_t{blockIdx.x} * VECTORS + i) * THREADS + threadIdx.x;
        target[i] = -1;
        if (vector >= total) continue;
        const int64_t token = vector / rows.vectors_per_token;
        const int within = static_cast<int>(vector - token * rows.vectors_per_token);
        const int head = within / rows.vectors_per_head;
        const int element = (within - head * rows.vectors_per_head) * ELEMENTS;
        key[i] =
            *reinterpret_cast<const Vector *>(static_cast<const uint16_t *>(args.key) + token * args.key_token_stride +
                                              head * args.key_head_stride + element);
        value[i] = *reinterpret_cast<const Vector *>(static_cast<const uint16_t *>(args.value) +
                                                     token * args.value_token_stride + head * args.value_head_stride +
                                                     element);
        const int64_t slot = args.slot_mapping[token];
        if (slot < 0 || slot >= num_slots) {
            if (slot != -1 && within == 0) report(args.run, PAGEMGR_BAD_SLOT);
            continue;
        }
        const int64_t block = slot / args.kv.block_size, offset = slot - block * args.kv.block_size;
        target[i] = block * args.kv.block_stride + head * args.kv.head_stride + offset * args.kv.token_stride + element;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        if (target[i] < 0) continue;
        *reinterpret_cast<Vector *>(static_cast<uint16_t *>(args.kv.key) + target[i]) = key[i];
        *reinterpret_cast<Vector *>(static_cast<uint16_t *>(args.kv.value) + target[i]) = value[i];
    }
}

template <typename Vector> int launch_write(const pagemgr_write_kv_args &args) {
    const int vectors_per_head = args.kv.head_dim / static_cast<int>(sizeof(Vector) / 2);
    const Rows rows{args, vectors_per_head, vectors_per_head * args.kv.num_kv_heads};
    const int64_t total = args.num_tokens * rows.vectors_per_token;
    const int64_t ctas = (total + THREADS * VECTORS - 1) / (THREADS * VECTORS);
    if (ctas > INT32_MAX)
        return fail(PAGEMGR_UNSUPPORTED, "%lld tokens are too many for one launch", (long long)args.num_tokens);
    return launch<write_kv<Vector>>(args.run, Grid{dim3(static_cast<unsigned>(ctas)), THREADS}, rows);
}

bool in_vectors_of_16_bytes(const pagemgr_write_kv_args &args) {
    uint64_t bits = reinterpret_cast<uint64_t>(args.key) | reinterpret_cast<uint64_t>(args.value) |
                    reinterpret_cast<uint64_t>(args.kv.key) | reinterpret_cast<uint64_t>(args.kv.value);
    for (int64_t stride :
         {args.key_token_stride, args.key_head_stride, args.value_token_stride, args.value_head_stride,
          args.kv.block_stride, args.kv.head_stride, args.kv.token_stride, int64_t{args.kv.head_dim}}) {
        bits |= static_cast<uint64_t>(2 * stride);
    }
    return bits % 16 == 0;
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_write_kv(const pagemgr_write_kv_args *args) {
    if (args->kv.dtype != PAGEMGR_FLOAT16 && args->kv.dtype != PAGEMGR_BFLOAT16) {
        return fail(PAGEMGR_UNSUPPORTED, "dtype %d is neither float16 nor bfloat16", args->kv.dtype);
    }
    if (args->kv.kv_dtype != PAGEMGR_KV_PLAIN) return fail(PAGEMGR_UNSUPPORTED, "a quantised pool");
    if (args->kv.num_kv_heads < 1 || args->kv.head_dim < 1 || args->kv.block_size < 1 || args->num_tokens < 0) {
        return fail(PAGEMGR_INVALID, "num_kv_heads, head_dim and block_size must be at least 1, num_tokens at least 0");
    }
    if (args->num_tokens == 0) return PAGEMGR_OK;
    const OnDevice device(args->run.device_index);
    return in_vectors_of_16_bytes(*args) ? launch_write<uint4>(*args) : launch_write<uint16_t>(*args);
}
