// The experts in vectors, on any processor. Everything is computed in float32; bfloat16 weights are widened in registers,
// which costs a shift and a mask for two vectors.
//
// Packed weights. The columns of a product (rows of a weight matrix) are cut into panels of two vectors, and the inner
// dimension into pieces of K_BLOCK, the last one shorter: [piece][panel][k][2 * LANES], the last panel filled up with
// zeros. So a product reads a block of panels piece by piece, each from front to back. A panel of bfloat16 alternates the
// columns of both vectors, so that one load gives both: the lower half of each 32-bit lane belongs to the first vector.
// Panels of gate and up alternate, so one block of columns has both.
//
// Bits. Each element of a product is one chain of fused multiply-adds over k, front to back, whatever the tile, the block
// or the thread that computes it, and each element of the output adds its experts in ascending order.

#pragma once

#include <array>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "layer.h"
#include "vectors.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "panels of bfloat16 are read as little-endian 32-bit lanes");

// Without a name outside, because several builds may be in one process.
namespace {
namespace panels {

constexpr int PANEL = 2 * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int ROWS = (REGISTERS - 3) / 2;    // of a tile: 2 accumulators each, beside 2 weights and 1 input
constexpr int ROW_BLOCK = 96 / ROWS * ROWS;  // rows whose sums are kept while a block of columns is computed
constexpr int PANEL_BLOCK = 8;               // panels of a block of columns, at most
constexpr int64_t K_BLOCK = 256;             // inputs of a tile, so many k of them, stay in the first-level cache
// Few rows wait for memory, and the hardware sees what they will read next; it only has to be told a little earlier, by
// so many bytes. More rows take longer for a step of k than the hardware looks ahead: see Ahead.
constexpr int FEW_ROWS = ROWS / 2;
constexpr int64_t AHEAD = 2048;

// Two vectors of weights.
inline void load_panel(const float* p, V& first, V& second) {
    first = load(p);
    second = load(p + LANES);
}
inline void load_panel(const uint16_t* p, V& first, V& second) {
    const U both = *reinterpret_cast<const UnalignedU*>(p);
    first = (V)(both << 16);
    second = (V)(both & 0xffff0000u);
}

// What to ask memory for while k runs: from here on, so many bytes a step. For more than FEW_ROWS that is the piece that
// is read after this one, into the second-level cache, a share in each tile: arithmetic and memory then run side by side.
struct Ahead {
    const char* from;
    int64_t step;
};

// A block of columns of one expert: these panels of a matrix [depth, all panels].
template <typename W>
struct Block {
    const W* matrix;
    int64_t depth, all, first;
    int panels;

    int64_t length(int64_t k0) const { return depth - k0 < K_BLOCK ? depth - k0 : K_BLOCK; }
    const W* piece(int64_t k0) const { return matrix + (k0 * all + first * length(k0)) * PANEL; }
};

// The same of a matrix of codes.
template <>
struct Block<uint8_t> {
    const void* matrix;
    int64_t depth, all, first;
    int panels;
    const Scales* scales;
    const float* table;
    int bits;
    int64_t before;  // panels of the experts before this one

    int64_t length(int64_t k0) const { return depth - k0 < K_BLOCK ? depth - k0 : K_BLOCK; }

    // A piece of a panel as it would be packed in float32.
    void expand(int p, int64_t k0, float* to) const {
        const int64_t at = (before * depth + k0 * all + (first + p) * length(k0)) * PANEL;
        if (bits == 8)
            expand_codes<8>(p, k0, bytes_of(matrix, at, 8), to);
        else
            expand_codes<4>(p, k0, bytes_of(matrix, at, 4), to);
    }

    template <int BITS>
    void expand_codes(int p, int64_t k0, const uint8_t* codes, float* to) const {
        const Scales& s = *scales;
        const Table numbers(table);
        const int64_t stop = k0 + length(k0);
        for (int64_t k = k0; k < stop;) {
            const int64_t group = k / s.group, end = (group + 1) * s.group < stop ? (group + 1) * s.group : stop;
            const int64_t place = ((before + first + p) * s.groups + group) * PANEL;
            for (int i = 0; i < 2; i++) {  // those of the next panel
                __builtin_prefetch(s.scales + place + s.groups * PANEL + i * LANES);
                if (s.zeros) __builtin_prefetch(s.zeros + place + s.groups * PANEL + i * LANES);
            }
            const V first = load(s.scales + place), second = load(s.scales + place + LANES);
            const V first_zero = s.zeros ? load(s.zeros + place) : V{};
            const V second_zero = s.zeros ? load(s.zeros + place + LANES) : V{};
            for (; k < end; k++) {
                V a, b;
                __builtin_prefetch(codes + (k - k0) * PANEL * BITS / 8 + AHEAD);
                run_of<BITS>(codes + (k - k0) * PANEL * BITS / 8, numbers, a, b);
                store(to + (k - k0) * PANEL, (a - first_zero) * first);
                store(to + (k - k0) * PANEL + LANES, (b - second_zero) * second);
            }
        }
    }
};

// c [R, 2 LANES P] = (or += unless first) x [R, depth], rows K_BLOCK apart, times P panels. Where few rows leave
// registers free, two panels run side by side: a multiply-add takes four cycles, and its successor in the chain waits.
template <typename W, int R, int P>
inline void multiply(const float* x, int64_t depth, const W* panel, Ahead ahead, float* c, int64_t c_stride,
                     bool first) {
    V sums[R][2 * P];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2 * P; j++) sums[r][j] = first ? V{} : load(c + r * c_stride + j * LANES);
    for (int64_t k = 0; k < depth; k++) {
        for (int p = 0; p < P; p++) {
            V w0, w1;
            __builtin_prefetch(ahead.from + (p * depth + k) * ahead.step, 0, R <= FEW_ROWS ? 3 : 2);
            load_panel(panel + (p * depth + k) * PANEL, w0, w1);
            for (int r = 0; r < R; r++) {
                const V value = broadcast(x[r * K_BLOCK + k]);
                sums[r][2 * p] += value * w0;
                sums[r][2 * p + 1] += value * w1;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2 * P; j++) store(c + r * c_stride + j * LANES, sums[r][j]);
}

// R rows times any number of panels.
template <typename W, int R>
void multiply_tile(const float* x, int64_t depth, const W* w, int panels, Ahead ahead, float* c, int64_t c_stride,
                   bool first) {
    constexpr int P = 4 * R + 5 <= REGISTERS ? 2 : 1;
    int p = 0;
    for (; p + P <= panels; p += P, ahead.from += P * depth * ahead.step)
        multiply<W, R, P>(x, depth, w + p * depth * PANEL, ahead, c + p * PANEL, c_stride, first);
    for (; p < panels; p++)
        multiply<W, R, 1>(x, depth, w + p * depth * PANEL, ahead, c + p * PANEL, c_stride, first);
}

template <typename W>
using Tile = void (*)(const float*, int64_t, const W*, int, Ahead, float*, int64_t, bool);

// The tile of each height: [R - 1].
template <typename W, int... R>
constexpr std::array<Tile<W>, ROWS> tiles_of(std::integer_sequence<int, R...>) {
    return {multiply_tile<W, R + 1>...};
}

// c [n, panels * PANEL] = x [n, depth] times a block, n <= ROW_BLOCK; the block ``then`` comes next.
template <typename W>
void product(const float* const* x, int n, const Block<W>& block, const Block<W>& then, float* c) {
    static constexpr auto tile = tiles_of<W>(std::make_integer_sequence<int, ROWS>());
    alignas(64) float inputs[ROW_BLOCK * K_BLOCK];
    const int tiles = (n + ROWS - 1) / ROWS;
    const int64_t c_stride = block.panels * PANEL, width = PANEL * sizeof(W);
    for (int64_t k0 = 0; k0 < block.depth; k0 += K_BLOCK) {
        const int64_t length = block.length(k0);
        for (int r = 0; r < n; r++) copy(x[r] + k0, length, inputs + r * K_BLOCK);
        const W* piece = block.piece(k0);
        const W* next = k0 + length < block.depth ? block.piece(k0 + length) : then.piece(0);
        for (int t = 0; t < tiles; t++) {
            // Tiles of equal height, since a tile of one row costs nearly as much as one of four.
            const int begin = n * t / tiles, rows = n * (t + 1) / tiles - begin;
            const int64_t share = (width + tiles - 1) / tiles;
            Ahead ahead{reinterpret_cast<const char*>(next) + t * block.panels * length * share, share};
            if (rows <= FEW_ROWS) ahead = {reinterpret_cast<const char*>(piece) + AHEAD, width};
            tile[rows - 1](inputs + begin * K_BLOCK, length, piece, block.panels, ahead, c + begin * c_stride, c_stride,
                           k0 == 0);
        }
    }
}

// The same of codes: panel by panel, each expanded once for all rows.
void product(const float* const* x, int n, const Block<uint8_t>& block, const Block<uint8_t>&, float* c) {
    static constexpr auto tile = tiles_of<float>(std::make_integer_sequence<int, ROWS>());
    alignas(64) float inputs[ROW_BLOCK * K_BLOCK], room[K_BLOCK * PANEL];
    const int tiles = (n + ROWS - 1) / ROWS;
    const int64_t c_stride = block.panels * PANEL;
    for (int64_t k0 = 0; k0 < block.depth; k0 += K_BLOCK) {
        const int64_t length = block.length(k0);
        for (int r = 0; r < n; r++) copy(x[r] + k0, length, inputs + r * K_BLOCK);
        for (int p = 0; p < block.panels; p++) {
            block.expand(p, k0, room);
            const Ahead nothing{reinterpret_cast<const char*>(room), 0};
            for (int t = 0; t < tiles; t++) {
                const int begin = n * t / tiles, rows = n * (t + 1) / tiles - begin;
                tile[rows - 1](inputs + begin * K_BLOCK, length, room, 1, nothing, c + begin * c_stride + p * PANEL,
                               c_stride, k0 == 0);
            }
        }
    }
}

int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Columns of a block: wide ones reuse an input more often, but every thread should find several.
int block_panels(int64_t panels, int64_t others, int threads, int unit) {
    int block = PANEL_BLOCK;
    while (block > 2 * unit && others * (panels / block) < 4 * threads) block /= 2;
    return block;
}

// Calls with (first slot, how many) for each block of an expert's rows: blocks of equal height.
template <typename Call>
void row_blocks(const Sorted& sorted, int64_t expert, Call call) {
    const int64_t begin = sorted.begins[expert], n = sorted.begins[expert + 1] - begin;
    const int64_t blocks = (n + ROW_BLOCK - 1) / ROW_BLOCK;
    for (int64_t b = 0; b < blocks; b++) call(begin + n * b / blocks, n * (b + 1) / blocks - n * b / blocks);
}

// The block of columns of one expert's first, or second, product.
template <typename W>
Block<W> up_columns(const Layer& layer, int64_t expert, int64_t first, int panels) {
    const int64_t all = (layer.gated ? 2 : 1) * panels_of(layer.inner);
    if constexpr (std::is_same_v<W, uint8_t>)
        return {layer.w13, layer.hidden, all, first, panels, &layer.scales13, layer.table, layer.bits, expert * all};
    else
        return {static_cast<const W*>(layer.w13) + expert * all * layer.hidden * PANEL, layer.hidden, all, first, panels};
}
template <typename W>
Block<W> down_columns(const Layer& layer, int64_t expert, int64_t first, int panels) {
    const int64_t all = panels_of(layer.hidden);
    if constexpr (std::is_same_v<W, uint8_t>)
        return {layer.w2, layer.inner, all, first, panels, &layer.scales2, layer.table, layer.bits, expert * all};
    else
        return {static_cast<const W*>(layer.w2) + expert * all * layer.inner * PANEL, layer.inner, all, first, panels};
}

// One block of columns of an expert's first product, for all of its rows: inner [slot, I].
template <typename W, int A>
void up_block(const Layer& layer, const Sorted& sorted, int64_t expert, const Block<W>& block, const Block<W>& then,
              const float* x, float* inner) {
    alignas(64) float c[ROW_BLOCK * PANEL_BLOCK * PANEL];
    const float* rows[ROW_BLOCK];
    const int unit = layer.gated ? 2 : 1, panels = block.panels;
    const float* bias = layer.b13 ? layer.b13 + (expert * block.all + block.first) * PANEL : nullptr;
    const bool limited = layer.limit < std::numeric_limits<float>::infinity();
    const V limit = broadcast(layer.limit);
    row_blocks(sorted, expert, [&](int64_t begin, int n) {
        for (int r = 0; r < n; r++) rows[r] = x + sorted.slots[begin + r] / layer.top_k * layer.hidden;
        product(rows, n, block, begin + n < sorted.begins[expert + 1] ? block : then, c);
        for (int r = 0; r < n; r++) {
            const float* sums = c + r * panels * PANEL;
            for (int p = 0; p < panels; p += unit) {
                const int64_t column = (block.first + p) / unit * PANEL;
                float* out = inner + (begin + r) * layer.inner + column;
                for (int j = 0; j < 2; j++) {
                    V gate = load(sums + p * PANEL + j * LANES), result;
                    if (bias) gate += load(bias + p * PANEL + j * LANES);
                    if (layer.gated) {
                        V up = load(sums + (p + 1) * PANEL + j * LANES);
                        if (bias) up += load(bias + (p + 1) * PANEL + j * LANES);
                        if (limited) {
                            gate = gate > limit ? limit : gate;
                            up = up > limit ? limit : up < -limit ? -limit : up;
                        }
                        result = activate<A>(gate, layer.alpha) * (up + layer.beta);
                    } else {
                        result = activate<A>(gate, layer.alpha);
                    }
                    const int64_t room = layer.inner - column - j * LANES;
                    if (room >= LANES)
                        store(out + j * LANES, result);
                    else if (room > 0)
                        std::memcpy(out + j * LANES, &result, room * sizeof(float));
                }
            }
        }
    });
}

// A block of columns of the output: the second product of every expert, weighted and summed, or [slot, H] as it is.
template <typename W>
void down_block(const Layer& layer, const Sorted& sorted, int64_t panel, int panels, const float* x,
                const float* inner, const float* weights, int64_t tokens, float* out) {
    alignas(64) float c[ROW_BLOCK * PANEL_BLOCK * PANEL];
    const float* rows[ROW_BLOCK];
    const int64_t column = panel * PANEL;
    const int64_t end = layer.hidden < column + panels * PANEL ? layer.hidden : column + panels * PANEL;
    const int64_t width = end - column;
    if (layer.reduce)
        for (int64_t t = 0; t < tokens; t++) std::memset(out + t * layer.hidden + column, 0, width * sizeof(float));
    for (size_t i = 0; i < sorted.active.size(); i++) {
        const int64_t expert = sorted.active[i];
        const Block<W> block = down_columns<W>(layer, expert, panel, panels);
        const int64_t next = sorted.active[i + 1 < sorted.active.size() ? i + 1 : i];
        const Block<W> then = down_columns<W>(layer, next, panel, panels);
        const float* bias = layer.b2 ? layer.b2 + (expert * block.all + panel) * PANEL : nullptr;
        row_blocks(sorted, expert, [&](int64_t begin, int n) {
            for (int r = 0; r < n; r++) rows[r] = inner + (begin + r) * layer.inner;
            product(rows, n, block, begin + n < sorted.begins[expert + 1] ? block : then, c);
            for (int r = 0; r < n; r++) {
                const int64_t slot = sorted.slots[begin + r];
                float* sums = c + r * panels * PANEL;
                if (bias)
                    for (int64_t i = 0; i < width; i++) sums[i] += bias[i];
                if (layer.reduce) {
                    float* to = out + slot / layer.top_k * layer.hidden + column;
                    const float weight = weights[slot];
                    for (int64_t i = 0; i < width; i++) to[i] += weight * sums[i];
                } else {
                    std::memcpy(out + slot * layer.hidden + column, sums, width * sizeof(float));
                }
            }
        });
    }
    for (int64_t slot : sorted.zeros) {
        const float* from = x + slot / layer.top_k * layer.hidden + column;
        float* to = out + (layer.reduce ? slot / layer.top_k : slot) * layer.hidden + column;
        const float weight = layer.reduce ? weights[slot] : 1.0f;
        for (int64_t i = 0; i < width; i++) to[i] += weight * from[i];
    }
    if (layer.reduce && layer.scale != 1.0f)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < width; i++) out[t * layer.hidden + column + i] *= layer.scale;
}

template <typename W>
using UpBlock = void (*)(const Layer&, const Sorted&, int64_t, const Block<W>&, const Block<W>&, const float*, float*);

template <typename W>
UpBlock<W> up_block_of(int activation) {
    switch (activation) {
        case SILU: return up_block<W, SILU>;
        case GELU: return up_block<W, GELU>;
        case GELU_TANH: return up_block<W, GELU_TANH>;
        case RELU: return up_block<W, RELU>;
        case RELU2: return up_block<W, RELU2>;
        default: return up_block<W, IDENTITY>;
    }
}

template <typename W>
void run(const Layer& layer, const Sorted& sorted, const float* x, const float* weights, int64_t tokens, float* inner,
         float* out, int phases, int threads) {
    const UpBlock<W> up = up_block_of<W>(layer.activation);
    const int unit = layer.gated ? 2 : 1;
    const int64_t active = sorted.active.size();
    const int64_t up_panels = unit * panels_of(layer.inner), down_panels = panels_of(layer.hidden);
    const int up_step = block_panels(up_panels, active, threads, unit);
    const int down_step = block_panels(down_panels, 1, threads, 1);
    const int64_t up_blocks = (up_panels + up_step - 1) / up_step;
    const int64_t up_items = phases & UP ? active * up_blocks : 0;
    const int64_t down_items = phases & DOWN ? (down_panels + down_step - 1) / down_step : 0;
    std::atomic<int64_t> next_up{0}, next_down{0};
    const auto columns = [&](int64_t item) {
        const int64_t panel = item % up_blocks * up_step, left = up_panels - panel;
        return up_columns<W>(layer, sorted.active[item / up_blocks], panel, left < up_step ? left : up_step);
    };
    on_threads(threads, [&] {
        for (int64_t i; (i = next_up.fetch_add(1)) < up_items;) {
            // What this thread takes next is not known, but the threads take turns.
            const Block<W> block = columns(i), then = columns(i + threads < up_items ? i + threads : i);
            up(layer, sorted, sorted.active[i / up_blocks], block, then, x, inner);
        }
        wait_for_all(threads);
        for (int64_t i; (i = next_down.fetch_add(1)) < down_items;) {
            const int64_t panel = i * down_step, left = down_panels - panel;
            down_block<W>(layer, sorted, panel, left < down_step ? left : down_step, x, inner, weights, tokens, out);
        }
    });
}

template <typename W>
void pack(const Pack& p, int threads) {
    const W* source = static_cast<const W*>(p.source);
#pragma omp parallel for num_threads(threads)
    for (int64_t place = p.first_panel; place < p.panels; place += p.panel_step) {
        const int64_t panel = place / p.panel_step;
        const W* columns[PANEL];
        int lane[PANEL];
        for (int i = 0; i < PANEL; i++) {
            const int64_t row = panel * PANEL + i;
            columns[i] = row < p.rows ? source + (p.first_row + row * p.row_step) * p.row_stride : nullptr;
            lane[i] = sizeof(W) == 2 ? i % LANES * 2 + i / LANES : i;
        }
        for (int64_t k0 = 0; k0 < p.depth; k0 += K_BLOCK) {
            const int64_t end = p.depth - k0 < K_BLOCK ? p.depth : k0 + K_BLOCK;
            W* to = static_cast<W*>(p.packed) + (k0 * p.panels + place * (end - k0)) * PANEL;
            for (int64_t k = k0; k < end; k++, to += PANEL)
                for (int i = 0; i < PANEL; i++) to[lane[i]] = columns[i] ? columns[i][k] : W(0);
        }
    }
}

}  // namespace panels
}  // namespace
