// Where rows and weights lie in tiles (tiles.h says why), what is asked of memory, and codes to bfloat16.

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "codes.h"
#include "layer.h"
#include "vectors.h"

// Without a name outside, because several builds may be in one process.
namespace {
namespace tiles {

typedef uint16_t B;  // the bits of a bfloat16

constexpr int SIDE = 16;  // rows of a tile, and columns of a product in it
constexpr int STEP = 32;  // inputs of a tile
constexpr int TILE = SIDE * STEP;
constexpr int PAIR = 2 * SIDE;  // rows that are multiplied with two panels at a time
constexpr int MOST = 16;         // tiles of rows that take their turns with the same two panels, at most
constexpr int LEAST = 6;         // and at least where there are so many, because panels are read anew for the others
constexpr int64_t CODES_AHEAD = 1024;  // of codes, which take longer a byte
constexpr int64_t CACHED = 1 << 20;    // bytes of inputs that stay in the second-level cache beside four panels
constexpr int64_t SUMS = 1 << 20;      // bytes of sums: fewer columns would read what lies between the products more often

inline float widen(B x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline void round_to(V x, B* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
inline void round_to(V x, B* to, int64_t count) {
    const __mmask16 some = count < SIDE ? (1u << count) - 1 : 0xFFFF;
    _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }
int64_t panels_of(int64_t columns) { return (columns + STEP - 1) / STEP * 2; }  // an even number: whole steps of inner
int64_t row_tiles(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
// Row tiles of so many steps that are multiplied with one pair of panels after the other.
int64_t tiles_cached(int64_t steps) {
    return std::min<int64_t>(MOST, std::max<int64_t>(LEAST, CACHED / (steps * TILE * 2) / 2 * 2));
}
// Where the input i of row r lies in tiles of so many steps.
inline int64_t place_of(int64_t r, int64_t i, int64_t steps) {
    return (r / SIDE * steps + i / STEP) * TILE + r % SIDE * STEP + i % STEP;
}

// What to bring into the second-level cache while rows are multiplied, so many lines a step: the two panels that come next,
// a share with each pair of row tiles.
struct Ahead {
    const char* from;
    int lines;
};

// Codes of half a tile to bfloat16, PITCH between pairs of inputs.
template <int BITS, bool ZEROS, int PITCH>
inline void expand_half(const uint8_t* codes, const Table& table, const float* scales, const float* zeros, B* to) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 scale = _mm512_loadu_ps(scales), zero = ZEROS ? _mm512_loadu_ps(zeros) : _mm512_setzero_ps();
    constexpr int PAIRS = SIDE / 2, BYTES = STEP * BITS / 8;
    for (int i = 0; i < PAIRS * BYTES; i += LINE)
        _mm_prefetch(reinterpret_cast<const char*>(codes) + CODES_AHEAD + i, _MM_HINT_T0);
    for (int pair = 0; pair < PAIRS; pair++) {
        V first, second;
        run_of<BITS>(codes + pair * BYTES, table, first, second);
        if (ZEROS) {
            first -= (V)_mm512_permutexvar_ps(low, zero);
            second -= (V)_mm512_permutexvar_ps(high, zero);
        }
        first *= (V)_mm512_permutexvar_ps(low, scale);
        second *= (V)_mm512_permutexvar_ps(high, scale);
        _mm512_storeu_si512(to + pair * PITCH, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
}

}  // namespace tiles
}  // namespace
