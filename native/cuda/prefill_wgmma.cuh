// The memory that the warps of prefill_wgmma share, and the warps that bring queries, keys and values.
#pragma once

#include "prefill_wgmma_work.cuh"
#include "wgmma.cuh"

namespace pagemgr {
namespace hopper {

constexpr int READERS = 2;                                    // warpgroups that compute, of 64 rows each
constexpr int ROWS = 64 * READERS;                            // of a tile
constexpr int THREADS = 128 * (READERS + 1);                  // the first warpgroup plans and loads
constexpr int LOADER_REGISTERS = 56, READER_REGISTERS = 224;  // 56 + 2 * 224 = 3 * 168, what a thread has at first
enum Role { PLANNER, KEY_LOADER, VALUE_LOADER };              // of the first warpgroup's warps

__host__ __device__ constexpr int panels(int head_dim) { return (head_dim + PANEL - 1) / PANEL; }
constexpr int tile_keys(int head_dim) { return head_dim <= 128 ? 128 : 64; }

// The first column of a panel of keys or values. Of a head dim of 80 or 96, the second overlaps the first.
__host__ __device__ constexpr int panel_column(int head_dim, int panel) {
    return panel > 0 && panel == panels(head_dim) - 1 ? head_dim - PANEL : panel * PANEL;
}

struct Maps {
    CUtensorMap query;       // [num_tokens][num_q_heads][head_dim]: boxes of whole tokens of one K/V head
    CUtensorMap key, value;  // [head of a block][8 tokens][panel][token][column]: boxes of all panels within a block
    int heads_of_block;      // strides of a head in the stride of a block
    int outside;             // a head of a block that is none, for which there come zeros
};

// A place that is filled and emptied again and again, in turn with others.
template <int Places> struct Ring {
    int place = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++place == Places) place = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_until_full(const uint64_t *full) const {
        wait_at(shared_address(&full[place]), parity);
    }
    __device__ __forceinline__ void wait_until_empty(const uint64_t *empty) const {
        wait_at(shared_address(&empty[place]), parity ^ 1);
    }
    // By each warp that read there.
    __device__ __forceinline__ void release(uint64_t *empty) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive_at(shared_address(&empty[place]));
    }
};

template <typename T, int DIM> struct Shared {
    static constexpr int PANELS = panels(DIM), KEYS = tile_keys(DIM), GROUPS = KEYS / 8;
    static constexpr int TILE_BYTES = GROUPS * PANELS * GROUP_BYTES;
    static constexpr int PLANS = 1;  // places in the rings; with more, work would be drawn before its time
    static constexpr int QUERIES = DIM <= 192 ? 2 : 1;
    static constexpr int KEY_TILES = DIM <= 64 ? 4 : 2, VALUE_TILES = DIM <= 64 ? 4 : 3;  // values are held longer
    T query[QUERIES][PANELS][ROWS][PANEL];
    T key[KEY_TILES][GROUPS][PANELS][8][PANEL];
    T value[VALUE_TILES][GROUPS][PANELS][8][PANEL];
    Work work[PLANS];
    Work cut[2];  // units of which this CTA has a part
    uint64_t work_full[PLANS], work_empty[PLANS], query_full[QUERIES], query_empty[QUERIES];
    uint64_t key_full[KEY_TILES], key_empty[KEY_TILES], value_full[VALUE_TILES], value_empty[VALUE_TILES];

    __device__ __forceinline__ void init() {
        constexpr int WARPS = 4 * READERS;
        init(work_full, work_empty, WARPS + 2);
        init(query_full, query_empty, WARPS);
        init(key_full, key_empty, WARPS);
        init(value_full, value_empty, WARPS);
        cut[0] = cut[1] = Work();
    }

  private:
    template <int Places>
    __device__ __forceinline__ void init(uint64_t (&full)[Places], uint64_t (&empty)[Places], int releases) {
        for (int i = 0; i < Places; ++i) {
            init_barrier(shared_address(&full[i]), 1);
            init_barrier(shared_address(&empty[i]), releases);
        }
    }
};

constexpr int SHARED_ALIGNMENT = 1024;  // of what is swizzled
template <typename T, int DIM> constexpr int SHARED_BYTES = sizeof(Shared<T, DIM>) + SHARED_ALIGNMENT;

// Of the part of a unit in the workspace, in vectors: largest and sum of two rows, then outputs, for each reading thread.
__host__ __device__ constexpr int part_vectors(int head_dim) { return 1 + panels(head_dim) * PANEL / 8; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The first warpgroup, a warp for each role.
template <typename T, int DIM> struct Loader {
    using Memory = Shared<T, DIM>;
    const Problem &problem;
    const Maps &maps;
    Memory &shared;
    const int lane = threadIdx.x % 32;
    const int tokens = ROWS / problem.group;                          // of a tile of queries
    const int size = min(problem.args.kv.block_size, Memory::KEYS);  // tokens in a box, of which each lane has one

    __device__ __forceinline__ void plan() const {
        Dealer<Memory::KEYS> dealer(problem, tokens, static_cast<int *>(problem.prefill_workspace));
        Ring<Memory::PLANS> plans;
        for (bool more = true; more; plans.advance()) {
            plans.wait_until_empty(shared.work_empty);
            const Work work = dealer.next();
            more = work.index >= 0;
            if (lane == 0) {
                shared.work[plans.place] = work;
                if (work.is_cut()) shared.cut[blockIdx.x == work.first_cta] = work;
                arrive_at(shared_address(&shared.work_full[plans.place]));
            }
        }
    }

    // The head of the block that this lane's part of a tile is in. Parts without a readable token are not read.
    __device__ __forceinline__ int find_head(const Work &work, int tile) const {
        const int first = work.origin + tile * Memory::KEYS + lane * size;
        if (tile >= work.tiles || lane * size >= Memory::KEYS || first + size <= work.sequence.first ||
            first >= work.sequence.stop)
            return maps.outside;
        const int block =
            problem.args.block_table[work.index * problem.args.table_stride + (first >> problem.block_shift)];
        return static_cast<int>(existing(problem, block)) * maps.heads_of_block + work.kv_head;
    }

    __device__ __forceinline__ void load(const CUtensorMap &map, const Work &work, int tile, int head,
                                         T (&target)[Memory::GROUPS][Memory::PANELS][8][PANEL], uint64_t *full) const {
        const uint32_t barrier = shared_address(full);
        const int token = (work.origin + tile * Memory::KEYS + lane * size) & (problem.args.kv.block_size - 1);
        if (lane == 0) arrive_expecting(barrier, Memory::TILE_BYTES);
        __syncwarp();
        if (lane * size < Memory::KEYS)
            copy_box(shared_address(target[lane * size / 8]), map, 0, 0, 0, token / 8, head, barrier);
    }

    __device__ __forceinline__ void load_queries(const Work &work, int place) const {
        const uint32_t barrier = shared_address(&shared.query_full[place]);
        if (lane == 0) arrive_expecting(barrier, Memory::PANELS * tokens * problem.group * 2 * PANEL);
        __syncwarp();
        if (lane < Memory::PANELS)
            copy_box(shared_address(shared.query[place][lane]), maps.query, lane * PANEL, work.kv_head * problem.group,
                     work.sequence.query_begin + work.first_token, barrier);
    }

    template <Role ROLE> __device__ __forceinline__ void load_all() const {
        constexpr bool KEYS = ROLE == KEY_LOADER;
        const CUtensorMap &map = KEYS ? maps.key : maps.value;
        Ring<Memory::PLANS> plans;
        Ring<Memory::QUERIES> queries;
        Ring<KEYS ? Memory::KEY_TILES : Memory::VALUE_TILES> ring;
        for (;; plans.advance()) {
            plans.wait_until_full(shared.work_full);
            const Work work = shared.work[plans.place];
            plans.release(shared.work_empty);
            if (work.index < 0) return;
            int next_head = find_head(work, 0);
            if (KEYS) {
                queries.wait_until_empty(shared.query_empty);
                load_queries(work, queries.place);
                queries.advance();
            }
            for (int tile = 0; tile < work.tiles; ++tile) {
                const int head = next_head;
                next_head = find_head(work, tile + 1);
                ring.wait_until_empty(KEYS ? shared.key_empty : shared.value_empty);
                if constexpr (KEYS) load(map, work, tile, head, shared.key[ring.place], &shared.key_full[ring.place]);
                else load(map, work, tile, head, shared.value[ring.place], &shared.value_full[ring.place]);
                ring.advance();
            }
        }
    }
};

#endif

}  // namespace hopper
}  // namespace pagemgr
