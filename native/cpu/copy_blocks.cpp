// Whole blocks within a tier or between two, a pair a copy.
#include <cstring>

#include "kernels.hpp"

namespace pagemgr {

void copy_blocks(const pagemgr_copy_blocks_args &args) {
    const auto *source = static_cast<const char *>(args.source);
    auto *target = static_cast<char *>(args.target);
    const bool many = args.num_pairs * args.block_bytes > (1 << 18);
#pragma omp parallel for num_threads(args.run.num_threads) if (many)
    for (int64_t pair = 0; pair < args.num_pairs; pair++) {
        const int64_t from = args.pairs[2 * pair], to = args.pairs[2 * pair + 1];
        if (from < 0 || from >= args.num_source_blocks || to < 0 || to >= args.num_target_blocks) {
            report(args.run, PAGEMGR_BAD_BLOCK);
            continue;
        }
        std::memcpy(target + to * args.target_stride_bytes, source + from * args.source_stride_bytes, args.block_bytes);
    }
}

}  // namespace pagemgr
