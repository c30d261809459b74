// Rows in tiles times two panels of weights, plain or of codes; tiles.h has the layouts.

#pragma once

#include "tile_layout.h"
#if defined(__AMX_BF16__)
#include "tile_unit.h"
#else
#include "tile_vectors.h"
#endif

// Without a name outside, because several builds may be in one process.
namespace {
namespace tiles {

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

    // Where a pair of panels begins, in elements.
    int64_t place(int64_t panel) const { return (first_panel + panel) * steps * TILE; }

    // The pair itself, which codes have not.
    const B* at(int64_t panel) const { return bits ? nullptr : static_cast<const B*>(packed) + place(panel); }

    // What is read behind a pair of panels of first .. last: the next pair, the first one where rows are left, or ``then``.
    const void* behind(int64_t panel, int64_t first, int64_t last, bool rows_left, const void* then) const {
        return panel + 2 < last ? at(panel + 2) : rows_left ? at(first) : then;
    }

    // c [pair of row tiles][2][whole tiles of rows][16][16] = rows, up to MOST tiles, times two panels; ``then`` is what
    // this thread is to read next, or nothing.
    void times(Shapes& shapes, const B* x, int rows, int64_t panel, const void* then, float* c) const {
        const B* panels = bits ? expanded : at(panel);
        const int pairs = (rows + PAIR - 1) / PAIR;
        const bool alone = !bits && pairs == 1;  // the panels come from memory, and no other rows will use them
        Ahead ahead{static_cast<const char*>(then), !then ? 0 : (2 * SIDE + pairs - 1) / pairs};
        for (int r = 0; r < rows; r += PAIR, x += 2 * steps * TILE, c += 2 * PAIR * SIDE) {
            const int high = std::min(rows - r, PAIR);
            if (bits && r == 0)
                product_of_codes(shapes, x, high, bytes_of(packed, place(panel), bits), bits, table, *scales,
                                 first_panel + panel, steps, expanded, c);
            else
                product(shapes, x, high, panels, steps, alone, ahead, c);
        }
    }
};

}  // namespace tiles
}  // namespace
