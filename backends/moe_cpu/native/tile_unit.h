// Rows in tiles times two panels of weights by the matrix unit (AMX).

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "tile_layout.h"

// Without a name outside, because several builds may be in one process.
namespace {
namespace tiles {

// May this process use the tiles? The kernel has to be asked once.
bool allowed() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

constexpr int TOGETHER = 1;  // a tile is read whole

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

// The hardware sees what will be read next, and only has to be told a little earlier: by 1 KiB it is slower already.
constexpr int64_t AHEAD = 640;
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

// As multiply, of codes, which are expanded step by step while the step before is multiplied: arithmetic of both kinds and
// memory then run side by side. ``expanded`` [2][steps][tile] is left behind.
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
                expand_half<BITS, ZEROS, STEP>(codes + (p * size + half) * BITS / 8, table, scales + p * row + place,
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

using Multiply = void (*)(const B*, const B*, int64_t, Ahead&, float*);
using MultiplyCodes = void (*)(const B*, const uint8_t*, const Table&, const Scales&, int64_t, int64_t, B*, float*);

// c [2][tiles of rows][16][16] = rows, up to PAIR, times two panels.
inline void product(Shapes& shapes, const B* x, int rows, const B* panels, int64_t steps, bool alone, Ahead& ahead,
                    float* c) {
    static constexpr Multiply ways[2][2] = {{multiply<1, false>, multiply<2, false>}, {multiply<1, true>, multiply<2, true>}};
    shapes.set(std::min(rows, SIDE));
    ways[alone][rows > SIDE](x, panels, steps, ahead, c);
}

// The same of codes, which leaves both panels in ``expanded``.
inline void product_of_codes(Shapes& shapes, const B* x, int rows, const uint8_t* codes, int bits, const Table& table,
                             const Scales& scales, int64_t panel, int64_t steps, B* expanded, float* c) {
    static constexpr MultiplyCodes ways[2][2][2] = {
        {{multiply_codes<1, 4, false>, multiply_codes<2, 4, false>}, {multiply_codes<1, 4, true>, multiply_codes<2, 4, true>}},
        {{multiply_codes<1, 8, false>, multiply_codes<2, 8, false>}, {multiply_codes<1, 8, true>, multiply_codes<2, 8, true>}},
    };
    shapes.set(std::min(rows, SIDE));
    ways[bits == 8][scales.zeros != nullptr][rows > SIDE](x, codes, table, scales, panel, steps, expanded, c);
}

}  // namespace tiles
}  // namespace
