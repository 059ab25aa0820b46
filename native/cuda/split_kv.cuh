// How split_kv deals out its work, and how the CTAs that share a unit of it come to one result.
#pragma once

#include "attention.cuh"

namespace pagemgr {

constexpr int READERS = 256;           // threads that compute
constexpr int THREADS = READERS + 32;  // and the warp that loads for them
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 16;           // of a unit

// Of a tile: 64 KiB of keys and values, except for small head dims.
__host__ __device__ constexpr int tile_tokens(int head_dim) { return head_dim <= 128 ? 128 : 64; }

// What CTAs tell each other of cut units. CTA c has slot 2c for the part that it continues, 2c + 1 for one that it
// begins; the parts of the latter's unit are counted in arrivals[c].
struct Workspace {
    uint64_t *arrivals;  // [2 * ctas]
    float2 *sums;        // [2 * ctas][ROWS]: largest logit, sum of weights
    float *outs;         // [2 * ctas][ROWS][head_dim]

    __device__ Workspace(void *memory, int ctas) {
        arrivals = static_cast<uint64_t *>(memory);
        sums = reinterpret_cast<float2 *>(arrivals + 2 * ctas);
        outs = reinterpret_cast<float *>(sums + 2 * ctas * ROWS);
    }
    static int64_t bytes(int64_t ctas, int head_dim) {
        return 2 * ctas * static_cast<int64_t>(sizeof(uint64_t) + ROWS * (sizeof(float2) + sizeof(float) * head_dim));
    }

    // Makes a count that nobody has arrived at yet, whatever the memory held, if nobody else has.
    __device__ __forceinline__ void open(int first, uint64_t number) const {
        auto *count = reinterpret_cast<unsigned long long *>(arrivals + first);
        const uint64_t found = *const_cast<volatile unsigned long long *>(count);
        if (found - number > gridDim.x) atomicCAS(count, found, number);
    }
};

// A place in the line of tiles: sequence by sequence, in each K/V head by K/V head, in each unit by unit.
template <int TOKENS> struct Cursor {
    Sequence sequence;
    int index;                // of the sequence
    int heads, units, tiles;  // K/V heads, units of each, tiles of each unit
    int kv_head, unit, tile;

    __device__ __forceinline__ void enter(const Problem &problem, int at) {
        index = at;
        sequence = Sequence(problem, at);
        heads = problem.args.kv.num_kv_heads;
        units = sequence.num_queries > problem.few ? 0 : (sequence.num_queries * problem.group + ROWS - 1) / ROWS;
        tiles = max(1, (sequence.stop - origin() + TOKENS - 1) / TOKENS);  // a row that sees nothing has an output, too
    }
    __device__ __forceinline__ int origin() const { return sequence.first & ~(TOKENS - 1); }
    __device__ __forceinline__ int first_token() const { return origin() + tile * TOKENS; }
    __device__ __forceinline__ int cost() const { return heads * units * tiles; }

    // To the next tile, of which the caller knows that there is one.
    __device__ __forceinline__ void advance(const Problem &problem) {
        if (++tile < tiles) return;
        tile = 0;
        if (++unit < units) return;
        unit = 0;
        if (++kv_head < heads) return;
        kv_head = 0;
        do enter(problem, index + 1);
        while (units == 0);
    }
};

constexpr int STATIC_BYTES = 256;  // more than find_share has of shared memory

struct Share {
    int start, count, size;  // its first tile, its tiles, the tiles of a full share
};

// Tables of few sequences come to the L2 while the lengths are read.
__device__ __forceinline__ void fetch_tables(const Problem &problem) {
    constexpr int ENTRIES = 32;  // 128 bytes
    const pagemgr_attention_args &args = problem.args;
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    const int lines = static_cast<int>(((args.max_seq_len - 1) >> problem.block_shift) / ENTRIES) + 1;
    const int row = thread / lines;
    if (row < args.num_seqs) fetch_to_l2(args.block_table + row * args.table_stride + (thread - row * lines) * ENTRIES);
}

// By one CTA for all kernels, those of prefill included.
__device__ __forceinline__ void check_length(const Problem &problem, const Sequence &sequence, int index) {
    if (sequence.stop != problem.args.seq_lens[index]) report(problem.args.run, PAGEMGR_BAD_LENGTH);
}

// This CTA's share of the line, and the place where it starts.
template <int TOKENS>
__device__ __forceinline__ Share find_share(const Problem &problem, Cursor<TOKENS> &cursor) {
    __shared__ int warp_sums[WARPS];
    __shared__ int found[2];
    const int num_seqs = problem.args.num_seqs, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int each = (num_seqs + THREADS - 1) / THREADS;
    const int begin = min(thread * each, num_seqs), end = min(begin + each, num_seqs);
    int mine = 0;
    for (int i = begin; i < end; ++i) {
        cursor.enter(problem, i);
        mine += cursor.cost();
        if (blockIdx.x == 0) check_length(problem, cursor.sequence, i);
    }
    int prefix = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, prefix, step);
        if (lane >= step) prefix += other;
    }
    if (lane == 31) warp_sums[warp] = prefix;
    __syncthreads();
    int total = 0;
    prefix -= mine;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        if (i < warp) prefix += warp_sums[i];
        total += warp_sums[i];
    }
    Share share;
    share.size = max(1, (total + problem.ctas - 1) / problem.ctas);
    share.start = min(total, static_cast<int>(blockIdx.x) * share.size);
    share.count = min(total - share.start, share.size);
    if (share.count > 0 && prefix <= share.start && share.start < prefix + mine) {
        int offset = share.start - prefix, i = begin;
        for (cursor.enter(problem, i); offset >= cursor.cost(); cursor.enter(problem, ++i)) offset -= cursor.cost();
        found[0] = i;
        found[1] = offset;
    }
    __syncthreads();
    if (share.count > 0) {
        cursor.enter(problem, found[0]);
        cursor.tile = found[1] % cursor.tiles;
        cursor.unit = found[1] / cursor.tiles % cursor.units;
        cursor.kv_head = found[1] / cursor.tiles / cursor.units;
    }
    return share;
}

// The parts of one cut unit: CTA `first` begins it, those up to `last` continue it.
struct Parts {
    int first, last;

    __device__ __forceinline__ int count() const { return last - first + 1; }
    __device__ __forceinline__ int slot(int part) const { return part == 0 ? 2 * first + 1 : 2 * (first + part); }
};

// Tells that this CTA's part is written. Whether it was the last one of the unit: then all can be read.
__device__ __forceinline__ bool arrive(const Workspace &workspace, uint64_t number, const Parts &parts) {
    meet<READERS>();
    bool last = true;
    if (threadIdx.x == 0) {
        uint64_t before;
        asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;"
                     : "=l"(before)
                     : "l"(workspace.arrivals + parts.first)
                     : "memory");
        last = before - number == static_cast<uint64_t>(parts.count() - 1);
        if (last) workspace.arrivals[parts.first] = number;  // for the next replay of a graph
    }
    return meet_and<READERS>(last);
}

// Running softmax of four neighbouring outputs.
struct Combined {
    float largest = -INFINITY, sum = 0;
    float4 out = make_float4(0, 0, 0, 0);

    // Adds parts `from`, `from + step`, …
    template <int Batch>
    __device__ __forceinline__ void add(const Workspace &workspace, const Parts &parts, int from, int step, int row,
                                        int dim, int column) {
        for (int begin = from; begin < parts.count(); begin += Batch * step) {
            float2 sums[Batch];
            float4 outs[Batch];
#pragma unroll
            for (int i = 0; i < Batch; ++i) {
                const int64_t at =
                    static_cast<int64_t>(parts.slot(min(begin + i * step, parts.count() - 1))) * ROWS + row;
                sums[i] = __ldcg(&workspace.sums[at]);
                outs[i] = __ldcg(reinterpret_cast<const float4 *>(&workspace.outs[at * dim + column]));
            }
#pragma unroll
            for (int i = 0; i < Batch; ++i) {
                if (begin + i * step < parts.count()) add(sums[i], outs[i]);
            }
        }
    }
    __device__ __forceinline__ void add(float2 sums, float4 outs) {
        const float top = fmaxf(largest, sums.x), base = top == -INFINITY ? 0.0f : top;
        const float shrink = exp2_fast(largest - base), weight = exp2_fast(sums.x - base);
        largest = top;
        sum = sum * shrink + weight * sums.y;
        out.x = out.x * shrink + weight * outs.x, out.y = out.y * shrink + weight * outs.y;
        out.z = out.z * shrink + weight * outs.z, out.w = out.w * shrink + weight * outs.w;
    }

    // To four columns of a row of the sequence and K/V head.
    template <typename T, int DIM>
    __device__ __forceinline__ void write(const Problem &problem, const Sequence &sequence, int kv_head, int row,
                                          int column) const {
        const pagemgr_attention_args &args = problem.args;
        const Row where(problem, sequence, kv_head, row);
        const Closing closing(problem, where.head, largest, sum);
        const int64_t offset = static_cast<int64_t>(where.token) * args.num_q_heads + where.head;
        *reinterpret_cast<uint2 *>(static_cast<T *>(args.out) + offset * DIM + column) =
            make_uint2(pack<T>(out.x * closing.factor, out.y * closing.factor),
                       pack<T>(out.z * closing.factor, out.w * closing.factor));
        if (args.lse && column == 0) args.lse[offset] = closing.lse;
    }
};

// Writes the rows of a cut unit from all of its parts. A thread takes four neighbouring outputs, and only some of the
// parts if there are more threads than that; `scratch` has 6 * READERS floats.
template <typename T, int DIM>
__device__ __forceinline__ void combine(const Problem &problem, const Workspace &workspace, const Sequence &sequence,
                                        int unit, int kv_head, const Parts &parts, float *scratch) {
    constexpr int COLUMNS = DIM / 4;
    const int items = min(ROWS, sequence.num_queries * problem.group - unit * ROWS) * COLUMNS;
    const int ways = max(1, READERS / items), way = ways == 1 ? 0 : threadIdx.x / items;
    for (int item = threadIdx.x - way * items; item < items; item += READERS) {
        const int row = item / COLUMNS, column = item % COLUMNS * 4;
        Combined combined;
        if (way < ways) combined.add<4>(workspace, parts, way, ways, row, DIM, column);
        if (ways > 1) {
            float *mine = scratch + 6 * threadIdx.x;
            mine[0] = combined.largest, mine[1] = combined.sum;
            mine[2] = combined.out.x, mine[3] = combined.out.y, mine[4] = combined.out.z, mine[5] = combined.out.w;
            meet<READERS>();  // all of them are here, as item is less than items for all
            if (way > 0) break;
            for (int i = 1; i < ways; ++i) {
                const float *other = mine + 6 * i * items;
                combined.add(make_float2(other[0], other[1]), make_float4(other[2], other[3], other[4], other[5]));
            }
        }
        combined.write<T, DIM>(problem, sequence, kv_head, unit * ROWS + row, column);
    }
    meet<READERS>();  // before anybody uses the scratch for something else
}

}  // namespace pagemgr
