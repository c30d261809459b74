// Rows in tiles times two panels of weights, plain or of codes; tiles.h has the layouts.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

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
constexpr int HEIGHT = 6;  // tiles of rows that are multiplied at a time
constexpr int LINE = 64;
// The hardware sees what will be read next, and only has to be told a little earlier: by 1 KiB it is slower already.
constexpr int64_t AHEAD = 640;
constexpr int64_t CODES_AHEAD = 1024;  // of codes, which take longer a byte
constexpr int64_t CACHED = 1 << 19;    // bytes of inputs that stay in the second-level cache beside a panel
constexpr int64_t SUMS = 1 << 20;      // bytes of sums: fewer columns would read what lies between the products more often

inline float widen(B x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline void round_to(V x, B* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }
int64_t panels_of(int64_t columns) { return (columns + STEP - 1) / STEP * 2; }  // an even number: whole steps of inner
int64_t row_tiles(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
// Row tiles of so many steps that are multiplied with one pair of panels after the other.
int64_t tiles_cached(int64_t steps) { return std::max<int64_t>(1, CACHED / (steps * TILE * 2) / HEIGHT) * HEIGHT; }
// Where the input i of row r lies in tiles of so many steps.
inline int64_t place_of(int64_t r, int64_t i, int64_t steps) {
    return (r / SIDE * steps + i / STEP) * TILE + r % SIDE * STEP + i % STEP;
}

// May this process use the tiles? The kernel has to be asked once.
bool allowed() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// The shapes of a thread's tiles.
class Shapes {
  public:
    ~Shapes() {
        if (rows_) _tile_release();
    }

    // Tiles 4 and 5 are rows where there are no more than 32, 6 where there are more; all others are whole.
    void set(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.rows[i] = SIDE, config.bytes[i] = LINE;
        if (rows < SIDE) config.rows[0] = config.rows[1] = config.rows[4] = rows;
        _tile_loadconfig(&config);
    }

  private:
    int rows_ = 0;
};

template <int N>
inline void ask(const B* from) {
    for (int i = 0; i < N; i++) _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD + i * LINE, _MM_HINT_T0);
}

// c [2][R][16][16] = R tiles of rows times two panels; ASK: which are not in the cache.
template <int R, bool ASK>
void multiply_wide(const B* x, const B* panel, int64_t steps, float* c) {
    const B *below = x + steps * TILE, *second = panel + steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    if (R == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps * TILE; k += TILE) {
        if (ASK) ask<SIDE>(panel + k);
        _tile_loadd(4, x + k, LINE);
        _tile_loadd(6, panel + k, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (ASK) ask<SIDE>(second + k);
        _tile_loadd(7, second + k, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (R == 2) {
            _tile_loadd(5, below + k, LINE);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + R * SIDE * SIDE, LINE);
    if (R == 2) {
        _tile_stored(2, c + SIDE * SIDE, LINE);
        _tile_stored(3, c + 3 * SIDE * SIDE, LINE);
    }
}

// c [R][16][16] = R > 2 tiles of rows times a panel.
template <int R, bool ASK>
void multiply_tall(const B* x, const B* panel, int64_t steps, float* c) {
    const int64_t below = steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if (R > 3) _tile_zero(3);
    if (R > 4) _tile_zero(4);
    if (R > 5) _tile_zero(5);
    for (int64_t k = 0; k < steps; k++, panel += TILE, x += TILE) {
        if (ASK) ask<SIDE>(panel);
        _tile_loadd(7, panel, LINE);
        _tile_loadd(6, x, LINE);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(6, x + below, LINE);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(6, x + 2 * below, LINE);
        _tile_dpbf16ps(2, 6, 7);
        if (R > 3) {
            _tile_loadd(6, x + 3 * below, LINE);
            _tile_dpbf16ps(3, 6, 7);
        }
        if (R > 4) {
            _tile_loadd(6, x + 4 * below, LINE);
            _tile_dpbf16ps(4, 6, 7);
        }
        if (R > 5) {
            _tile_loadd(6, x + 5 * below, LINE);
            _tile_dpbf16ps(5, 6, 7);
        }
    }
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + SIDE * SIDE, LINE);
    _tile_stored(2, c + 2 * SIDE * SIDE, LINE);
    if (R > 3) _tile_stored(3, c + 3 * SIDE * SIDE, LINE);
    if (R > 4) _tile_stored(4, c + 4 * SIDE * SIDE, LINE);
    if (R > 5) _tile_stored(5, c + 5 * SIDE * SIDE, LINE);
}

using Multiply = void (*)(const B*, const B*, int64_t, float*);

// c [2][whole tiles of rows][16] = rows times two panels; the first ones to use them have to wait for them.
inline void product(Shapes& shapes, const B* x, int rows, const B* panels, int64_t steps, bool first, float* c) {
    static constexpr Multiply ways[2][HEIGHT] = {
        {multiply_wide<1, false>, multiply_wide<2, false>, multiply_tall<3, false>, multiply_tall<4, false>,
         multiply_tall<5, false>, multiply_tall<6, false>},
        {multiply_wide<1, true>, multiply_wide<2, true>, multiply_tall<3, true>, multiply_tall<4, true>,
         multiply_tall<5, true>, multiply_tall<6, true>},
    };
    const int64_t tiles = row_tiles(rows);
    const Multiply multiply = ways[first][tiles - 1];
    shapes.set(std::min(rows, SIDE));
    multiply(x, panels, steps, c);
    if (tiles > 2) multiply(x, panels + steps * TILE, steps, c + tiles * SIDE * SIDE);
}

// Codes are expanded step by step into room for two panels, while the step before is multiplied: arithmetic of both kinds and
// memory then run side by side.
template <int BITS, bool ZEROS>
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
        _mm512_storeu_si512(to + pair * STEP, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
}

// As multiply_wide, of codes; ``expanded`` [2][steps][tile] is left behind. R = 0 multiplies nothing.
template <int R, int BITS, bool ZEROS>
void multiply_codes(const B* x, const uint8_t* codes, const Table& table, const Scales& s, int64_t panel, int64_t steps,
                    B* expanded, float* c) {
    const B* below = x + steps * TILE;
    const int64_t size = steps * TILE, row = s.groups * SIDE;
    const float* scales = s.scales + panel * row;
    const float* zeros = ZEROS ? s.zeros + panel * row : scales;
    if (R > 0) {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (R > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    int64_t place = 0, left = s.group;
    for (int64_t k = 0; k <= size; k += TILE) {
        for (int64_t half = k; half < k + TILE && k < size; half += TILE / 2) {
            for (int64_t p = 0; p < 2; p++)
                expand_half<BITS, ZEROS>(codes + (p * size + half) * BITS / 8, table, scales + p * row + place,
                                         zeros + p * row + place, expanded + p * size + half);
            left -= STEP / 2;
            if (left <= 0 && place + SIDE < row) place += SIDE, left = s.group;
        }
        if (R == 0 || k == 0) continue;
        const int64_t before = k - TILE;
        _tile_loadd(4, x + before, LINE);
        _tile_loadd(6, expanded + before, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, expanded + size + before, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (R > 1) {
            _tile_loadd(5, below + before, LINE);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    if (R > 0) {
        _tile_stored(0, c, LINE);
        _tile_stored(1, c + R * SIDE * SIDE, LINE);
    }
    if (R > 1) {
        _tile_stored(2, c + SIDE * SIDE, LINE);
        _tile_stored(3, c + 3 * SIDE * SIDE, LINE);
    }
}

// An expert's matrix, and room for two panels where it is of codes.
struct Matrix {
    const void* packed;
    Table table;
    const Scales* scales;
    int bits;
    int64_t first_panel, steps;  // counted over all experts
    B* expanded;

    Matrix(const Layer& layer, bool down, int64_t expert, int64_t all, int64_t steps, B* expanded)
        : packed(down ? layer.w2 : layer.w13), table(layer.table), scales(down ? &layer.scales2 : &layer.scales13),
          bits(layer.bits), first_panel(expert * all), steps(steps), expanded(expanded) {}

    // c [2][whole tiles of rows][16] = rows times two panels; the first ones to use them have to wait for them.
    void times(Shapes& shapes, const B* x, int rows, int64_t panel, bool first, float* c) const {
        const int64_t at = (first_panel + panel) * steps * TILE;
        if (!bits) return product(shapes, x, rows, static_cast<const B*>(packed) + at, steps, first, c);
        if (first) {
            const int tiles = row_tiles(rows) > 2 ? 0 : row_tiles(rows);
            if (tiles) shapes.set(std::min(rows, SIDE));
            way(tiles)(x, bytes_of(packed, at, bits), table, *scales, first_panel + panel, steps, expanded, c);
            if (tiles) return;
        }
        product(shapes, x, rows, expanded, steps, false, c);
    }

  private:
    using Way = void (*)(const B*, const uint8_t*, const Table&, const Scales&, int64_t, int64_t, B*, float*);

    Way way(int tiles) const {
        static constexpr Way ways[2][2][3] = {
            {{multiply_codes<0, 4, false>, multiply_codes<1, 4, false>, multiply_codes<2, 4, false>},
             {multiply_codes<0, 4, true>, multiply_codes<1, 4, true>, multiply_codes<2, 4, true>}},
            {{multiply_codes<0, 8, false>, multiply_codes<1, 8, false>, multiply_codes<2, 8, false>},
             {multiply_codes<0, 8, true>, multiply_codes<1, 8, true>, multiply_codes<2, 8, true>}},
        };
        return ways[bits == 8][scales->zeros != nullptr][tiles];
    }
};

}  // namespace tiles
}  // namespace
