// New tokens into their slots of a quantised pool.
#include "../kernels.hpp"
#include "quantised.hpp"

namespace pagemgr::PAGEMGR_VARIANT {
namespace {

constexpr float kLeastScale = 0x1p-126f;

// One row of `dim` elements; returns its scale, NaN if there is a NaN or an infinity in the row.
template <class T, class K>
float quantise_row(const T *from, K *to, int64_t dim) {
    Ints tops{};  // magnitudes in the order of their bits, where NaN is above infinity
    for (int64_t d = 0; d < dim; d += kStep) {
        const Step x = load_step(from + d, dim - d);
        for (const Floats part : {x.first, x.second}) {
            const Ints magnitude = (Ints)part & 0x7fffffff;
            tops = magnitude > tops ? magnitude : tops;
        }
    }
    int32_t largest = 0;
    for (int i = 0; i < W; i++) largest = larger<int32_t>(largest, tops[i]);
    float top;
    std::memcpy(&top, &largest, sizeof top);
    float scale = top / K::kLargest;
    if (scale < kLeastScale) scale = 0;
    else if (scale == kInfinity) scale = __builtin_nanf("");
    const float divisor = scale == 0 ? kInfinity : scale;
    for (int64_t d = 0; d < dim; d += kStep) {
        const Step x = load_step(from + d, dim - d);
        store_step(to + d, {x.first / divisor, x.second / divisor}, dim - d);
    }
    return scale;
}

template <class T, class K>
void write(const pagemgr_write_kv_args &args) {
    const pagemgr_kv &kv = args.kv;
    const auto *keys = static_cast<const T *>(args.key), *values = static_cast<const T *>(args.value);
    const bool many = args.num_tokens * kv.num_kv_heads * kv.head_dim > (1 << 15);
#pragma omp parallel for num_threads(args.run.num_threads) if (many)
    for (int64_t token = 0; token < args.num_tokens; token++) {
        int64_t block, offset;
        if (!find_slot(args, token, block, offset)) continue;
        for (int64_t head = 0; head < kv.num_kv_heads; head++) {
            const int64_t to = block * kv.block_stride + head * kv.head_stride + offset * kv.token_stride;
            const int64_t scale = block * kv.scale_block_stride + head * kv.scale_head_stride + offset;
            kv.key_scale[scale] = quantise_row(keys + token * args.key_token_stride + head * args.key_head_stride,
                                               static_cast<K *>(kv.key) + to, kv.head_dim);
            kv.value_scale[scale] =
                quantise_row(values + token * args.value_token_stride + head * args.value_head_stride,
                             static_cast<K *>(kv.value) + to, kv.head_dim);
        }
    }
}

template <class K>
void write_as(const pagemgr_write_kv_args &args) {
    switch (args.kv.dtype) {
        case PAGEMGR_FLOAT16:
            return write<Half, K>(args);
        case PAGEMGR_BFLOAT16:
            return write<OrderedBfloat, K>(args);
        default:
            return write<float, K>(args);
    }
}

}  // namespace

void quantise(const pagemgr_write_kv_args &args) {
    switch (args.kv.kv_dtype) {
        case PAGEMGR_KV_FLOAT8_E4M3FN:
            return write_as<E4m3>(args);
        case PAGEMGR_KV_FLOAT8_E5M2:
            return write_as<E5m2>(args);
        default:
            return write_as<Int8>(args);
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
