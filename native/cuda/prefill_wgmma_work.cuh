// How prefill_wgmma deals out its work.
//
// A unit is a tile of 128 rows of one sequence and K/V head, with the tiles of keys that they see. CTAs draw units, the
// longest of a sequence first. Where so few leave multiprocessors idle, the line of all tiles of keys is cut into equal
// shares, one for each CTA, whatever unit they belong to (Osama et al., Stream-K, 2023), and of a cut unit the CTA that
// is through last puts the parts together.
#pragma once

#include "attention.cuh"

namespace pagemgr {
namespace hopper {

constexpr int L2_BYTES = 32 << 20;  // of keys and values that stay in the L2 while all units that share them are done
constexpr int MOST_ROUNDS = 3;      // of units that are cut: CTAs in step find in the L2 what others have read
constexpr int MERGING = 4;          // tiles in the time of which a cut unit is put together

// A unit or, if it is cut, a part of one.
struct Work {
    Sequence sequence;
    int index = -1;  // of the sequence; -1: no more work
    int kv_head;
    int first_token;              // of the sequence's new tokens
    int origin, tiles;            // the first key of the first tile of keys; at least one tile
    int all_from, all_until;      // tiles of keys within [from, until] are seen by all rows
    int first_cta = 0, last_cta = 0;  // that have parts of the unit

    __device__ __forceinline__ bool is_cut() const { return first_cta < last_cta; }
    __device__ __forceinline__ bool readable(int token) const {
        return token >= sequence.first && token < sequence.stop;
    }
};

// What CTAs share. Of its counters, which are 0 at the start, one is of units drawn, and two of each CTA of the parts
// that are there of the unit that it begins: those of either warpgroup. CTA c has slot 2c for the part that it
// continues, 2c + 1 for one that it begins.
struct Workspace {
    int *counters;
    float4 *parts;

    __host__ __device__ Workspace(void *memory, int ctas) {
        counters = static_cast<int *>(memory);
        parts = reinterpret_cast<float4 *>(static_cast<char *>(memory) + counter_bytes(ctas));
    }
    __host__ __device__ static int num_counters(int ctas) { return 1 + 2 * ctas; }
    __host__ __device__ static int counter_bytes(int ctas) { return (num_counters(ctas) * 4 + 63) / 64 * 64; }
    static int64_t bytes(int ctas, int part_bytes) { return counter_bytes(ctas) + int64_t{2} * ctas * part_bytes; }

    __device__ __forceinline__ int *arrivals(const Work &work, int warpgroup) const {
        return counters + 1 + 2 * work.first_cta + warpgroup;
    }
    // -1 for a whole unit
    static __device__ __forceinline__ int slot(const Work &work, int cta) {
        return work.is_cut() ? 2 * cta + (cta == work.first_cta) : -1;
    }
};

// Inclusive prefix sums over a warp.
__device__ __forceinline__ int sum_up(int x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += other;
    }
    return x;
}

// Finds one CTA's work. All lanes of a warp call this together.
template <int KEYS> struct Dealer {
    const Problem &problem;
    const int tokens;  // of a unit
    int *drawn;
    const int &kv_heads = problem.args.kv.num_kv_heads, &num_seqs = problem.args.num_seqs;
    const int lane = threadIdx.x % 32;
    int share = 0;            // tiles, if units are cut
    int place = -1, end = 0;  // of the share, what is left; else the unit drawn last
    int chunk = 0, passed = 0;  // the 32 sequences at hand, and the units of each K/V head before them

    __device__ __forceinline__ Dealer(const Problem &problem, int tokens, int *drawn)
        : problem(problem), tokens(tokens), drawn(drawn) {
        int columns = 0, total = 0;  // units of each K/V head; tiles of all
        for (int i = lane; i < num_seqs; i += 32) columns += units_of(Sequence(problem, i));
        columns = __reduce_add_sync(~0u, columns);
        const int ctas = gridDim.x;
        if (columns > ctas * MOST_ROUNDS / kv_heads || problem.args.max_seq_len > 1 << 24) return;
        const int rounds = (columns * kv_heads + ctas - 1) / ctas;
        for (int i = next_sequence(0); i < num_seqs; i = next_sequence(i + 1)) total += kv_heads * tiles_of(i);
        const int each = (total + ctas - 1) / ctas;
        if ((each + MERGING) * columns * kv_heads >= rounds * total) return;
        share = each;
        place = min(total, static_cast<int>(blockIdx.x) * share);
        end = min(total, place + share);
    }

    __device__ __forceinline__ Work next() {
        if (share > 0) return place < end ? cut() : Work();
        int number = blockIdx.x;  // the first is not drawn
        if (place >= 0) {
            if (lane == 0) number = gridDim.x + atomicAdd(drawn, 1);
            number = __shfl_sync(~0u, number, 0);
        }
        place = number;
        return find(number);
    }

  private:
    __device__ __forceinline__ int units_of(const Sequence &sequence) const {
        return sequence.num_queries > problem.few ? (sequence.num_queries + tokens - 1) / tokens : 0;
    }

    __device__ __forceinline__ Work unit(int index, const Sequence &sequence, int number, int kv_head) const {
        Work work;
        work.sequence = sequence;
        work.index = index;
        work.kv_head = kv_head;
        work.first_token = number * tokens;
        const int last_token = min(work.first_token + tokens, sequence.num_queries) - 1;
        const Visible low(problem, sequence, sequence.position + work.first_token);
        const Visible high(problem, sequence, sequence.position + last_token);
        work.origin = low.first & ~(KEYS - 1);
        work.tiles = max(1, (high.last - work.origin + KEYS) / KEYS);
        work.all_from = high.first;
        work.all_until = low.last;
        return work;
    }

    // The units of a sequence come K/V head by K/V head as far as the L2 cannot hold more of them at once, the last
    // rows, which see most, first.
    __device__ __forceinline__ Work find(int number) {
        const int column = number / kv_heads;
        for (; chunk < num_seqs; chunk += 32) {
            Sequence mine;
            if (chunk + lane < num_seqs) mine = Sequence(problem, chunk + lane);
            const int units = units_of(mine), through = sum_up(units);
            const unsigned past = __ballot_sync(~0u, passed + through > column);
            if (past) {
                const int found = __ffs(past) - 1, rows = __shfl_sync(~0u, units, found);
                const Sequence sequence(problem, chunk + found);
                int within = number - (passed + __shfl_sync(~0u, through, found) - rows) * kv_heads;
                const int64_t head_bytes = int64_t{sequence.stop - sequence.first} * problem.args.kv.head_dim * 4;
                const int64_t sets = (kv_heads * head_bytes + L2_BYTES - 1) / L2_BYTES;
                const int most = max(1, kv_heads / static_cast<int>(max(int64_t{1}, min(sets, int64_t{kv_heads}))));
                const int first_head = within / (rows * most) * most;
                within -= first_head * rows;
                const int heads = min(most, kv_heads - first_head);
                return unit(chunk + found, sequence, rows - 1 - within / heads, first_head + within % heads);
            }
            passed += __shfl_sync(~0u, through, 31);
        }
        return Work();
    }

    // The first sequence from here on that has units, or any number past the last one.
    __device__ __forceinline__ int next_sequence(int from) const {
        for (; from < num_seqs; from += 32) {
            const bool ours = from + lane < num_seqs && units_of(Sequence(problem, from + lane)) > 0;
            const unsigned all = __ballot_sync(~0u, ours);
            if (all) return from + __ffs(all) - 1;
        }
        return from;
    }

    // Tiles of keys of all units of a sequence and K/V head.
    __device__ __forceinline__ int tiles_of(int index) const {
        const Sequence sequence(problem, index);
        int tiles = 0;
        for (int i = lane; i < units_of(sequence); i += 32) tiles += unit(index, sequence, i, 0).tiles;
        return __reduce_add_sync(~0u, tiles);
    }

    // What the share has of the unit that holds tile `place` of the line, in which units come sequence by sequence, in
    // each K/V head by K/V head.
    __device__ __forceinline__ Work cut() {
        int before = 0, index = next_sequence(0), column = tiles_of(index);
        while (place >= before + column * kv_heads) {
            before += column * kv_heads;
            index = next_sequence(index + 1);
            column = tiles_of(index);
        }
        const int kv_head = (place - before) / column;
        before += kv_head * column;
        const Sequence sequence(problem, index);
        for (int first = 0;; first += 32) {
            const int mine = min(first + lane, units_of(sequence) - 1), through = sum_up(unit(index, sequence, mine, 0).tiles);
            const unsigned past = __ballot_sync(~0u, before + through > place);
            if (past) {
                Work work = unit(index, sequence, first + __ffs(past) - 1, kv_head);
                const int stop = before + __shfl_sync(~0u, through, __ffs(past) - 1), start = stop - work.tiles;
                work.first_cta = start / share;
                work.last_cta = (stop - 1) / share;
                work.origin += (place - start) * KEYS;
                work.tiles = min(stop, end) - place;
                place += work.tiles;
                return work;
            }
            before += __shfl_sync(~0u, through, 31);
        }
    }
};

}  // namespace hopper
}  // namespace pagemgr
