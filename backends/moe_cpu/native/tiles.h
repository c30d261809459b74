// The experts in tiles, for bfloat16: of the matrix unit (AMX), or for vectors that multiply it (AVX512_BF16). Products are
// summed in float32, what lies between the two products is rounded to bfloat16. A call of few tokens waits for memory, and
// the tiles cost nothing there, so one way serves every number of tokens.
//
// Packed weights. Tiles of 16 columns of a product (rows of a weight matrix) and STEP inputs, 1 KiB each, in which the two
// inputs of a pair lie beside each other: [pair][column][2]. A matrix is [panel][step][tile], filled up with zeros, so any
// range of panels is read from front to back; panels of gate and up alternate. Where TOGETHER is 2, tiles of two panels that
// are multiplied together are one: [pair of panels][step][pair of inputs][panel][column][2].
//
// Weights of 8 or 4 bits lie panel by panel (codes.h) and are expanded to bfloat16, rounded from float32.
//
// Rows come in tiles too, [16 rows][step][tile] of an expert, which are read from front to back as well. The matrix unit
// multiplies two tiles of rows with two panels at a time: as many loads as products, which take twice as long where the
// loads hit.
//
// Bits. Either adds pairs of inputs in an order of its own, which no row sees another row by: results depend on neither
// the number of threads nor the other tokens of the call. Both take numbers too small for a normal bfloat16 as zero.

#pragma once

#include <atomic>
#include <cstring>

#include "tile_products.h"

// Without a name outside, because several builds may be in one process.
namespace {
namespace tiles {

// Pairs of panels of an expert's first product, for all of its rows: inner, in tiles; ``then`` is what comes behind them.
template <int A>
void up_panels(const Layer& layer, const Sorted& sorted, Shapes& shapes, int64_t expert, int64_t first, int64_t last,
               const void* then, const B* x, B* gathered, B* expanded, B* inner) {
    const int64_t steps = steps_of(layer.hidden), inner_steps = steps_of(layer.inner), most = tiles_cached(steps) * SIDE;
    const int64_t all = (layer.gated ? 2 : 1) * panels_of(layer.inner);
    const Matrix matrix(layer, false, expert, all, steps, expanded);
    const float* bias = layer.b13 ? layer.b13 + expert * all * SIDE : nullptr;
    const V limit = broadcast(layer.limit);
    const bool limited = layer.limit < std::numeric_limits<float>::infinity();
    const int64_t begin = sorted.begins[expert], end = sorted.begins[expert + 1];
    alignas(64) float sums[2 * MOST * SIDE * SIDE];
    for (int64_t from = begin; from < end; from += most) {
        const int64_t n = std::min(most, end - from);
        for (int64_t r = 0; r < n; r++) {
            const B* row = x + sorted.slots[from + r] / layer.top_k * layer.hidden;
            for (int64_t i = 0; i < layer.hidden; i += STEP) {
                B* to = gathered + place_of(r, i, steps);
                const int64_t length = std::min<int64_t>(STEP, layer.hidden - i);
                if (length == STEP)
                    _mm512_storeu_si512(to, _mm512_loadu_si512(row + i));
                else
                    for (int64_t j = 0; j < STEP; j++) to[j] = j < length ? row[i + j] : B(0);
            }
        }
        for (int64_t panel = first; panel < last; panel += 2) {
            matrix.times(shapes, gathered, n, panel, matrix.behind(panel, first, last, from + n < end, then), sums);
            for (int64_t above = 0; above < n; above += PAIR) {
                const int rows = std::min<int64_t>(PAIR, n - above);
                const float* lefts = sums + above * 2 * SIDE;
                const float* others = lefts + row_tiles(rows) * SIDE * SIDE;
                B* to = inner + place_of(from - begin + above, 0, inner_steps);
                for (int r = 0; r < rows; r++) {
                    V left = load(lefts + r * SIDE), right = load(others + r * SIDE);
                    if (bias) {
                        left += load(bias + panel * SIDE);
                        right += load(bias + (panel + 1) * SIDE);
                    }
                    if (layer.gated) {
                        if (limited) {
                            left = left > limit ? limit : left;
                            right = right > limit ? limit : right < -limit ? -limit : right;
                        }
                        left = activate<A>(left, layer.alpha) * (right + layer.beta);
                        round_to(left, to + place_of(r, panel / 2 * SIDE, inner_steps));
                    } else {
                        round_to(activate<A>(left, layer.alpha), to + place_of(r, panel * SIDE, inner_steps));
                        round_to(activate<A>(right, layer.alpha), to + place_of(r, (panel + 1) * SIDE, inner_steps));
                    }
                }
            }
        }
    }
}

// Pairs of panels of the output, and later those from ``then`` on: the second product of every expert, weighted and summed, or
// [slot, H] as it is; of float32, or rounded sums. Sums [T, columns of these panels] lie close together until they are
// whole: rows of the output are a power of two apart, mostly, and would push each other out of the cache.
void down_panels(const Layer& layer, const Sorted& sorted, const std::vector<int64_t>& inner_tile, Shapes& shapes,
                 int64_t first, int64_t last, int64_t then, const B* x, const B* inner, const float* weights, int64_t tokens,
                 B* expanded, float* totals, void* out, bool rounded) {
    const int64_t steps = steps_of(layer.inner), all = panels_of(layer.hidden), most = tiles_cached(steps) * SIDE;
    const int64_t begin_column = first * SIDE, width = std::min(layer.hidden, last * SIDE) - begin_column;
    const int64_t pitch = (last - first) * SIDE;
    float* plain = static_cast<float*>(out);
    alignas(64) float sums[2 * MOST * SIDE * SIDE];
    if (layer.reduce) std::memset(totals, 0, tokens * pitch * sizeof(float));
    for (size_t e = 0; e < sorted.active.size(); e++) {
        const int64_t expert = sorted.active[e], n = sorted.begins[expert + 1] - sorted.begins[expert];
        const Matrix matrix(layer, true, expert, all, steps, expanded);
        const bool ends = e + 1 == sorted.active.size();
        const Matrix other(layer, true, sorted.active[ends ? 0 : e + 1], all, steps, expanded);
        const void* following = !ends ? other.at(first) : then < all ? other.at(then) : nullptr;
        const float* bias = layer.b2 ? layer.b2 + expert * all * SIDE : nullptr;
        const int64_t* slots = sorted.slots.data() + sorted.begins[expert];
        for (int64_t from = 0; from < n; from += most) {
            const int64_t stop = std::min(n, from + most);
            for (int64_t panel = first; panel < last; panel += 2) {
                const B* rows_from = inner + (inner_tile[e] * SIDE + from) * steps * STEP;
                const void* next = matrix.behind(panel, first, last, stop < n, following);
                matrix.times(shapes, rows_from, stop - from, panel, next, sums);
                for (int64_t above = from; above < stop; above += PAIR) {
                    const int rows = std::min<int64_t>(PAIR, stop - above);
                    const float* c = sums + (above - from) * 2 * SIDE;
                    for (int r = 0; r < rows; r++) {
                        const int64_t slot = slots[above + r];
                        for (int half = 0; half < 2; half++) {
                            const int64_t column = (panel + half) * SIDE;
                            V sum = load(c + (half * row_tiles(rows) * SIDE + r) * SIDE);
                            if (bias) sum += load(bias + column);
                            if (layer.reduce) {
                                float* to = totals + slot / layer.top_k * pitch + column - begin_column;
                                store(to, load(to) + broadcast(weights[slot]) * sum);
                            } else {
                                float* to = plain + slot * layer.hidden + column;
                                for (int64_t i = 0; i < SIDE && column + i < layer.hidden; i++) to[i] = sum[i];
                            }
                        }
                    }
                }
            }
        }
    }
    for (int64_t slot : sorted.zeros) {
        const B* from = x + slot / layer.top_k * layer.hidden + begin_column;
        float* to = layer.reduce ? totals + slot / layer.top_k * pitch : plain + slot * layer.hidden + begin_column;
        const float weight = layer.reduce ? weights[slot] : 1.0f;
        for (int64_t i = 0; i < width; i++) to[i] += weight * widen(from[i]);
    }
    if (!layer.reduce) return;
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = totals + t * pitch;
        const int64_t at = t * layer.hidden + begin_column;
        if (rounded)
            for (int64_t i = 0; i < width; i += SIDE)
                round_to(load(from + i) * layer.scale, static_cast<B*>(out) + at + i, width - i);
        else
            for (int64_t i = 0; i < width; i++) plain[at + i] = from[i] * layer.scale;
    }
}

// Panels of an item, an even number: many are read in one go, but every thread should find several items.
int64_t panels_an_item(int64_t panels, int64_t others, int threads, int64_t most) {
    int64_t item = std::max<int64_t>(2, std::min(panels, most) / 2 * 2);
    while (item > 8 && others * ((panels + item - 1) / item) < 4 * threads) item = item / 4 * 2;
    return item;
}

using UpPanels = void (*)(const Layer&, const Sorted&, Shapes&, int64_t, int64_t, int64_t, const void*, const B*, B*, B*, B*);

UpPanels up_panels_of(int activation) {
    switch (activation) {
        case SILU: return up_panels<SILU>;
        case GELU: return up_panels<GELU>;
        case GELU_TANH: return up_panels<GELU_TANH>;
        case RELU: return up_panels<RELU>;
        case RELU2: return up_panels<RELU2>;
        default: return up_panels<IDENTITY>;
    }
}

void run(const Layer& layer, const Sorted& sorted, const B* x, const float* weights, int64_t tokens, void* out, bool rounded,
         int threads) {
    const UpPanels up = up_panels_of(layer.activation);
    const int64_t active = sorted.active.size(), steps = steps_of(layer.hidden);
    const int64_t up_all = (layer.gated ? 2 : 1) * panels_of(layer.inner), down_all = panels_of(layer.hidden);
    const int64_t up_step = panels_an_item(up_all, active, threads, up_all);
    // The sums of an item stay in the cache while the experts take turns.
    const int64_t columns = SUMS / (std::max<int64_t>(tokens, 1) * sizeof(float));
    const int64_t down_step = panels_an_item(down_all, 1, threads, columns / SIDE);
    const int64_t up_blocks = (up_all + up_step - 1) / up_step, down_items = (down_all + down_step - 1) / down_step;
    std::vector<int64_t> inner_tile;  // of each active expert, its first
    int64_t tiles = 0, most = 0;
    for (int64_t expert : sorted.active) {
        const int64_t rows = row_tiles(sorted.begins[expert + 1] - sorted.begins[expert]);
        inner_tile.push_back(tiles);
        tiles += rows;
        most = std::max(most, rows);
    }
    const int64_t room = std::min(most, tiles_cached(steps)) * steps * TILE;
    const int64_t sums_room = layer.reduce ? tokens * down_step * SIDE : 0;
    // Not in the threads, out of which no exception may come.
    const Scratch<B> inner(tiles * SIDE * steps_of(layer.inner) * STEP), gathered(room * threads);
    const Scratch<float> totals(sums_room * threads);
    const int64_t pair_room = layer.bits ? 2 * std::max(steps, steps_of(layer.inner)) * TILE : 0;
    const Scratch<B> expanded(pair_room * threads);
    std::atomic<int64_t> next_thread{0}, next_up{0}, next_down{0};
    on_threads(threads, [&] {
        Shapes shapes;
        const int64_t thread = next_thread.fetch_add(1);
        for (int64_t i; (i = next_up.fetch_add(1)) < active * up_blocks;) {
            const int64_t first = i % up_blocks * up_step;
            const int64_t e = i / up_blocks;
            // Threads take items in turn, more or less.
            const int64_t j = i + threads;
            const void* then = nullptr;
            if (j < active * up_blocks)
                then = Matrix(layer, false, sorted.active[j / up_blocks], up_all, steps, nullptr).at(j % up_blocks * up_step);
            up(layer, sorted, shapes, sorted.active[e], first, std::min(up_all, first + up_step), then, x,
               gathered.begin + room * thread, expanded.begin + pair_room * thread,
               inner.begin + inner_tile[e] * steps_of(layer.inner) * TILE);
        }
        wait_for_all(threads);
        for (int64_t i; (i = next_down.fetch_add(1)) < down_items;) {
            const int64_t first = i * down_step;
            down_panels(layer, sorted, inner_tile, shapes, first, std::min(down_all, first + down_step),
                        first + threads * down_step, x, inner.begin, weights, tokens, expanded.begin + pair_room * thread,
                        totals.begin + sums_room * thread, out, rounded);
        }
    });
}

template <typename E>
void pack(const Pack& p, int threads) {
    const E* source = static_cast<const E*>(p.source);
    const int64_t steps = steps_of(p.depth), together = sizeof(E) == 2 ? TOGETHER : 1;
#pragma omp parallel for num_threads(threads)
    for (int64_t place = p.first_panel; place < p.panels; place += p.panel_step) {
        const int64_t panel = place / p.panel_step;
        for (int64_t step = 0; step < steps; step++) {
            const int64_t first = place / together * together, at = (first * steps + step * together) * TILE;
            E* tile = static_cast<E*>(p.packed) + at + place % together * STEP;
            for (int column = 0; column < SIDE; column++) {
                const int64_t row = panel * SIDE + column, left = p.depth - step * STEP;
                const E* from = source + (p.first_row + row * p.row_step) * p.row_stride + step * STEP;
                const int64_t inputs = row < p.rows ? std::min<int64_t>(STEP, left) : 0;
                for (int i = 0; i < STEP; i++)
                    tile[i / 2 * together * STEP + column * 2 + i % 2] = i < inputs ? from[i] : E(0);
            }
        }
    }
}

}  // namespace tiles
}  // namespace
