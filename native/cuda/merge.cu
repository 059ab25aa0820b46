// merge: attention over disjoint sets of keys into attention over their union (Dao et al., FlashDecoding, 2023).
//
// A warp takes one row: one head of one token.
#include "library.cuh"

namespace pagemgr {
namespace {

constexpr int WARPS = 4;
constexpr int MAX_PARTS = 128;  // their pointers travel as kernel parameters

struct Parts {
    const void *outs[MAX_PARTS];   // each [num_rows, head_dim]
    const float *lses[MAX_PARTS];  // each [num_rows]
    void *out;                     // [num_rows, head_dim]
    float *lse;                    // [num_rows]
    int64_t num_rows;
    int count;
    int head_dim;
};

template <typename T> __global__ void __launch_bounds__(32 * WARPS) merge(const __grid_constant__ Parts parts) {
    const int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= parts.num_rows) return;
    float largest = -INFINITY, sum = 0;
    for (int part = 0; part < parts.count; ++part) largest = fmaxf(largest, parts.lses[part][row]);
    if (largest != -INFINITY) {
        for (int part = 0; part < parts.count; ++part) sum += expf(parts.lses[part][row] - largest);
    }
    for (int element = lane; element < parts.head_dim; element += 32) {
        float out = 0;
        for (int part = 0; part < parts.count; ++part) {
            const float lse = parts.lses[part][row];
            if (lse == -INFINITY) continue;  // its out may hold anything
            out += expf(lse - largest) / sum *
                   to_float(static_cast<const T *>(parts.outs[part])[row * parts.head_dim + element]);
        }
        static_cast<T *>(parts.out)[row * parts.head_dim + element] = from_float<T>(out);
    }
    if (lane == 0) parts.lse[row] = largest == -INFINITY ? -INFINITY : largest + logf(sum);
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_merge(const pagemgr_merge_args *args) {
    if (args->num_parts < 1 || args->num_rows < 0 || args->head_dim < 1) {
        return fail(PAGEMGR_INVALID, "num_parts and head_dim must be at least 1, num_rows at least 0");
    }
    if (args->num_parts > MAX_PARTS)
        return fail(PAGEMGR_UNSUPPORTED, "%d parts, at most %d", args->num_parts, MAX_PARTS);
    if (args->num_rows == 0) return PAGEMGR_OK;
    Parts parts{};
    for (int part = 0; part < args->num_parts; ++part) {
        parts.outs[part] = args->outs[part];
        parts.lses[part] = args->lses[part];
    }
    parts.out = args->out;
    parts.lse = args->lse;
    parts.num_rows = args->num_rows;
    parts.count = args->num_parts;
    parts.head_dim = args->head_dim;
    const OnDevice device(args->run.device_index);
    const Grid grid{dim3(static_cast<unsigned>((args->num_rows + WARPS - 1) / WARPS)), 32 * WARPS};
    switch (args->dtype) {
        case PAGEMGR_FLOAT16: return launch<merge<__half>>(args->run, grid, parts);
        case PAGEMGR_BFLOAT16: return launch<merge<__nv_bfloat16>>(args->run, grid, parts);
        default: return fail(PAGEMGR_UNSUPPORTED, "dtype %d is neither float16 nor bfloat16", args->dtype);
    }
}
