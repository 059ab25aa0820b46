// copy_blocks: whole blocks within a tier or between two, all pairs in one launch.
//
// A CTA copies one part of one block; its threads read all that they copy before they write any of it. Within the
// device there are more CTAs than fit at once, since multiprocessors differ in speed. Over the bus a few, which take one
// part after the other, are as fast as the bus; each one more only slows down whoever computes.
#include <algorithm>

#include "library.cuh"

namespace pagemgr {
namespace {

constexpr int THREADS = 256;
constexpr int POOL_VECTORS = 4, BUS_VECTORS = 8;  // for each thread: 16 KiB a CTA, over the bus 32 KiB
constexpr int64_t BUS_BYTES = 128 * 1024;         // under way

template <typename Vector, int VECTORS>
__device__ __forceinline__ void copy_part(const pagemgr_copy_blocks_args &args, int64_t pair, int64_t part) {
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

template <typename Vector, int VECTORS>
__global__ void __launch_bounds__(THREADS)
    copy_blocks(const __grid_constant__ pagemgr_copy_blocks_args args, int64_t parts) {
    for (int64_t task = blockIdx.x; task < parts * args.num_pairs; task += gridDim.x)
        copy_part<Vector, VECTORS>(args, task / parts, task % parts);
}

template <typename Vector, int VECTORS> int launch_parts(const pagemgr_copy_blocks_args &args, int64_t under_way) {
    constexpr int64_t PART_BYTES = sizeof(Vector) * THREADS * VECTORS;
    const int64_t parts = (args.block_bytes + PART_BYTES - 1) / PART_BYTES, tasks = parts * args.num_pairs;
    const int64_t ctas = std::min({tasks, under_way / std::min(args.block_bytes, PART_BYTES), int64_t{INT32_MAX}});
    return launch<copy_blocks<Vector, VECTORS>>(args.run, Grid{dim3(static_cast<unsigned>(ctas)), THREADS}, args,
                                                parts);
}

template <typename Vector> int launch_copy(const pagemgr_copy_blocks_args &args, bool over_bus) {
    return over_bus ? launch_parts<Vector, BUS_VECTORS>(args, BUS_BYTES)
                    : launch_parts<Vector, POOL_VECTORS>(args, INT64_MAX);
}

// Whether this is the host's memory, which has to be pinned.
int is_on_host(const void *memory, bool *on_host) {
    cudaPointerAttributes attributes;
    if (int status = check(cudaPointerGetAttributes(&attributes, memory), "asking where blocks are")) return status;
    *on_host = attributes.type == cudaMemoryTypeHost;
    if (attributes.type == cudaMemoryTypeUnregistered)
        return fail(PAGEMGR_INVALID, "source or target is memory of the host that is not pinned");
    return PAGEMGR_OK;
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
    bool from_host, to_host;
    if (int status = is_on_host(args->source, &from_host)) return status;
    if (int status = is_on_host(args->target, &to_host)) return status;
    const uint64_t bits = reinterpret_cast<uint64_t>(args->source) | reinterpret_cast<uint64_t>(args->target) |
                          static_cast<uint64_t>(args->block_bytes | args->source_stride_bytes | args->target_stride_bytes);
    const bool over_bus = from_host || to_host;
    return bits % 16 == 0 ? launch_copy<uint4>(*args, over_bus) : launch_copy<unsigned char>(*args, over_bus);
}
