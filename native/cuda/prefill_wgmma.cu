// prefill_wgmma: attention for many new tokens by Hopper's wgmma (Shah et al., FlashAttention-3, 2024).
//
//   loading warps     │ Q │ K0 │ K1 V0 │ K2 V1 │ …                     boxes of tensor maps, one for each block
//   warpgroup 1       │    S0 │ S1 O0 ┊ softmax 1 │ S2 O1 ┊ softmax 2 │ …
//   warpgroup 2       │          S0 │ softmax 0 ┊ S1 O0 │ softmax 1 ┊ …
//
// A CTA stays on its multiprocessor and takes tiles of 128 rows. While a warpgroup weighs the logits of one tile of
// keys, the tensor cores multiply values of the tile before, and the products of the other warpgroup: the two take turns
// to issue theirs. Pages need no gathering by threads: each box of a tensor map is the part of one block, and lands
// swizzled where wgmma wants it.
//
// The copy engine reads whole blocks, slots without a token included. What stands there makes no difference to logits,
// which are replaced, but values would be multiplied by 0, and 0 * NaN is NaN: those are cleared in shared memory.
#include <algorithm>

#include "prefill_wgmma.cuh"
#include "prefill_wgmma_rows.cuh"

namespace pagemgr {
namespace {

using namespace hopper;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Names of barriers: for the turn of each warpgroup, and among the warps of each.
constexpr int TURN = 2, WITHIN = 4;

// Values of tokens that must not be read become zeros. Each warpgroup clears them for itself; both write the same.
template <typename T, int DIM>
__device__ __forceinline__ void clear_values(const Work &work, int tile, Shared<T, DIM> &shared, int place) {
    using Memory = Shared<T, DIM>;
    const int token = work.origin + tile * Memory::KEYS;
    if (token >= work.sequence.first && token + Memory::KEYS <= work.sequence.stop) return;
    constexpr int CHUNKS = Memory::PANELS * 64;  // of 8 tokens, 16 bytes each
    uint4 *chunks = reinterpret_cast<uint4 *>(shared.value[place]);
    for (int i = threadIdx.x % 128; i < Memory::GROUPS * CHUNKS; i += 128) {
        if (!work.readable(token + i / CHUNKS * 8 + i / 8 % 8)) chunks[i] = make_uint4(0, 0, 0, 0);
    }
    fence_async();
    meet_at_named(WITHIN + threadIdx.x / 128 - 1, 128);
}

// A warpgroup that computes.
template <typename T, int DIM> struct Reader {
    using Memory = Shared<T, DIM>;
    const Problem &problem;
    Memory &shared;
    const int index = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // which the compiler now knows to be a warp's
    const bool plain = problem.softcap == 0 && !problem.args.alibi_slopes && problem.scale > 0;
    const float scale = plain ? problem.scale : 1.0f;  // of logits as they are kept
    Work work;
    Rows<T, DIM> rows;
    Ring<Memory::PLANS> plans;
    Ring<Memory::QUERIES> queries;
    Ring<Memory::KEY_TILES> keys;
    Ring<Memory::VALUE_TILES> values;

    __device__ __forceinline__ void multiply_values(int tile) {
        values.wait_until_full(shared.value_full);
        clear_values(work, tile, shared, values.place);
        rows.multiply_values(shared, values.place);
    }
    __device__ __forceinline__ void release_keys() {
        keys.release(shared.key_empty);
        keys.advance();
    }
    __device__ __forceinline__ void release_values() {
        values.release(shared.value_empty);
        values.advance();
    }

    // Takes up the next work, whose first logits are under way after this. False if there is no more: then it is what
    // lies there that is multiplied, as products that may be under way or not keep the compiler from overlapping any.
    __device__ __forceinline__ bool begin() {
        plans.wait_until_full(shared.work_full);
        work = shared.work[plans.place];
        plans.release(shared.work_empty);
        plans.advance();
        const bool more = work.index >= 0;
        if (more) {
            queries.wait_until_full(shared.query_full);
            keys.wait_until_full(shared.key_full);
        }
        pin(rows.logits);
        open_products();
        rows.multiply_keys(shared, index, queries.place, keys.place);
        if (more) rows.look(problem, work);
        return more;
    }

    __device__ __forceinline__ void first_tile() {
        wait_for_products<0>();
        pin(rows.logits);
        release_keys();
        rows.clear();
        rows.weigh(problem, work, 0, plain);
        rows.pack_weights();
    }

    // The logits of this tile and the outputs of the one before.
    __device__ __forceinline__ void next_tile(int tile) {
        keys.wait_until_full(shared.key_full);
        meet_at_named(TURN + index, 256);
        rows.pin_all();
        open_products();
        rows.multiply_keys(shared, index, queries.place, keys.place);
        multiply_values(tile - 1);
        arrive_at_named(TURN + 1 - index, 256);
        wait_for_products<1>();
        pin(rows.logits);
        release_keys();
        rows.weigh(problem, work, tile, plain);
        finish_first(rows.sum[0] + rows.sum[1]);
        wait_for_products<0>();
        rows.pin_all();
        release_values();
        rows.shrink_outputs();
        rows.pack_weights();
    }

    // The outputs of the last tile, written while the first logits of the next work are under way. False if there is
    // no next work.
    __device__ __forceinline__ bool finish() {
        constexpr bool AHEAD = Memory::QUERIES > 1;
        rows.pin_all();
        open_products();
        multiply_values(work.tiles - 1);
        const Work done = work;
        const int slot = Workspace::slot(work, blockIdx.x);
        const Ring<Memory::QUERIES> last_queries = queries;
        queries.advance();
        bool more = false;
        if constexpr (AHEAD) {
            more = begin();
            wait_for_products<1>();
        } else {
            wait_for_products<0>();
        }
        rows.pin_outputs();
        release_values();
        meet_at_named(WITHIN + index, 128);  // all warps are done with the queries
        if (slot >= 0) rows.leave(Workspace(problem.prefill_workspace, gridDim.x), slot);
        else rows.write(problem, done, shared, last_queries.place, scale, rows.largest, rows.sum, rows.out);
        last_queries.release(shared.query_empty);
        return AHEAD ? more : begin();
    }

    __device__ __forceinline__ void run_all() {
        if (index == 1) arrive_at_named(TURN, 256);
        for (bool more = begin(); more; more = finish()) {
            first_tile();
            for (int tile = 1; tile < work.tiles; ++tile) next_tile(tile);
        }
        wait_for_products<0>();
        if (index == 0) meet_at_named(TURN, 256);  // takes the turn that was given last
        for (const Work &cut : shared.cut) {
            if (cut.is_cut()) close_cut(cut);
        }
    }

    // The last one to come here with its part of a unit puts the parts together.
    __device__ __forceinline__ void close_cut(const Work &cut) {
        const Workspace workspace(problem.prefill_workspace, gridDim.x);
        __threadfence();
        meet_at_named(WITHIN + index, 128);
        bool last = false;
        if (threadIdx.x % 128 == 0) {
            last = atomicAdd(workspace.arrivals(cut, index), 1) == cut.last_cta - cut.first_cta;
            __threadfence();
        }
        if (meet_or_named(WITHIN + index, 128, last)) rows.gather(problem, workspace, cut, shared, scale);
    }
};

#endif

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    prefill_wgmma_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ char memory[];
    const uint32_t misaligned = shared_address(memory) % SHARED_ALIGNMENT;
    Shared<T, DIM> &shared =
        *reinterpret_cast<Shared<T, DIM> *>(memory + (misaligned ? SHARED_ALIGNMENT - misaligned : 0));
    if (threadIdx.x == 0) {
        shared.init();
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<LOADER_REGISTERS>();
        const Loader<T, DIM> loader{problem, maps, shared};
        if (threadIdx.x / 32 == PLANNER) loader.plan();
        if (threadIdx.x / 32 == KEY_LOADER) loader.template load_all<KEY_LOADER>();
        if (threadIdx.x / 32 == VALUE_LOADER) loader.template load_all<VALUE_LOADER>();
    } else {
        take_registers<READER_REGISTERS>();
        Reader<T, DIM>{problem, shared}.run_all();
    }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which is asked for so that nothing is linked with the driver; null if it has none.
Encode find_encode() {
    static const Encode found = [] {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                   cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                             : nullptr;
    }();
    return found;
}

// A tensor of `Rank` dimensions, the innermost first and contiguous; strides count elements.
template <int Rank>
bool describe(CUtensorMap &map, int dtype, const void *base, const uint64_t (&dims)[Rank],
              const int64_t (&strides)[Rank - 1], const uint32_t (&box)[Rank]) {
    uint64_t bytes[Rank - 1];
    uint32_t steps[Rank];
    for (int i = 0; i < Rank - 1; ++i) bytes[i] = 2 * strides[i];
    for (int i = 0; i < Rank; ++i) steps[i] = 1;
    const CUtensorMapDataType type =
        dtype == PAGEMGR_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return find_encode()(&map, type, Rank, const_cast<void *>(base), dims, bytes, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether what the maps must look like is possible.
bool describe_all(const Problem &problem, Maps &maps) {
    const pagemgr_attention_args &args = problem.args;
    const pagemgr_kv &kv = args.kv;
    const int64_t head_stride = kv.num_kv_heads == 1 ? kv.block_stride : kv.head_stride;
    if (head_stride <= 0 || kv.block_stride % head_stride) return false;
    const int64_t heads = kv.block_stride / head_stride * (kv.num_blocks - 1) + kv.num_kv_heads;
    if (heads >= INT32_MAX) return false;
    maps.heads_of_block = static_cast<int>(kv.block_stride / head_stride);
    maps.outside = static_cast<int>(heads);
    const auto count = [](auto number) { return static_cast<uint64_t>(number); };
    const auto extent = [](auto number) { return static_cast<uint32_t>(number); };
    const int num_panels = panels(kv.head_dim), size = std::min(kv.block_size, tile_keys(kv.head_dim));
    const int64_t panel_stride = num_panels == 1 ? PANEL : panel_column(kv.head_dim, 1);
    const uint64_t dims[5] = {PANEL, 8, count(num_panels), count(kv.block_size / 8), count(heads)};
    const int64_t strides[4] = {kv.token_stride, panel_stride, 8 * kv.token_stride, head_stride};
    const uint32_t box[5] = {PANEL, 8, extent(num_panels), extent(size / 8), 1};
    const uint64_t query_dims[3] = {count(kv.head_dim), count(args.num_q_heads), count(args.num_tokens)};
    const int64_t query_strides[2] = {args.query_head_stride, args.query_token_stride};
    const uint32_t query_box[3] = {PANEL, extent(problem.group), extent(ROWS / problem.group)};
    return describe<5>(maps.key, kv.dtype, kv.key, dims, strides, box) &&
           describe<5>(maps.value, kv.dtype, kv.value, dims, strides, box) &&
           describe<3>(maps.query, kv.dtype, args.query, query_dims, query_strides, query_box);
}

}  // namespace

int plan_prefill_wgmma(Problem &problem, int64_t *workspace_bytes) {
    const pagemgr_attention_args &args = problem.args;
    const Device *device;
    if (int status = find_device(args.run.device_index, &device)) return status;
    *workspace_bytes = 0;
    if (device->capability != 90 || args.max_query_len <= problem.few) return PAGEMGR_OK;
    const int part_bytes = part_vectors(args.kv.head_dim) * static_cast<int>(sizeof(float4)) * 128 * READERS;
    *workspace_bytes = Workspace::bytes(device->num_sms, part_bytes);
    problem.num_counters = Workspace::num_counters(device->num_sms);
    return PAGEMGR_OK;
}

int prefill_wgmma(const Problem &problem, bool *done) {
    const pagemgr_attention_args &args = problem.args;
    const Device *device;
    Maps maps;
    if (int status = find_device(args.run.device_index, &device)) return status;
    *done = device->capability == 90 && problem.vectors && problem.group <= ROWS && find_encode() &&
            describe_all(problem, maps);
    if (!*done) return PAGEMGR_OK;
    return with_shape(args.kv, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int DIM = dim.value;
        const Grid grid{dim3(device->num_sms), THREADS, SHARED_BYTES<T, DIM>};
        return launch<prefill_wgmma_kernel<T, DIM>>(args.run, grid, problem, maps);
    });
}

}  // namespace pagemgr
