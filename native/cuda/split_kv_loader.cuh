// The shared memory of a CTA of split_kv, and the warp that fills it.
//
//   keys of a tile in shared memory:   run 0 │32 B│ run 1 │32 B│ … run 7 │32 B│        a run: 16 (8) tokens
//
// The rows of an 8 × 8 matrix for ldmatrix are token j of each of the 8 runs. By the 32 bytes no more than two of them
// lie in the same banks; by 16 they would all lie apart, but bulk copies to such addresses are 2 % slower in all.
// Tokens are therefore counted in the order (j, run) between the logits and the values: "columns".
#pragma once

#include "split_kv.cuh"

namespace pagemgr {

constexpr int RUNS = 8;
constexpr int MOST_STAGES = 8;

// Two tiles, or 128 KiB of small ones: what is under way beyond that makes multiprocessors wait for each other.
template <typename S> constexpr int most_stages(int head_dim) {
    const int fit = (128 << 10) / (2 * static_cast<int>(sizeof(S)) * tile_tokens(head_dim) * head_dim);
    return fit > 2 ? fit : 2;
}

// Two scales for each token of a tile, unless nothing is quantised.
template <int TOKENS, bool QUANTISED> struct Scales {};
template <int TOKENS> struct Scales<TOKENS, true> {
    alignas(16) float of[2][TOKENS];
};

// T is the type of queries and products, S what the pool holds.
template <typename T, typename S, int DIM> struct Shared {
    static constexpr bool QUANTISED = !std::is_same_v<T, S>;
    static constexpr int TOKENS = tile_tokens(DIM), RUN_TOKENS = TOKENS / RUNS;
    static constexpr int RUN = RUN_TOKENS * DIM + 32 / static_cast<int>(sizeof(S));  // elements
    static constexpr int QUERY_STRIDE = DIM + (QUANTISED ? 16 : 8);  // so that its rows are read from different banks
    static constexpr int SCORE_STRIDE = TOKENS + 8;
    struct Stage {
        alignas(128) S key[RUNS][RUN];
        alignas(128) S value[RUNS][RUN];
        Scales<TOKENS, QUANTISED> scales;  // of keys, of values
    };
    alignas(16) T query[ROWS][QUERY_STRIDE];
    alignas(16) float scores[2][ROWS][SCORE_STRIDE];  // [][][column], of this tile and the next
    Scales<TOKENS, QUANTISED> factors;  // of values, by column, of this tile and the next; 0 where none is to be read
    uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    alignas(128) Stage stage[1];  // as many as there is memory for: problem.stages

    static constexpr int bytes(int stages) { return static_cast<int>(sizeof(Shared) + (stages - 1) * sizeof(Stage)); }

    __device__ __forceinline__ void init(int stages) {
#if __CUDA_ARCH__ >= 900
        constexpr int ARRIVALS = QUANTISED ? 33 : 1;  // with the lanes' scales; and the bytes
#else
        constexpr int ARRIVALS = 32;
#endif
        for (int i = 0; i < stages; ++i) {
            init_barrier(shared_address(&full[i]), ARRIVALS);
            init_barrier(shared_address(&empty[i]), READERS / 32);
        }
    }
};

// A place in the ring of stages.
struct Turn {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The warp that loads. Each of the lower 16 lanes has a piece of the keys, each of the upper ones of the values: a run
// or, if a block is smaller, half of one. It knows the block of its piece in the tile that comes next, so that reading
// the table is never waited for.
template <typename T, typename S, int DIM> struct Loader {
    using Memory = Shared<T, S, DIM>;
    static constexpr int ROW_BYTES = DIM * static_cast<int>(sizeof(S));
    const Problem &problem;
    Memory &shared;
    Cursor<Memory::TOKENS> cursor;
    const int lane = threadIdx.x % 32;
    const int size = min(problem.args.kv.block_size, Memory::RUN_TOKENS);  // tokens of a piece
    const int piece = lane % 16 * size;                                    // its first token in the tile
    int block = 0;

    __device__ __forceinline__ bool idle() const { return piece >= Memory::TOKENS; }

    __device__ __forceinline__ void find_block() {
        const int token = min(cursor.first_token() + piece, cursor.sequence.stop - 1);
        if (token >= 0 && !idle())
            block = problem.args.block_table[cursor.index * problem.args.table_stride + (token >> problem.block_shift)];
    }

    __device__ __forceinline__ void load(int stage) {
        const pagemgr_kv &kv = problem.args.kv;
        const int start = cursor.first_token() + piece;
        const int first = min(max(cursor.sequence.first - start, 0), size);               // of the piece's tokens,
        const int stop = idle() ? first : min(max(cursor.sequence.stop - start, first), size);  // those to read
        const bool of_value = lane >= 16;
        auto &runs = of_value ? shared.stage[stage].value : shared.stage[stage].key;
        S *target = runs[piece / Memory::RUN_TOKENS % RUNS] + piece % Memory::RUN_TOKENS * DIM;
        const int64_t id = first < stop ? existing(problem, block) : 0;
        const S *source =
            static_cast<const S *>(of_value ? kv.value : kv.key) + kv_offset(problem, id, start, cursor.kv_head);
        const int64_t scale = scale_offset(problem, id, start, cursor.kv_head);
        const int scale_bytes = Memory::QUANTISED && first < stop ? size * static_cast<int>(sizeof(float)) : 0;
        const float *scales = (of_value ? kv.value_scale : kv.key_scale) + scale;  // of the whole piece
        uint32_t scales_target = 0;
        if constexpr (Memory::QUANTISED)
            scales_target = shared_address(&shared.stage[stage].scales.of[of_value][piece % Memory::TOKENS]);
        if (of_value && !idle() && stop - first < size) clear(target, first, stop);
        __syncwarp();
        const uint32_t barrier = shared_address(&shared.full[stage]);
        for (int i = 0; i < scale_bytes; i += 16) copy_16_async(scales_target + i, scales + i / sizeof(float));
#if __CUDA_ARCH__ >= 900
        if constexpr (Memory::QUANTISED) arrive_after_copies(barrier);
        const int bytes = (stop - first) * ROW_BYTES;
        const int total = __reduce_add_sync(~0u, bytes);
        if (lane == 0) arrive_expecting(barrier, total);
        __syncwarp();
        if (bytes == 0) return;
        const uint64_t policy = cursor.units == 1 ? read_once() : read_again();
        if (kv.token_stride == DIM) {
            copy_bulk(shared_address(target + first * DIM), source + first * DIM, bytes, barrier, policy);
        } else {
            for (int i = first; i < stop; ++i)
                copy_bulk(shared_address(target + i * DIM), source + i * kv.token_stride, ROW_BYTES, barrier, policy);
        }
#else
        constexpr int CHUNKS = ROW_BYTES / 16;
        for (int i = 0; i < 32; ++i) {  // the whole warp copies one piece after the other
            S *to = reinterpret_cast<S *>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(target), i));
            const S *from = reinterpret_cast<const S *>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(source), i));
            const int begin = __shfl_sync(~0u, first, i), end = __shfl_sync(~0u, stop, i);
            for (int chunk = begin * CHUNKS + lane; chunk < end * CHUNKS; chunk += 32) {
                const int token = chunk / CHUNKS, element = chunk % CHUNKS * (DIM / CHUNKS);
                copy_16_async(shared_address(to + token * DIM + element), from + token * kv.token_stride + element);
            }
        }
        arrive_after_copies(barrier);
#endif
    }

    // Values of tokens that must not be read, for whatever stood there would be multiplied by 0, and 0 * NaN is NaN.
    __device__ __forceinline__ void clear(S *target, int first, int stop) const {
        for (int i = 0; i < size; ++i) {
            if (i >= first && i < stop) continue;
            char *row = reinterpret_cast<char *>(target + i * DIM);
            for (int j = 0; j < ROW_BYTES; j += 16) *reinterpret_cast<uint4 *>(row + j) = make_uint4(0, 0, 0, 0);
        }
#if __CUDA_ARCH__ >= 900
        fence_async();
#endif
    }

    // The queries of a unit are read while nothing else is computed: they had better be in the L2 by then.
    __device__ __forceinline__ void fetch_queries() const {
        const int row = cursor.unit * ROWS + lane;
        if (lane >= ROWS || row >= cursor.sequence.num_queries * problem.group) return;
        const Row at(problem, cursor.sequence, cursor.kv_head, row);
        const char *source = reinterpret_cast<const char *>(static_cast<const T *>(problem.args.query) +
                                                            at.token * problem.args.query_token_stride +
                                                            at.head * problem.args.query_head_stride);
        for (int i = 0; i < DIM * static_cast<int>(sizeof(T)); i += 128) fetch_to_l2(source + i);
    }

    __device__ __forceinline__ void run_all(int count) {
        Turn turn;
        if (count > 0) find_block();
        for (int tile = 0; tile < count; ++tile) {
            wait_at(shared_address(&shared.empty[turn.stage]), turn.parity ^ 1);
            load(turn.stage);
            turn.advance(problem.stages);
            if (tile + 1 < count) {
                cursor.advance(problem);
                find_block();
                if (cursor.tile == 0) fetch_queries();
            }
        }
    }
};

}  // namespace pagemgr
