// W floats at a time, by the vector types of GCC and Clang: one source for every instruction set.
//
// All is in the namespace of the variant that is being compiled, and nothing here is a function of the standard
// library: two variants must never share a symbol, as the linker would keep the code of either for both.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Arrays of vectors stay in registers only if the loops over them are unrolled and what takes them is inlined.
#define PAGEMGR_INLINE __attribute__((always_inline)) inline
#define PAGEMGR_UNROLL _Pragma("GCC unroll 16")

namespace pagemgr::PAGEMGR_VARIANT {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

template <class T>
constexpr T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
    return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Floats fill(float x) { return x - Floats{}; }
inline Floats max(Floats a, Floats b) { return a < b ? b : a; }

// --- loads and stores, converting ---------------------------------------------------------------------------------

inline Floats load(const float *from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }

#if defined(__AVX512F__)
inline Floats widen(Halves bits) { return (Floats)_mm512_cvtph_ps((__m256i)bits); }
inline Halves narrow(Floats x) { return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
inline Floats widen(Halves bits) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
inline Halves narrow(Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Floats widen(Halves bits) {
    const Words word = __builtin_convertvector(bits, Words);
    // The exponent moves from a bias of 15 to one of 127 by a product, which makes subnormals right as well.
    const Words finite = (Words)((Floats)((word & 0x7fff) << 13) * 0x1p112f);
    return (Floats)(((word & 0x7c00) == 0x7c00 ? (finite | 0x7f800000) : finite) | (word & 0x8000) << 16);
}
inline Halves narrow(Floats x) {
    const Words sign = (Words)x & 0x80000000, magnitude = (Words)x ^ sign;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
    const Words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Words special = magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
    const Words half = magnitude < 0x38800000 ? subnormal : magnitude < 0x477ff000 ? normal : special;
    return __builtin_convertvector(half | sign >> 16, Halves);
}
#endif

// What a row of T becomes as floats: kStep elements make two vectors. Their order is that of memory, but for Bfloat:
// there the first vector has the even elements and the second the odd ones, as a shift and a mask are all that it takes
// to get them. Sums over elements do not see the order, and what is stored again by store_step is in order again.
constexpr int kStep = 2 * W;

struct Step {
    Floats first, second;
};

inline Step load_step(const float *from) { return {load(from), load(from + W)}; }
inline void store_step(float *to, Step x) {
    store(to, x.first);
    store(to + W, x.second);
}

inline Step load_step(const Half *from) {
    Halves bits[2];
    std::memcpy(bits, from, sizeof bits);
    return {widen(bits[0]), widen(bits[1])};
}
inline void store_step(Half *to, Step x) {
    const Halves bits[2] = {narrow(x.first), narrow(x.second)};
    std::memcpy(to, bits, sizeof bits);
}

inline Words round_to_bfloat(Floats x) {  // the upper halves of the words
    const Words bits = (Words)x;
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}
inline Step load_step(const Bfloat *from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000)};
}
inline void store_step(Bfloat *to, Step x) {
    const Words pairs = round_to_bfloat(x.first) >> 16 | (round_to_bfloat(x.second) & 0xffff0000);
    std::memcpy(to, &pairs, sizeof pairs);
}

// Bfloats in the order of memory, beside elements of a type that has no other.
struct OrderedBfloat {
    uint16_t bits;
};
inline Step load_step(const OrderedBfloat *from) {
    Halves bits[2];
    std::memcpy(bits, from, sizeof bits);
    return {(Floats)(__builtin_convertvector(bits[0], Words) << 16),
            (Floats)(__builtin_convertvector(bits[1], Words) << 16)};
}
inline void store_step(OrderedBfloat *to, Step x) {
    const Halves bits[2] = {__builtin_convertvector(round_to_bfloat(x.first) >> 16, Halves),
                            __builtin_convertvector(round_to_bfloat(x.second) >> 16, Halves)};
    std::memcpy(to, bits, sizeof bits);
}

// The first count elements, if that is less than kStep: what follows them may not be ours, and is taken for 0.
template <class T>
inline Step load_step(const T *from, int64_t count) {
    if (__builtin_expect(count >= kStep, 1)) return load_step(from);
    T part[kStep] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load_step(part);
}
template <class T>
inline void store_step(T *to, Step x, int64_t count) {
    if (count >= kStep) return store_step(to, x);
    T part[kStep];
    store_step(part, x);
    std::memcpy(to, part, count * sizeof(T));
}

// --- exp and tanh -------------------------------------------------------------------------------------------------

// e^x within 2 ulp for x <= 88; 0 below -87. The polynomial is that of Moshier's Cephes library.
inline Floats exp(Floats x) {
    const Floats shifted = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to a whole number
    const Floats n = shifted - 12582912.f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first with few bits
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const Ints exponent = ((Ints)shifted << 23) + 0x3f800000;
    return x < -87.f ? Floats{} : p * (Floats)exponent;
}

inline Floats tanh(Floats x) {
    const Floats clamped = x > 9.f ? fill(9.f) : x < -9.f ? fill(-9.f) : x;
    const Floats e = exp(clamped + clamped);
    // Near 0, e - 1 cancels: there the odd series is exact to float32.
    const Floats square = x * x;
    const Floats series = x * (1.f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
    return square < 0.01f ? series : (e - 1.f) / (e + 1.f);
}

// --- across lanes -------------------------------------------------------------------------------------------------

template <int... I>
inline Floats shuffle(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, I...);
}

// Index lists for shuffle: from each four lanes of a and b, or from all their groups of four, those that are even.
struct EvenLanes {
    static constexpr int at(int i, int odd) { return i / 4 * 4 + i % 2 * 2 + odd + (i % 4 / 2) * W; }
};
struct EvenFours {
    static constexpr int at(int i, int odd) {
        const int four = i / 4 * 2 + odd;  // of a's fours, then of b's
        return four * 4 + i % 4;
    }
};
// Transposing 2x2 blocks of Size x Size: the upper or lower rows that result.
template <int Size>
struct Butterfly {
    static constexpr int at(int i, int lower) {
        return (i & Size) == 0 ? i + (lower ? Size : 0) : W + i - (lower ? 0 : Size);
    }
};

template <class Pattern, int Which, int... I>
constexpr auto indices(std::integer_sequence<int, I...>) {
    return std::integer_sequence<int, Pattern::at(I, Which)...>{};
}
template <class Pattern, int Which>
inline Floats shuffle(Floats a, Floats b) {
    return shuffle(a, b, decltype(indices<Pattern, Which>(std::make_integer_sequence<int, W>{})){});
}
template <class Pattern>
inline Floats add_pairs(Floats a, Floats b) {
    return shuffle<Pattern, 0>(a, b) + shuffle<Pattern, 1>(a, b);
}

// Lane i of the result is the sum of the lanes of x[i]. A tree: N vectors at the leaves under this node.
template <int N = W>
PAGEMGR_INLINE Floats sums(const Floats *x) {
    if constexpr (N == 1) return x[0];
    else if constexpr (N > 4) return add_pairs<EvenFours>(sums<N / 2>(x), sums<N / 2>(x + N / 2));
    else return add_pairs<EvenLanes>(sums<N / 2>(x), sums<N / 2>(x + N / 2));
}

template <int Size = 1>
PAGEMGR_INLINE void transpose(Floats *x) {
    if constexpr (Size < W) {
        PAGEMGR_UNROLL
        for (int i = 0; i < W; i++) {
            if (i & Size) continue;
            const Floats a = x[i], b = x[i + Size];
            x[i] = shuffle<Butterfly<Size>, 0>(a, b);
            x[i + Size] = shuffle<Butterfly<Size>, 1>(a, b);
        }
        transpose<2 * Size>(x);
    }
}

template <class Pattern>
inline Floats max_pairs(Floats x) {
    return max(shuffle<Pattern, 0>(x, x), shuffle<Pattern, 1>(x, x));
}
inline float sum(Floats x) {
    x = add_pairs<EvenLanes>(x, x), x = add_pairs<EvenLanes>(x, x);
    if constexpr (W > 4) x = add_pairs<EvenFours>(x, x);
    if constexpr (W > 8) x = add_pairs<EvenFours>(x, x);
    return x[0];
}
inline float max(Floats x) {
    x = max_pairs<EvenLanes>(x), x = max_pairs<EvenLanes>(x);
    if constexpr (W > 4) x = max_pairs<EvenFours>(x);
    if constexpr (W > 8) x = max_pairs<EvenFours>(x);
    return x[0];
}

}  // namespace pagemgr::PAGEMGR_VARIANT
