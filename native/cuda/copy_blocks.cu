// copy_blocks: whole blocks within a tier or between two, all pairs in one launch.
//
// A CTA copies one part of one block; its threads read all that they copy before they write any of it. There are more
// CTAs than fit at once, since multiprocessors differ in speed.
#include "library.cuh"

namespace pagemgr {
namespace {

constexpr int THREADS = 256;
constexpr int VECTORS = 4;  // for each thread: 16 KiB a CTA

template <typename Vector>
__global__ void __launch_bounds__(THREADS)
    copy_blocks(const __grid_constant__ pagemgr_copy_blocks_args args, unsigned parts) {
    const int64_t pair = blockIdx.x / parts, part = blockIdx.x % parts;
    const int64_t from = args.pairs[2 * pair], to = args.pairs[2 * pair + 1];
    if (from < 0 || from >= args.num_source_blocks || to < 0 || to >= args.num_target_blocks) {
        if (part == 0 && threadIdx.x == 0) report(args.run, PAGEMGR_BAD_BLOCK);
        return;
    }
    const Vector *source =
        reinterpret_cast<const Vector *>(static_cast<const char *>(args.source) + from * args.source_stride_bytes);
    Vector *target = reinterpret_cast<Vector *>(static_cast<char *>(args.target) + to * args.target_stride_bytes);
    const int64_t count = args.block_bytes / static_cast<int64_t>(sizeof(Vector));
    const int64_t first = part * THREADS * VECTORS + threadIdx.x;
    Vector vectors[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        if (first + i * THREADS < count) vectors[i] = source[first + i * THREADS];
    }
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        if (first + i * THREADS < count) target[first + i * THREADS] = vectors[i];
    }
}

template <typename Vector> int launch_copy(const pagemgr_copy_blocks_args &args) {
    constexpr int64_t PART_BYTES = sizeof(Vector) * THREADS * VECTORS;
    const int64_t parts = (args.block_bytes + PART_BYTES - 1) / PART_BYTES, ctas = parts * args.num_pairs;
    if (ctas > INT32_MAX)
        return fail(PAGEMGR_UNSUPPORTED, "%lld pairs are too many for one launch", (long long)args.num_pairs);
    return launch<copy_blocks<Vector>>(args.run, Grid{dim3(static_cast<unsigned>(ctas)), THREADS}, args,
                                       static_cast<unsigned>(parts));
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_copy_blocks(const pagemgr_copy_blocks_args *args) {
    if (args->num_pairs < 0 || args->block_bytes < 0 || args->num_source_blocks < 0 || args->num_target_blocks < 0) {
        return fail(PAGEMGR_INVALID, "num_pairs, block_bytes and the numbers of blocks must not be negative");
    }
    if (args->num_pairs == 0 || args->block_bytes == 0) return PAGEMGR_OK;
    const OnDevice device(args->run.device_index);
    const uint64_t bits = reinterpret_cast<uint64_t>(args->source) | reinterpret_cast<uint64_t>(args->target) |
                          static_cast<uint64_t>(args->block_bytes | args->source_stride_bytes | args->target_stride_bytes);
    return bits % 16 == 0 ? launch_copy<uint4>(*args) : launch_copy<unsigned char>(*args);
}
