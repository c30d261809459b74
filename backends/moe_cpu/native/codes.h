// Weights of 8 or 4 bits: (number - zero) * scale, with a scale, and maybe a zero point, for a group of inputs of a column.
//
// Codes lie in the order of the layout that they stand in for, in which runs of 2 * LANES numbers belong to one input (or,
// in tiles, pair of inputs) of a panel. Codes of 8 bits are signed numbers. Codes of 4 bits are looked up in a table; byte i
// of a run holds its number i in the lower half and i + LANES in the upper one. Each is expanded to the layout before it is
// multiplied, so products and their bits are those of the expanded weights.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "layer.h"
#include "vectors.h"

namespace {

// What stands in LANES bytes, as numbers, or as places in the table: only the lowest four bits of a lane count there.
// Compilers widen bytes one by one where the vectors are their own.
#if defined(__AVX512F__)
inline V signed_numbers(const uint8_t* p) {
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline U places(const uint8_t* p) { return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
struct Table {
    __m512 numbers;
    explicit Table(const float* from) : numbers(from ? _mm512_loadu_ps(from) : _mm512_setzero_ps()) {}
    V at(U places) const { return (V)_mm512_permutexvar_ps((__m512i)places, numbers); }
};
#elif defined(__AVX2__)
inline V signed_numbers(const uint8_t* p) {
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline U places(const uint8_t* p) { return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
struct Table {
    __m256 low, high;
    explicit Table(const float* from)
        : low(from ? _mm256_loadu_ps(from) : _mm256_setzero_ps()), high(from ? _mm256_loadu_ps(from + 8) : low) {}
    V at(U places) const {
        const __m256i at = (__m256i)places;
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // the sign is the fourth bit
        return (V)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper);
    }
};
#else
inline V signed_numbers(const uint8_t* p) {
    V found;
    for (int i = 0; i < LANES; i++) found[i] = static_cast<int8_t>(p[i]);
    return found;
}
inline U places(const uint8_t* p) {
    U found;
    for (int i = 0; i < LANES; i++) found[i] = p[i];
    return found;
}
struct Table {
    const float* numbers;
    explicit Table(const float* from) : numbers(from) {}
    V at(U places) const {
        V found;
        for (int i = 0; i < LANES; i++) found[i] = numbers[places[i] & 15];
        return found;
    }
};
#endif

// The two vectors of the run behind ``codes``.
template <int BITS>
inline void run_of(const uint8_t* codes, const Table& table, V& first, V& second) {
    if (BITS == 8) {
        first = signed_numbers(codes);
        second = signed_numbers(codes + LANES);
    } else {
        const U both = places(codes);
        first = table.at(both);
        second = table.at(both >> 4);
    }
}

inline const uint8_t* bytes_of(const void* codes, int64_t elements, int bits) {
    return static_cast<const uint8_t*>(codes) + elements * bits / 8;
}

}  // namespace
