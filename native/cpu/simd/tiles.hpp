// As panels.hpp, for bfloat16 on processors with matrix tiles (AMX): tiles of 16 rows of 64 bytes, multiplied with
// float32 sums. A right-hand tile holds pairs of its rows side by side, so that its 16 rows stand for 32.
//
// This file is compiled to something in the variant `amx` alone.
#pragma once

#include "panels.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

#if !defined(__AMX_BF16__)

constexpr bool kBfloatTiles = false;

#else

constexpr bool kBfloatTiles = true;
constexpr int64_t kTileRows = 16, kTileWords = 16, kTilePair = 2 * kTileRows;  // a word is two Bfloats
static_assert(kTilePair == kRowsTogether && kTilePair == kStep);

struct Palette {
    uint8_t number = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// c[rows][columns] (+)= a[rows][32 * depth] b, all in pairs of tiles; b is [columns / 16][depth] right-hand tiles.
inline void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const void *a, int64_t a_bytes,
                           const uint32_t *b, float *c, int64_t c_stride, bool add) {
    constexpr int64_t kTileSize = kTileRows * kTileWords;
    const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
    asm volatile("" ::: "memory");  // what the tiles are loaded from has been stored: the compiler does not see that
    for (int64_t column = 0; column < columns; column += kTilePair) {
        const uint32_t *left = b + column / kTileWords * depth * kTileSize, *right = left + depth * kTileSize;
        for (int64_t row = 0; row < rows; row += kTilePair) {
            const char *upper = static_cast<const char *>(a) + row * a_bytes, *lower = upper + kTileRows * a_bytes;
            float *to = c + row * c_stride + column, *below = to + kTileRows * c_stride;
            if (add) {
                _tile_loadd(0, to, c_bytes);
                _tile_loadd(1, to + kTileWords, c_bytes);
                _tile_loadd(2, below, c_bytes);
                _tile_loadd(3, below + kTileWords, c_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t i = 0; i < depth; i++) {
                _tile_loadd(4, upper + i * 64, a_bytes);
                _tile_loadd(5, lower + i * 64, a_bytes);
                _tile_loadd(6, left + i * kTileSize, 64);
                _tile_loadd(7, right + i * kTileSize, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, c_bytes);
            _tile_stored(1, to + kTileWords, c_bytes);
            _tile_stored(2, below, c_bytes);
            _tile_stored(3, below + kTileWords, c_bytes);
        }
    }
}

inline Words load_pairs(const Bfloat *from, int64_t count) {
    Words pairs{};
    if (__builtin_expect(count >= kStep, 1)) std::memcpy(&pairs, from, sizeof pairs);
    else std::memcpy(&pairs, from, count * sizeof(Bfloat));
    return pairs;
}

// to[kTile / 16][width / 32] right-hand tiles whose columns are keys; those past `count` repeat the last.
inline void pack_key_tiles(const Bfloat *keys, const int64_t *offsets, int count, int64_t dim, uint32_t *to) {
    for (int first = 0; first < kTile; first += W) {
        for (int64_t d = 0; d < dim; d += kStep) {
            Floats block[W];
            PAGEMGR_UNROLL
            for (int i = 0; i < W; i++)
                block[i] = (Floats)load_pairs(keys + offsets[smaller(first + i, count - 1)] + d, dim - d);
            transpose(block);
            PAGEMGR_UNROLL
            for (int i = 0; i < W; i++, to += W) std::memcpy(to, &block[i], sizeof block[i]);
        }
    }
}

// to[width / 16][kTile / 32] right-hand tiles whose rows are keys, 0 past `count`; columns in the order of load_step.
inline void pack_value_tiles(const Bfloat *values, const int64_t *offsets, int count, int64_t dim, uint32_t *to) {
    constexpr int64_t kColumn = kTile / kTilePair * kTileRows * kTileWords;
    for (int key = 0; key < kTile; key += 2) {
        for (int64_t d = 0; d < dim; d += kStep) {
            const Words a = key < count ? load_pairs(values + offsets[key] + d, dim - d) : Words{};
            const Words b = key + 1 < count ? load_pairs(values + offsets[key + 1] + d, dim - d) : Words{};
            const Words even = (a & 0xffff) | b << 16, odd = a >> 16 | (b & 0xffff0000);
            uint32_t *row = to + d / W * kColumn + key / 2 * kTileWords;
            std::memcpy(row, &even, sizeof even);
            std::memcpy(row + kColumn, &odd, sizeof odd);
        }
    }
}

// The weights of a row, as Bfloats, where its scores begin.
inline void narrow_weights(float *scores, int count) {
    for (int i = 0; i < kTile; i += kStep) {
        const Floats first = i < count ? load(scores + i) : Floats{};
        const Floats second = i + W < count ? load(scores + i + W) : Floats{};
        const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        std::memcpy(reinterpret_cast<char *>(scores) + i * sizeof(Bfloat), &pairs, sizeof pairs);
    }
}

template <>
inline void attend_many<Bfloat>(const pagemgr_attention_args &args, const Unit &unit, Rows &rows, int64_t *offsets,
                                float *panels) {
    const int64_t dim = args.kv.head_dim, width = rows.width, row_bytes = width * sizeof(Bfloat);
    const auto *keys = static_cast<const Bfloat *>(args.kv.key), *values = static_cast<const Bfloat *>(args.kv.value);
    auto *key_tiles = reinterpret_cast<uint32_t *>(panels), *value_tiles = key_tiles + kTile * width / 2;
    auto *query = reinterpret_cast<char *>(rows.query);
    for (int64_t row = 0; row < rows.count; row++) {  // to Bfloats again, in place
        for (int64_t d = 0; d < width; d += kStep)
            store_step(reinterpret_cast<Bfloat *>(query + row * row_bytes) + d,
                       load_step(rows.query + row * width + d));
    }
    const Palette palette;
    _tile_loadconfig(&palette);
    for (int64_t first = unit.first_key; first < unit.stop_key; first += kTile) {
        const int count = static_cast<int>(smaller<int64_t>(kTile, unit.stop_key - first));
        find_keys(args, unit, first, count, offsets);
        pack_key_tiles(keys, offsets, count, dim, key_tiles);
        pack_value_tiles(values, offsets, count, dim, value_tiles);
        multiply_tiles(rows.count, kTile, width / kStep, query, row_bytes, key_tiles, rows.scores, kTile, false);
        for (int64_t row = 0; row < rows.count; row++) {
            softmax_row(args, unit, rows, row, first, count);
            narrow_weights(rows.scores + row * kTile, count);
        }
        multiply_tiles(rows.count, width, kTile / kTilePair, rows.scores, kTile * sizeof(float), value_tiles,
                       rows.value, width, true);
    }
    _tile_release();
}

#endif

}  // namespace pagemgr::PAGEMGR_VARIANT
