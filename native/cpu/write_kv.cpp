// New tokens into their slots: one copy of head_dim elements for each token, head and role.
#include <cstring>

#include "kernels.hpp"

namespace pagemgr {

void write_kv(const pagemgr_write_kv_args &args) {
    const pagemgr_kv &kv = args.kv;
    const int64_t itemsize = kv.dtype == PAGEMGR_FLOAT32 ? 4 : 2, row = kv.head_dim * itemsize;
    const auto *keys = static_cast<const char *>(args.key), *values = static_cast<const char *>(args.value);
    auto *to_keys = static_cast<char *>(kv.key), *to_values = static_cast<char *>(kv.value);
    // A decode step of a small batch is less work than waking the threads.
    const bool many = args.num_tokens * kv.num_kv_heads * row > (1 << 18);
#pragma omp parallel for num_threads(args.run.num_threads) if (many)
    for (int64_t token = 0; token < args.num_tokens; token++) {
        int64_t block, offset;
        if (!find_slot(args, token, block, offset)) continue;
        const int64_t start = block * kv.block_stride + offset * kv.token_stride;
        for (int64_t head = 0; head < kv.num_kv_heads; head++) {
            const int64_t to = (start + head * kv.head_stride) * itemsize;
            const int64_t key = token * args.key_token_stride + head * args.key_head_stride;
            const int64_t value = token * args.value_token_stride + head * args.value_head_stride;
            std::memcpy(to_keys + to, keys + key * itemsize, row);
            std::memcpy(to_values + to, values + value * itemsize, row);
        }
    }
}

}  // namespace pagemgr
