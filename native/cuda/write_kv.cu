// write_kv: new tokens into their slots, K and V in one launch.
//
// Consecutive threads take consecutive vectors of one token, so that each (token, head) is one coalesced run of
// head_dim elements on both sides. All reads of a thread are issued before its first write.
//
// Into a quantised pool, a warp takes the key and the value of one (token, head): their largest magnitudes make the
// scales, and then the rows are read again, from the L1.
#include <cuda_fp8.h>

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

// Neighbouring elements of a row, N of them.
template <typename E, int N> struct alignas(N * sizeof(E)) Elements {
    E of[N];
};

// One row of `dim` elements by a warp; returns its scale. A NaN makes the scale NaN: as bits, it is the largest.
template <typename T, int N> __device__ __forceinline__ float quantise_row(const T *from, uint8_t *to, int dim) {
    constexpr float LARGEST = 448, LEAST_SCALE = 0x1p-126f;
    unsigned top = 0;
    for (int i = threadIdx.x % 32 * N; i < dim; i += 32 * N) {
        const auto x = *reinterpret_cast<const Elements<T, N> *>(from + i);
        for (int j = 0; j < N; ++j) top = max(top, __float_as_uint(fabsf(to_float(x.of[j]))));
    }
    float scale = __uint_as_float(__reduce_max_sync(~0u, top)) / LARGEST;
    if (scale < LEAST_SCALE) scale = 0;
    const float divisor = scale == 0 ? INFINITY : scale;
    for (int i = threadIdx.x % 32 * N; i < dim; i += 32 * N) {
        const auto x = *reinterpret_cast<const Elements<T, N> *>(from + i);
        Elements<uint8_t, N> stored;
        for (int j = 0; j < N; ++j)
            stored.of[j] = __nv_cvt_float_to_fp8(to_float(x.of[j]) / divisor, __NV_SATFINITE, __NV_E4M3);
        *reinterpret_cast<Elements<uint8_t, N> *>(to + i) = stored;
    }
    return scale;
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) quantise(const __grid_constant__ pagemgr_write_kv_args args) {
    const pagemgr_kv &kv = args.kv;
    const int64_t pair = int64_t{blockIdx.x} * (THREADS / 32) + threadIdx.x / 32;
    const int64_t token = pair / kv.num_kv_heads, head = pair - token * kv.num_kv_heads;
    if (token >= args.num_tokens) return;
    const int64_t slot = args.slot_mapping[token];
    if (slot < 0 || slot >= kv.num_blocks * kv.block_size) {
        if (slot != -1 && head == 0 && threadIdx.x % 32 == 0) report(args.run, PAGEMGR_BAD_SLOT);
        return;
    }
    const int64_t block = slot / kv.block_size, offset = slot - block * kv.block_size;
    const int64_t target = block * kv.block_stride + head * kv.head_stride + offset * kv.token_stride;
    const int64_t scale = block * kv.scale_block_stride + head * kv.scale_head_stride + offset;
    const T *key = static_cast<const T *>(args.key) + token * args.key_token_stride + head * args.key_head_stride;
    const T *value =
        static_cast<const T *>(args.value) + token * args.value_token_stride + head * args.value_head_stride;
    const float of_key = quantise_row<T, N>(key, static_cast<uint8_t *>(kv.key) + target, kv.head_dim);
    const float of_value = quantise_row<T, N>(value, static_cast<uint8_t *>(kv.value) + target, kv.head_dim);
    if (threadIdx.x % 32 == 0) kv.key_scale[scale] = of_key, kv.value_scale[scale] = of_value;
}

template <typename T, int N> int launch_quantise(const pagemgr_write_kv_args &args) {
    const int64_t ctas = (args.num_tokens * args.kv.num_kv_heads + THREADS / 32 - 1) / (THREADS / 32);
    if (ctas > INT32_MAX)
        return fail(PAGEMGR_UNSUPPORTED, "%lld tokens are too many for one launch", (long long)args.num_tokens);
    return launch<quantise<T, N>>(args.run, Grid{dim3(static_cast<unsigned>(ctas)), THREADS}, args);
}

// Whether `count` elements can be moved at a time.
bool in_vectors_of(int count, const pagemgr_write_kv_args &args) {
    const bool plain = args.kv.kv_dtype == PAGEMGR_KV_PLAIN;

    uint64_t given = reinterpret_cast<uint64_t>(args.key) | reinterpret_cast<uint64_t>(args.value);
    for (int64_t stride : {args.key_token_stride, args.key_head_stride, args.value_token_stride, args.value_head_stride,
                           int64_t{args.kv.head_dim}})
        given |= static_cast<uint64_t>(2 * stride);
    uint64_t held = reinterpret_cast<uint64_t>(args.kv.key) | reinterpret_cast<uint64_t>(args.kv.value);
    for (int64_t stride : {args.kv.block_stride, args.kv.head_stride, args.kv.token_stride})
        held |= static_cast<uint64_t>(plain ? 2 * stride : stride);
    return given % (2 * count) == 0 && held % (plain ? 2 * count : count) == 0;
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_write_kv(const pagemgr_write_kv_args *args) {
    if (args->kv.dtype != PAGEMGR_FLOAT16 && args->kv.dtype != PAGEMGR_BFLOAT16) {
        return fail(PAGEMGR_UNSUPPORTED, "dtype %d is neither float16 nor bfloat16", args->kv.dtype);
    }
    const bool plain = args->kv.kv_dtype == PAGEMGR_KV_PLAIN, half = args->kv.dtype == PAGEMGR_FLOAT16;
    if (!plain && args->kv.kv_dtype != PAGEMGR_KV_FLOAT8_E4M3FN)
        return fail(PAGEMGR_UNSUPPORTED, "a pool quantised otherwise than to float8_e4m3fn");
    if (args->kv.num_kv_heads < 1 || args->kv.head_dim < 1 || args->kv.block_size < 1 || args->num_tokens < 0) {
        return fail(PAGEMGR_INVALID, "num_kv_heads, head_dim and block_size must be at least 1, num_tokens at least 0");
    }
    if (args->num_tokens == 0) return PAGEMGR_OK;
    const OnDevice device(args->run.device_index);
    if (plain) return in_vectors_of(8, *args) ? launch_write<uint4>(*args) : launch_write<uint16_t>(*args);
    if (in_vectors_of(4, *args))
        return half ? launch_quantise<__half, 4>(*args) : launch_quantise<__nv_bfloat16, 4>(*args);
    return half ? launch_quantise<__half, 1>(*args) : launch_quantise<__nv_bfloat16, 1>(*args);
}
