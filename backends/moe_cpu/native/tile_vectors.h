// Rows in tiles times two panels of weights by vectors that multiply pairs of bfloat16 (AVX512_BF16).
//
// A row of a tile of weights is one vector: a pair of inputs of sixteen columns. It meets the same pair of a row, in all
// places of a vector, and both products are added to the column's sum. A row's sum is one chain, front to back, however
// many rows are beside it.

#pragma once

#include <cstring>

#include "tile_layout.h"

// Without a name outside, because several builds may be in one process.
namespace {
namespace tiles {

bool allowed() { return true; }

// Vectors have one.
struct Shapes {};

constexpr int ROWS = 8;      // of a block: two sums each, beside two vectors of weights, leave enough for what is on its way
constexpr int TOGETHER = 2;  // panels in one stream: the hardware runs ahead of one farther than hints do before two
constexpr int HINTED = 7;    // from so many rows on it does not: their products fill the window that it learns from

// R rows times two panels, to sums of sixteen columns a row.
template <int R>
void multiply(const B* x, const B* panels, int64_t steps, Ahead& ahead, float* left, float* right) {
    // Through memory a compiler would clear them with one string instruction, and keep them there.
    const __m512 none = _mm512_castsi512_ps(_mm512_set1_epi32(0));
    __m512 sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r][0] = none, sums[r][1] = none;
    for (int64_t k = 0; k < steps * TILE; k += TILE, panels += 2 * TILE) {
        for (int i = 0; i < ahead.lines; i++, ahead.from += LINE) _mm_prefetch(ahead.from, _MM_HINT_T1);
        for (int pair = 0; pair < STEP / 2; pair++) {
            const __m512bh w0 = (__m512bh)_mm512_load_si512(panels + pair * 2 * STEP);
            const __m512bh w1 = (__m512bh)_mm512_load_si512(panels + pair * 2 * STEP + STEP);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t both;
                std::memcpy(&both, x + k + r * STEP + pair * 2, sizeof both);
                const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], value, w0);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], value, w1);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(left + r * SIDE, sums[r][0]);
        _mm512_storeu_ps(right + r * SIDE, sums[r][1]);
    }
}

using Multiply = void (*)(const B*, const B*, int64_t, Ahead&, float*, float*);
constexpr Multiply heights[ROWS] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                    multiply<5>, multiply<6>, multiply<7>, multiply<8>};

// Of up to SIDE rows.
inline int blocks_of(int rows) { return (rows + ROWS - 1) / ROWS; }

// c [2][tiles of rows][16][16] = rows, up to PAIR, times two panels.
//
// Each block asks for its part of what comes next: of several all but the first read the panels from the cache, and memory
// would be idle meanwhile.
inline void product(Shapes&, const B* x, int rows, const B* panels, int64_t steps, bool alone, Ahead& ahead, float* c) {
    const int64_t right = row_tiles(rows) * SIDE * SIDE;
    int all = 0;
    for (int tile = 0; tile * SIDE < rows; tile++) all += blocks_of(std::min(rows - tile * SIDE, SIDE));
    Ahead part{ahead.from, alone && rows < HINTED ? 0 : (ahead.lines + all - 1) / all};
    for (int tile = 0; tile * SIDE < rows; tile++) {
        const int high = std::min(rows - tile * SIDE, SIDE), blocks = blocks_of(high);
        for (int block = 0; block < blocks; block++) {
            const int begin = high * block / blocks, r = high * (block + 1) / blocks - begin;
            float* to = c + (tile * SIDE + begin) * SIDE;
            heights[r - 1](x + tile * steps * TILE + begin * STEP, panels, steps, part, to, to + right);
        }
    }
    ahead.from = part.from;
}

template <int BITS, bool ZEROS>
void expand(const uint8_t* codes, const Table& table, const Scales& s, int64_t panel, int64_t steps, B* expanded) {
    const int64_t row = s.groups * SIDE;
    for (int64_t p = 0; p < 2; p++, panel++) {
        const float* scales = s.scales + panel * row;
        const float* zeros = ZEROS ? s.zeros + panel * row : scales;
        int64_t place = 0, left = s.group;
        for (int64_t half = 0; half < steps * TILE; half += TILE / 2) {
            const int64_t at = p * steps * TILE + half;
            expand_half<BITS, ZEROS, 2 * STEP>(codes + at * BITS / 8, table, scales + place, zeros + place,
                                               expanded + half * 2 + p * STEP);
            left -= STEP / 2;
            if (left <= 0 && place + SIDE < row) place += SIDE, left = s.group;
        }
    }
}

// The same of codes, which leaves both panels in ``expanded``.
inline void product_of_codes(Shapes& shapes, const B* x, int rows, const uint8_t* codes, int bits, const Table& table,
                             const Scales& scales, int64_t panel, int64_t steps, B* expanded, float* c) {
    using Expand = void (*)(const uint8_t*, const Table&, const Scales&, int64_t, int64_t, B*);
    static constexpr Expand ways[2][2] = {{expand<4, false>, expand<4, true>}, {expand<8, false>, expand<8, true>}};
    ways[bits == 8][scales.zeros != nullptr](codes, table, scales, panel, steps, expanded);
    Ahead nothing{nullptr, 0};
    product(shapes, x, rows, expanded, steps, false, nothing, c);
}

}  // namespace tiles
}  // namespace
