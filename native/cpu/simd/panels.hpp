// A tile for many rows, as in a prompt: K and V are brought into float32 panels, and every row multiplies those.
#pragma once

#include "unit.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

// c[R][V * W] (+)= a[R][depth] b[depth][V * W], in registers.
template <int R, int V>
void multiply_block(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *c,
                    int64_t c_stride, bool add) {
    Floats total[R][V] = {};
    for (int64_t i = 0; i < depth; i++) {
        Floats x[V];
        PAGEMGR_UNROLL
        for (int v = 0; v < V; v++) x[v] = load(b + i * b_stride + v * W);
        PAGEMGR_UNROLL
        for (int r = 0; r < R; r++) {
            const float y = a[r * a_stride + i];
            PAGEMGR_UNROLL
            for (int v = 0; v < V; v++) total[r][v] += y * x[v];
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) {
            float *to = c + r * c_stride + v * W;
            store(to, add ? load(to) + total[r][v] : total[r][v]);
        }
    }
}

template <int V>
void multiply_panel(int64_t count, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                    float *c, int64_t c_stride, bool add) {
    constexpr int R = 6;
    int64_t row = 0;
    for (; row + R <= count; row += R)
        multiply_block<R, V>(a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride, add);
    for (; row + 2 <= count; row += 2)
        multiply_block<2, V>(a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride, add);
    if (row < count)
        multiply_block<1, V>(a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride, add);
}

// c[count][columns] (+)= a[count][depth] b[depth][columns]; columns are rounded up to W.
inline void multiply(int64_t count, int64_t columns, int64_t depth, const float *a, int64_t a_stride, const float *b,
                     int64_t b_stride, float *c, int64_t c_stride, bool add) {
    constexpr int V = W == 16 ? 4 : 2;
    int64_t n = 0;
    for (; n + V * W <= columns; n += V * W)
        multiply_panel<V>(count, a, a_stride, b + n, b_stride, depth, c + n, c_stride, add);
    for (; n < columns; n += W) multiply_panel<1>(count, a, a_stride, b + n, b_stride, depth, c + n, c_stride, add);
}

// to[width][kTile]: the keys of a tile as columns. Columns past `count` repeat the last key, and nobody reads them.
template <class T>
void pack_keys(const T *keys, const int64_t *offsets, int count, int64_t dim, float *to) {
    for (int first = 0; first < count; first += W) {
        for (int64_t d = 0; d < dim; d += kStep) {
            Floats block[2][W];
            PAGEMGR_UNROLL
            for (int i = 0; i < W; i++) {
                const Step x = load_step(keys + offsets[smaller(first + i, count - 1)] + d, dim - d);
                block[0][i] = x.first, block[1][i] = x.second;
            }
            for (int half = 0; half < 2; half++) {
                transpose(block[half]);
                PAGEMGR_UNROLL
                for (int i = 0; i < W; i++) store(to + (d + half * W + i) * kTile + first, block[half][i]);
            }
        }
    }
}

// to[count][width]
template <class T>
void pack_values(const T *values, const int64_t *offsets, int count, int64_t dim, int64_t width, float *to) {
    for (int key = 0; key < count; key++)
        for (int64_t d = 0; d < dim; d += kStep)
            store_step(to + key * width + d, load_step(values + offsets[key] + d, dim - d));
}

template <class K>
void attend_many(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t *offsets, float *panels) {
    const int64_t dim = args.kv.head_dim, width = rows.width;
    const K *keys = static_cast<const K *>(args.kv.key), *values = static_cast<const K *>(args.kv.value);
    float *key_panel = panels, *value_panel = panels + kTile * width;
    for (int64_t first = unit.first_key; first < unit.stop_key; first += kTile) {
        const int count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - first));
        find_keys(args, unit, first, count, offsets);
        find_scales(args, unit, unit.kv_head, first, count, rows);
        pack_keys(keys, offsets, count, dim, key_panel);
        pack_values(values, offsets, count, dim, width, value_panel);
        multiply(rows.count, count, width, rows.query, width, key_panel, kTile, rows.scores, kTile, false);
        for (int64_t row = 0; row < rows.count; row++) softmax_row(args, unit, rows, row, first, count);
        multiply(rows.count, width, count, rows.scores, kTile, value_panel, width, rows.value, width, true);
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
