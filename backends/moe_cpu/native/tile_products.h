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
constexpr int PAIR = 2 * SIDE;  // rows that are multiplied with two panels at a time
constexpr int MOST = 16;         // tiles of rows that take their turns with the same two panels, at most
constexpr int LEAST = 6;         // and at least where there are so many, because panels are read anew for the others
constexpr int LINE = 64;
// The hardware sees what will be read next, and only has to be told a little earlier: by 1 KiB it is slower already.
constexpr int64_t AHEAD = 640;
constexpr int64_t CODES_AHEAD = 1024;  // of codes, which take longer a byte
constexpr int64_t CACHED = 1 << 20;    // bytes of inputs that stay in the second-level cache beside four panels
constexpr int64_t SUMS = 1 << 20;      // bytes of sums: fewer columns would read what lies between the products more often

inline float widen(B x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline void round_to(V x, B* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
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

    // Tile 4 is rows, of which there may be few; all others are whole.
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

// What to bring into the second-level cache while rows are multiplied, so many lines a step: the two panels that come next,
// a share with each pair of row tiles.
struct Ahead {
    const char* from;
    int lines;
};

inline void ask(const B* panel) {
    for (int i = 0; i < SIDE; i++) _mm_prefetch(reinterpret_cast<const char*>(panel) + AHEAD + i * LINE, _MM_HINT_T0);
}

// c [2][R][16][16] = R tiles of rows times two panels; ALONE: which come from memory, and no other rows will use them.
template <int R, bool ALONE>
void multiply(const B* x, const B* panel, int64_t steps, Ahead& ahead, float* c) {
    const B *below = x + steps * TILE, *second = panel + steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    if (R == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps * TILE; k += TILE) {
        if (ALONE)
            ask(panel + k);
        else
            for (int i = 0; i < ahead.lines; i++, ahead.from += LINE) _mm_prefetch(ahead.from, _MM_HINT_T1);
        _tile_loadd(4, x + k, LINE);
        _tile_loadd(6, panel + k, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (ALONE) ask(second + k);
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

// As multiply, of codes; ``expanded`` [2][steps][tile] is left behind.
template <int R, int BITS, bool ZEROS>
void multiply_codes(const B* x, const uint8_t* codes, const Table& table, const Scales& s, int64_t panel, int64_t steps,
                    B* expanded, float* c) {
    const B* below = x + steps * TILE;
    const int64_t size = steps * TILE, row = s.groups * SIDE;
    const float* scales = s.scales + panel * row;
    const float* zeros = ZEROS ? s.zeros + panel * row : scales;
    _tile_zero(0);
    _tile_zero(1);
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
        if (k == 0) continue;
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
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + R * SIDE * SIDE, LINE);
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

    // c [pair of row tiles][2][whole tiles of rows][16][16] = rows, up to MOST tiles, times two panels.
    void times(Shapes& shapes, const B* x, int rows, int64_t panel, float* c) const {
        const int64_t at = (first_panel + panel) * steps * TILE;
        const B* panels = bits ? expanded : static_cast<const B*>(packed) + at;
        const int pairs = (rows + PAIR - 1) / PAIR;
        const bool alone = !bits && pairs == 1;
        Ahead ahead{reinterpret_cast<const char*>(panels + 2 * steps * TILE), bits ? 0 : (2 * SIDE + pairs - 1) / pairs};
        for (int r = 0; r < rows; r += PAIR, x += 2 * steps * TILE, c += 2 * PAIR * SIDE) {
            const bool two = rows - r > SIDE;
            shapes.set(std::min(rows - r, SIDE));
            if (bits && r == 0)
                way(two)(x, bytes_of(packed, at, bits), table, *scales, first_panel + panel, steps, expanded, c);
            else
                ways[alone][two](x, panels, steps, ahead, c);
        }
    }

  private:
    using Multiply = void (*)(const B*, const B*, int64_t, Ahead&, float*);
    static constexpr Multiply ways[2][2] = {{multiply<1, false>, multiply<2, false>}, {multiply<1, true>, multiply<2, true>}};

    using Way = void (*)(const B*, const uint8_t*, const Table&, const Scales&, int64_t, int64_t, B*, float*);

    Way way(bool two) const {
        static constexpr Way by_scheme[2][2][2] = {
            {{multiply_codes<1, 4, false>, multiply_codes<2, 4, false>},
             {multiply_codes<1, 4, true>, multiply_codes<2, 4, true>}},
            {{multiply_codes<1, 8, false>, multiply_codes<2, 8, false>},
             {multiply_codes<1, 8, true>, multiply_codes<2, 8, true>}},
        };
        return by_scheme[bits == 8][scales->zeros != nullptr][two];
    }
};

}  // namespace tiles
}  // namespace
