// Elements of one byte, each to be multiplied by the scale of its row: what they are as floats, and which is nearest.
#pragma once

#include "vector.hpp"

namespace pagemgr::PAGEMGR_VARIANT {

struct Int8 {
    static constexpr float kLargest = 127;
    int8_t bits;
};

// A sign, an exponent of Exponent bits, and the rest of the byte as mantissa; without infinities as far as is stored.
template <int Exponent>
struct Float8 {
    static constexpr int kMantissa = 7 - Exponent, kBias = (1 << (Exponent - 1)) - 1;
    static constexpr float kLargest = Exponent == 4 ? 448 : 57344;
    uint8_t bits;
};
using E4m3 = Float8<4>;
using E5m2 = Float8<5>;

template <class K>
constexpr bool kQuantised = sizeof(K) == 1;

// GCC doubles widths well, and takes vectors apart to do more at once.
inline Floats widen(const Int8 *from) {
    typedef int8_t Signed __attribute__((vector_size(W)));
    typedef int16_t Shorts __attribute__((vector_size(2 * W)));
    Signed bits;
    std::memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bits, Shorts), Ints), Floats);
}

inline Floats widen(const E5m2 *from) {  // the upper halves of Halves
    Bytes bits;
    std::memcpy(&bits, from, sizeof bits);
    return widen(__builtin_convertvector(bits, Halves) << 8);
}

inline Floats widen(const E4m3 *from) {
    Bytes bits;
    std::memcpy(&bits, from, sizeof bits);
    const Halves half = __builtin_convertvector(bits, Halves);
    // The exponent moves from a bias of 7 to one of 15 by a product, which makes subnormals right as well.
    return widen((half & 0x7f) << 7 | (half & 0x80) << 8) * 0x1p8f;
}

template <class K, class = std::enable_if_t<kQuantised<K>>>
inline Step load_step(const K *from) {
    return {widen(from), widen(from + W)};
}

inline void narrow(Int8 *to, Floats x) {
    typedef int8_t Signed __attribute__((vector_size(W)));
    const Signed bits = __builtin_convertvector((Ints)(x + 12582912.f) - (Ints)fill(12582912.f), Signed);
    std::memcpy(to, &bits, sizeof bits);
}

template <int Exponent>
inline void narrow(Float8<Exponent> *to, Floats x) {
    using K = Float8<Exponent>;
    constexpr int kDropped = 23 - K::kMantissa;
    constexpr uint32_t kLeastNormal = (128 - K::kBias) << 23;
    const Words sign = (Words)x & 0x80000000, magnitude = (Words)x ^ sign;
    // Adding 2^23 subnormal steps rounds to a whole number of them.
    const Floats steps = (Floats)(Words{} + ((128 - K::kBias - K::kMantissa + 23) << 23));
    const Words subnormal = (Words)((Floats)magnitude + steps) - (Words)steps;
    const Words half = Words{} + ((1u << (kDropped - 1)) - 1);
    const Words normal = ((magnitude + half + (magnitude >> kDropped & 1)) >> kDropped) -
                         (static_cast<uint32_t>(127 - K::kBias) << K::kMantissa);
    const Words word = magnitude < kLeastNormal ? subnormal : normal;
    const Bytes bits = __builtin_convertvector(word | sign >> 24, Bytes);
    std::memcpy(to, &bits, sizeof bits);
}

template <class K, class = std::enable_if_t<kQuantised<K>>>
inline void store_step(K *to, Step x) {
    narrow(to, x.first);
    narrow(to + W, x.second);
}

}  // namespace pagemgr::PAGEMGR_VARIANT
