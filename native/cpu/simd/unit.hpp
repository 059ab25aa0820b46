// One unit of attention: some query tokens of a sequence, all query heads of some K/V heads, some of the keys.
//
// Its rows are (K/V head, token, head of the group). Keys come in tiles; after each, a row holds the largest
// score so far, the sum of e^(score - largest), and the sum of values weighted likewise: the online softmax (Milakov
// and Gimelshein, 2018), which parts of any size can be merged from.
#pragma once

#include <cmath>

#include "../kernels.hpp"
#include "quantised.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

constexpr int kTile = 64;  // keys
static_assert(kTile % W == 0);
constexpr int64_t kRowsTogether = 32;  // the memory of many rows is a multiple of this: see tiles.hpp

struct Unit {
    int64_t seq;
    int64_t first_token;  // row of the query tensor
    int64_t position;     // of that token in its sequence
    int64_t num_tokens;
    int64_t kv_head, num_heads;  // K/V heads
    int64_t first_key, stop_key;
};

// Where a thread keeps the rows of its unit. A row has the elements of a token in the order of load_step, and is padded
// by 0 to whole steps.
struct Rows {
    int64_t count, width;
    float *query;    // [count][width]
    float *largest;  // [count]
    float *sum;      // [count]
    float *value;    // [count][width]
    float *scores;   // [count][kTile]: products with keys, then weights of values
    float *scales;   // [2][kTile]: of the tile's keys and values, 0 past them; null if the pool is not quantised
};

inline int64_t group_size(const pagemgr_attention_args &args) { return args.num_q_heads / args.kv.num_kv_heads; }

// Which token of the unit a row is of, and which query head of all.
struct Place {
    int64_t token, head;
};

inline Place place_of(const pagemgr_attention_args &args, const Unit &unit, int64_t row) {
    const auto group = static_cast<int32_t>(group_size(args)), tokens = static_cast<int32_t>(unit.num_tokens);
    const int32_t pair = static_cast<int32_t>(row) / group, head = pair / tokens;
    return {pair - head * tokens, (unit.kv_head + head) * group + row - pair * group};
}

template <class T>
void load_queries(const pagemgr_attention_args &args, const Unit &unit, const Rows &rows) {
    for (int64_t row = 0; row < rows.count; row++) {
        const Place place = place_of(args, unit, row);
        const T *from = static_cast<const T *>(args.query) +
                        (unit.first_token + place.token) * args.query_token_stride +
                        place.head * args.query_head_stride;
        for (int64_t d = 0; d < args.kv.head_dim; d += kStep)
            store_step(rows.query + row * rows.width + d, load_step(from + d, args.kv.head_dim - d));
    }
}

// The block that holds a position of the unit's sequence.
inline int64_t block_at(const pagemgr_attention_args &args, const Unit &unit, int64_t index) {
    const int64_t block = args.block_table[unit.seq * args.table_stride + index];
    if (__builtin_expect(block >= 0 && block < args.kv.num_blocks, 1)) return block;
    report(args.run, PAGEMGR_BAD_BLOCK);
    return 0;
}

// Elements from the pool's first key (or value) to those of keys [first, first + count), of the unit's first head.
inline void find_keys(const pagemgr_attention_args &args, const Unit &unit, int64_t first, int count,
                      int64_t *offsets) {
    const pagemgr_kv &kv = args.kv;
    int64_t index = first / kv.block_size, slot = first % kv.block_size;
    for (int i = 0; i < count; index++, slot = 0) {
        int64_t offset = block_at(args, unit, index) * kv.block_stride + unit.kv_head * kv.head_stride +
                         slot * kv.token_stride;
        for (; i < count && slot < kv.block_size; i++, slot++, offset += kv.token_stride) offsets[i] = offset;
    }
}

// Fills rows.scales for keys [first, first + count) of one K/V head.
inline void find_scales(const pagemgr_attention_args &args, const Unit &unit, int64_t kv_head, int64_t first,
                        int count, const Rows &rows) {
    const pagemgr_kv &kv = args.kv;
    if (!rows.scales) return;
    std::memset(rows.scales, 0, 2 * kTile * sizeof(float));
    int64_t index = first / kv.block_size, slot = first % kv.block_size;
    for (int i = 0; i < count; index++, slot = 0) {
        const int64_t run = smaller<int64_t>(count - i, kv.block_size - slot);
        const int64_t at =
            block_at(args, unit, index) * kv.scale_block_stride + kv_head * kv.scale_head_stride + slot;
        std::memcpy(rows.scales + i, kv.key_scale + at, run * sizeof(float));
        std::memcpy(rows.scales + kTile + i, kv.value_scale + at, run * sizeof(float));
        i += static_cast<int>(run);
    }
}

// Turns the products of one row with `count` keys from `first` on into weights; what was summed before is scaled to
// fit.
inline void softmax_row(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t row, int64_t first,
                        int count) {
    const Place place = place_of(args, unit, row);
    const int64_t position = unit.position + place.token;
    const int64_t stop = args.causal ? position + 1 : first + count;
    const int64_t start = args.window ? position - args.window + 1 : first;
    const int32_t high = static_cast<int32_t>(larger<int64_t>(0, smaller<int64_t>(stop - first, count)));
    const int32_t low = static_cast<int32_t>(larger<int64_t>(0, smaller<int64_t>(start - first, count)));
    const float slope = args.alibi_slopes ? args.alibi_slopes[place.head] : 0;
    float *scores = rows.scores + row * kTile;

    Ints lane;
    Floats lane_as_float;
    for (int i = 0; i < W; i++) lane[i] = i, lane_as_float[i] = static_cast<float>(i);
    Floats tops = fill(-kInfinity);
    for (int i = 0; i < count; i += W) {
        Floats x = load(scores + i) * args.scale;
        if (rows.scales) x *= load(rows.scales + i);
        if (args.softcap != 0) x = args.softcap * tanh(x / args.softcap);
        if (slope != 0) x += slope * (lane_as_float + static_cast<float>(first + i - position));
        x = (lane + i >= low) & (lane + i < high) ? x : fill(-kInfinity);
        tops = max(tops, x);
        store(scores + i, x);
    }
    const float largest = larger(rows.largest[row], max(tops));
    const float shift = largest > -kInfinity ? largest : 0;
    Floats total{};
    for (int i = 0; i < count; i += W) {
        const Floats weight = exp(load(scores + i) - shift);
        total += weight;
        store(scores + i, rows.scales ? weight * load(rows.scales + kTile + i) : weight);
    }
    if (largest > rows.largest[row]) {
        const float scale = ::expf(rows.largest[row] - largest);
        rows.sum[row] *= scale;
        float *value = rows.value + row * rows.width;
        for (int64_t d = 0; d < rows.width; d += W) store(value + d, load(value + d) * scale);
        rows.largest[row] = largest;
    }
    rows.sum[row] += sum(total);
}

}  // namespace pagemgr::PAGEMGR_VARIANT
