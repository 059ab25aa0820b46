// A tile for a few rows, as in decoding: K and V are read once, from where they are, and multiplied row by row.
#pragma once

#include "unit.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

constexpr int kFewRows = 8;

// Blocks lie anywhere, so the hardware's own prefetching ends with each of them. Memory answers in the time of kFar keys,
// which the second cache holds; from there they are fetched kNear ahead, few enough to be still in the first one then.
constexpr int kFar = 24, kNear = 6;  // keys

template <class K>
inline void prefetch(const K *rows, const int64_t *offsets, int64_t elements) {
    const auto *far = reinterpret_cast<const char *>(rows + offsets[kFar]);
    const auto *near = reinterpret_cast<const char *>(rows + offsets[kNear]);
    for (int64_t i = 0; i < elements * static_cast<int64_t>(sizeof(K)); i += 64) {
        __builtin_prefetch(far + i, 0, 2);
        __builtin_prefetch(near + i, 0, 3);
    }
}

// Scores of R rows: W sums at a time, of W / R keys and R rows each.
template <int R, class T>
void dot_rows(const T *keys, const int64_t *offsets, int count, int64_t dim, const float *query, int64_t width,
              float *scores) {
    constexpr int K = W / R;
    for (int first = 0; first < count; first += K) {
        const T *from[K];
        PAGEMGR_UNROLL
        for (int k = 0; k < K; k++) {
            const int key = smaller(first + k, count - 1);  // past the end the last key again, which nobody reads
            from[k] = keys + offsets[key];
            prefetch(keys, offsets + key, dim);
        }
        Floats total[W] = {};
        for (int64_t d = 0; d < dim; d += kStep) {
            Step key[K];
            PAGEMGR_UNROLL
            for (int k = 0; k < K; k++) key[k] = load_step(from[k] + d, dim - d);
            PAGEMGR_UNROLL
            for (int r = 0; r < R; r++) {
                const Step x = load_step(query + r * width + d);
                PAGEMGR_UNROLL
                for (int k = 0; k < K; k++) {
                    total[r * K + k] += x.first * key[k].first;
                    total[r * K + k] += x.second * key[k].second;
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
void add_values(const T *values, const int64_t *offsets, int count, int64_t dim, const float *weights, float *sums,
                int64_t width, int64_t d) {
    Step total[R][S];
    PAGEMGR_UNROLL
    for (int r = 0; r < R; r++) {
        PAGEMGR_UNROLL
        for (int s = 0; s < S; s++) total[r][s] = load_step(sums + r * width + d + s * kStep);
    }
    for (int key = 0; key < count; key++) {
        const T *from = values + offsets[key] + d;
        prefetch(values + d, offsets + key, S * kStep);
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
void add_rows(const T *values, const int64_t *offsets, int count, int64_t dim, const float *weights, float *sums,
              int64_t width, int64_t d = 0) {
    for (; d + (S > 1 ? S * kStep : 1) <= dim; d += S * kStep)
        add_values<R, S>(values, offsets, count, dim, weights, sums, width, d);
    if constexpr (S > 1) add_rows<R, S / 2>(values, offsets, count, dim, weights, sums, width, d);
}

// Calls visit(row, std::integral_constant<int, R>) for runs of R = 8 (where W is 16), 4, 2 and 1 rows.
template <int R, class Visit>
void in_runs(int64_t row, int64_t count, Visit visit) {
    for (; row + R <= count; row += R) visit(row, std::integral_constant<int, R>{});
    if constexpr (R > 1) in_runs<R / 2>(row, count, visit);
}

template <class K>
void attend_few(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t *offsets) {
    constexpr int kMost = W == 16 ? 8 : 4;
    const int64_t dim = args.kv.head_dim, width = rows.width;
    const K *keys = static_cast<const K *>(args.kv.key), *values = static_cast<const K *>(args.kv.value);
    int count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - unit.first_key));
    find_keys(args, unit, unit.first_key, count, offsets);
    for (int64_t first = unit.first_key; first < unit.stop_key; first += kTile) {
        int64_t *next = offsets + count;
        const int next_count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - first - count));
        find_keys(args, unit, first + count, next_count, next);
        for (int i = next_count; i < kTile; i++) next[i] = offsets[0];  // nothing left to prefetch
        find_scales(args, unit, first, count, rows);
        in_runs<kMost>(0, rows.count, [&](int64_t row, auto run) {
            dot_rows<run>(keys, offsets, count, dim, rows.query + row * width, width, rows.scores + row * kTile);
        });
        for (int64_t row = 0; row < rows.count; row++) softmax_row(args, unit, rows, row, first, count);
        in_runs<kMost>(0, rows.count, [&](int64_t row, auto run) {
            constexpr int kSteps = larger(1, smaller(4, (W == 16 ? 8 : 4) / run));  // what the registers hold
            add_rows<run, kSteps>(values, offsets, count, dim, rows.scores + row * kTile, rows.value + row * width,
                                  width);
        });
        std::memmove(offsets, next, next_count * sizeof(int64_t));
        count = next_count;
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
