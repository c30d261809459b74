// What the callers hand over, and the tokens sorted by expert.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

extern "C" {

// Scales, and zero points or null, of a matrix of codes: [experts][panels][groups][columns of a panel].
struct Scales {
    const float *scales, *zeros;
    int64_t group, groups;  // inputs that share a scale
};

// What stays the same from call to call. kernel.py has the same fields in the same order.
struct Layer {
    int64_t hidden, inner, experts, top_k;  // inner: I; of w13's rows where the activation is the caller's
    int64_t zero_begin, zero_end;           // ids of the experts that hand the token back
    const void *w13, *w2;                   // packed, one expert after the other
    const float *b13, *b2;                  // in the order of the packed columns, filled up with zeros; or null
    int32_t bfloat16, tiles, gated, activation, reduce;  // tiles: packed for tiles.h, and x is bfloat16
    float alpha, beta, limit, scale;        // no limit: inf
    int32_t bits;                           // of a weight where they are codes (codes.h), else 0
    Scales scales13, scales2;
    const float* table;                     // 16 numbers, of codes of 4 bits
};

struct Pack {
    const void* source;                             // element [row, k] at row * row_stride + k
    int64_t row_stride, first_row, row_step, rows;  // which rows become columns
    int64_t depth;
    int64_t first_panel, panel_step, panels;        // where their panels go, and how many there are in all
    void* packed;
    int32_t bytes, tiles;                           // of an element: 4, 2, or 1 for codes; packed for tiles.h
};

}  // extern "C"

namespace {

constexpr int LINE = 64;  // bytes that the cache holds together

enum Phase { UP = 1, DOWN = 2, ROUND = 4 };  // ROUND: sums of tiles go out in bfloat16

// Slots (places in topk_ids) sorted by expert; of one expert in their order.
struct Sorted {
    std::vector<int64_t> begins, slots, zeros;  // begins [E + 1]
    std::vector<int64_t> active;                // experts that have slots

    Sorted(const Layer& layer, const int32_t* ids, int64_t count) : begins(layer.experts + 1, 0) {
        for (int64_t s = 0; s < count; s++) {
            if (ids[s] >= 0 && ids[s] < layer.experts)
                begins[ids[s] + 1]++;
            else if (ids[s] >= layer.zero_begin && ids[s] < layer.zero_end)
                zeros.push_back(s);
        }
        for (int64_t e = 0; e < layer.experts; e++) {
            if (begins[e + 1]) active.push_back(e);
            begins[e + 1] += begins[e];
        }
        slots.resize(begins[layer.experts]);
        std::vector<int64_t> next(begins.begin(), begins.end() - 1);
        for (int64_t s = 0; s < count; s++)
            if (ids[s] >= 0 && ids[s] < layer.experts) slots[next[ids[s]]++] = s;
    }
};

// Without OpenMP where there is one thread: its code would be cold in a call of one token.
template <typename Work>
void on_threads(int threads, const Work& work) {
    if (threads == 1) return work();
#pragma omp parallel num_threads(threads)
    work();
}
inline void wait_for_all(int threads) {
    if (threads > 1) {
#pragma omp barrier
    }
}

// Memory that begins with a cache line: a row of a tile in two lines would take twice as long to load.
template <typename E>
struct Scratch {
    std::unique_ptr<char[]> memory;
    E* begin;

    explicit Scratch(int64_t count) : memory(new char[count * sizeof(E) + LINE]) {
        begin = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory.get()) + LINE - 1) / LINE * LINE);
    }
};

}  // namespace
