// Partial results over disjoint keys into one, weighted by their denominators (Dao et al., FlashDecoding, 2023).
#include <cmath>

#include "../kernels.hpp"
#include "vector.hpp"

namespace pagemgr::PAGEMGR_VARIANT {
namespace {

template <class T>
void merge_row(const pagemgr_merge_args &args, int64_t row) {
    float largest = -kInfinity, total = 0;
    for (int32_t part = 0; part < args.num_parts; part++) largest = larger(largest, args.lses[part][row]);
    const float shift = largest > -kInfinity ? largest : 0;
    for (int32_t part = 0; part < args.num_parts; part++) total += ::expf(args.lses[part][row] - shift);
    const int64_t dim = args.head_dim;
    T *out = static_cast<T *>(args.out) + row * dim;
    for (int64_t d = 0; d < dim; d += kStep) {
        Step value{};
        for (int32_t part = 0; part < args.num_parts; part++) {
            const float weight = ::expf(args.lses[part][row] - shift) / total;
            if (!(args.lses[part][row] > -kInfinity)) continue;  // whatever its out holds
            const T *from = static_cast<const T *>(args.outs[part]) + row * dim + d;
            const Step x = load_step(from, dim - d);
            value.first += weight * x.first, value.second += weight * x.second;
        }
        store_step(out + d, value, dim - d);
    }
    args.lse[row] = total > 0 ? shift + ::logf(total) : -kInfinity;
}

template <class T>
void merge_rows(const pagemgr_merge_args &args) {
    const bool many = args.num_rows * args.num_parts * args.head_dim > (1 << 16);
#pragma omp parallel for num_threads(args.run.num_threads) if (many)
    for (int64_t row = 0; row < args.num_rows; row++) merge_row<T>(args, row);
}

}  // namespace

void merge(const pagemgr_merge_args &args) {
    switch (args.dtype) {
        case PAGEMGR_FLOAT16:
            return merge_rows<Half>(args);
        case PAGEMGR_BFLOAT16:
            return merge_rows<Bfloat>(args);
        default:
            return merge_rows<float>(args);
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
