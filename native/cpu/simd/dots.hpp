// A tile for a few rows of each head, as in decoding: K and V are read once, from where they are, and multiplied row by
// row. Heads take turns at a tile: those of a block lie one behind the other, so that memory is read as it lies.
#pragma once

#include "unit.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

constexpr int kFewRows = 8;
constexpr int kNear = 4;  // keys

// Keys or values of one head, and those of the tile that comes after: blocks lie anywhere, so that the hardware's own
// prefetching ends with each of them. The second cache holds a tile until its turn, the first one a few rows.
template <class T>
struct Tile {
    const T *rows;
    const int64_t *offsets;  // [kTile], in elements from rows
    const T *next_rows;
    const int64_t *next_offsets;

    const T *row(int key) const { return rows + offsets[key]; }
    void prefetch(int key, int count, int64_t first, int64_t elements) const {
        const auto *near = reinterpret_cast<const char *>(row(smaller(key + kNear, count - 1)) + first);
        const auto *far = reinterpret_cast<const char *>(next_rows + next_offsets[key] + first);
        for (int64_t i = 0; i < elements * static_cast<int64_t>(sizeof(T)); i += 64) {
            __builtin_prefetch(near + i, 0, 3);
            __builtin_prefetch(far + i, 0, 2);
        }
    }
};

inline void add_products(Floats &total, Step a, Step b) {
    total += a.first * b.first;
    total += a.second * b.second;
}

// Scores of R rows: W sums at a time, of W / R keys and R rows each. Keys side by side share the loads of the rows,
// which is worth it if those are many or elements have to be converted; keys in turn are read as they lie.
template <int R, class T>
void dot_rows(const Tile<T> &keys, int count, int64_t dim, const float *query, int64_t width, float *scores) {
    constexpr int K = W / R;
    constexpr bool kInTurn = R == 1 || (R <= 4 && sizeof(T) == sizeof(float));
    for (int first = 0; first < count; first += K) {
        const T *from[K];
        PAGEMGR_UNROLL
        for (int k = 0; k < K; k++) {
            const int key = smaller(first + k, count - 1);  // past the end the last key again, which nobody reads
            from[k] = keys.row(key);
            if constexpr (!kInTurn) keys.prefetch(key, count, 0, dim);
        }
        Floats total[W] = {};
        if constexpr (kInTurn) {
            PAGEMGR_UNROLL
            for (int k = 0; k < K; k++) {
                keys.prefetch(smaller(first + k, count - 1), count, 0, dim);
                for (int64_t d = 0; d < dim; d += kStep) {
                    const Step key = load_step(from[k] + d, dim - d);
                    PAGEMGR_UNROLL
                    for (int r = 0; r < R; r++)
                        add_products(total[r * K + k], load_step(query + r * width + d), key);
                }
            }
        } else {
            for (int64_t d = 0; d < dim; d += kStep) {
                Step key[K];
                PAGEMGR_UNROLL
                for (int k = 0; k < K; k++) key[k] = load_step(from[k] + d, dim - d);
                PAGEMGR_UNROLL
                for (int r = 0; r < R; r++) {
                    const Step x = load_step(query + r * width + d);
                    PAGEMGR_UNROLL
                    for (int k = 0; k < K; k++) add_products(total[r * K + k], x, key[k]);
                }
            }
        }
        float found[W];
        store(found, sums(total));
        for (int r = 0; r < R; r++) std::memcpy(scores + r * kTile + first, found + r * K, K * sizeof(float));
    }
}

// Adds V, weighted, to S steps of R rows, from element d on.
template <int R, int S, class T>
void add_values(const Tile<T> &values, int count, int64_t dim, const float *weights, float *sums, int64_t width,
                int64_t d) {
    Step total[R][S];
    PAGEMGR_UNROLL
    for (int r = 0; r < R; r++) {
        PAGEMGR_UNROLL
        for (int s = 0; s < S; s++) total[r][s] = load_step(sums + r * width + d + s * kStep);
    }
    for (int key = 0; key < count; key++) {
        const T *from = values.row(key) + d;
        values.prefetch(key, count, d, S * kStep);
        Step value[S];
        PAGEMGR_UNROLL
        for (int s = 0; s < S; s++) value[s] = load_step(from + s * kStep, dim - d - s * kStep);
        PAGEMGR_UNROLL
        for (int r = 0; r < R; r++) {
            const float weight = weights[r * kTile + key];
            PAGEMGR_UNROLL
            for (int s = 0; s < S; s++) {
                total[r][s].first += weight * value[s].first;
                total[r][s].second += weight * value[s].second;
            }
        }
    }
    PAGEMGR_UNROLL
    for (int r = 0; r < R; r++) {
        PAGEMGR_UNROLL
        for (int s = 0; s < S; s++) store_step(sums + r * width + d + s * kStep, total[r][s]);
    }
}

// Adds V, weighted, to R rows, from element d on: S steps at a time, as long as there are as many, then half of that.
template <int R, int S, class T>
void add_rows(const Tile<T> &values, int count, int64_t dim, const float *weights, float *sums, int64_t width,
              int64_t d = 0) {
    for (; d + (S > 1 ? S * kStep : 1) <= dim; d += S * kStep)
        add_values<R, S>(values, count, dim, weights, sums, width, d);
    if constexpr (S > 1) add_rows<R, S / 2>(values, count, dim, weights, sums, width, d);
}

// Calls visit(row, std::integral_constant<int, R>) for runs of R = 8 (where W is 16), 4, 2 and 1 rows.
template <int R, class Visit>
void in_runs(int64_t row, int64_t count, Visit visit) {
    for (; row + R <= count; row += R) visit(row, std::integral_constant<int, R>{});
    if constexpr (R > 1) in_runs<R / 2>(row, count, visit);
}

// One K/V head of the unit at one tile; its rows begin with the given one.
template <class K>
void attend_head(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t row, const Tile<K> &keys,
                 const Tile<K> &values, int64_t first, int count) {
    constexpr int kMost = W == 16 ? 8 : 4;
    const int64_t dim = args.kv.head_dim, width = rows.width, stop = row + unit.num_tokens * group_size(args);
    in_runs<kMost>(row, stop, [&](int64_t i, auto run) {
        dot_rows<run>(keys, count, dim, rows.query + i * width, width, rows.scores + i * kTile);
    });
    for (int64_t i = row; i < stop; i++) softmax_row(args, unit, rows, i, first, count);
    in_runs<kMost>(row, stop, [&](int64_t i, auto run) {
        constexpr int kSteps = larger(1, smaller(4, (W == 16 ? 8 : 4) / run));  // what the registers hold
        add_rows<run, kSteps>(values, count, dim, rows.scores + i * kTile, rows.value + i * width, width);
    });
}

template <class K>
void attend_few(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t *offsets) {
    const int64_t stride = args.kv.head_stride, rows_of_a_head = rows.count / unit.num_heads;
    const K *keys = static_cast<const K *>(args.kv.key), *values = static_cast<const K *>(args.kv.value);
    int count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - unit.first_key));
    find_keys(args, unit, unit.first_key, count, offsets);
    for (int64_t first = unit.first_key; first < unit.stop_key; first += kTile) {
        int64_t *next = offsets + kTile;
        const int next_count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - first - count));
        find_keys(args, unit, first + count, next_count, next);
        for (int i = next_count; i < kTile; i++) next[i] = offsets[0];  // nothing left to prefetch
        for (int64_t head = 0; head < unit.num_heads; head++) {
            const bool last = head + 1 == unit.num_heads;
            const int64_t here = head * stride, after = last ? 0 : here + stride;
            const int64_t *after_offsets = last ? next : offsets;
            find_scales(args, unit, unit.kv_head + head, first, count, rows);
            attend_head<K>(args, unit, rows, head * rows_of_a_head, {keys + here, offsets, keys + after, after_offsets},
                           {values + here, offsets, values + after, after_offsets}, first, count);
        }
        std::memcpy(offsets, next, next_count * sizeof(int64_t));
        count = next_count;
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
