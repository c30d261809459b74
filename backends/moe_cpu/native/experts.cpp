// The routed experts of one MoE layer on a CPU: sort tokens by expert, activation(x w13^T + b13) w2^T + b2, weighted sum.
//
// Shape letters: T tokens, K experts of a token, H hidden size, I intermediate size, E experts. One source serves every
// processor, in one translation unit; build.py chooses the flags. panels.h computes in vectors of float32, tiles.h in
// products of bfloat16.
// In both, results depend on neither the number of threads nor the other tokens of the call.

#include <new>

#include "codes.h"
#include "panels.h"
#if defined(__AVX512BF16__)
#include "tiles.h"
#endif

extern "C" {

int moe_lanes() { return LANES; }

// How many panels of bfloat16 weights lie together in tiles.h, 0 where this process may not pack for it.
int moe_tiles() {
#if defined(__AVX512BF16__)
    static const bool allowed = tiles::allowed();
    return allowed ? tiles::TOGETHER : 0;
#else
    return 0;
#endif
}

// Copy rows of a weight matrix into panels, or tiles.
void moe_pack(const Pack* p, int threads) {
#if defined(__AVX512BF16__)
    if (p->tiles) return p->bytes == 1 ? tiles::pack<uint8_t>(*p, threads) : tiles::pack<uint16_t>(*p, threads);
#endif
    if (p->bytes == 1)
        panels::pack<uint8_t>(*p, threads);
    else if (p->bytes == 2)
        panels::pack<uint16_t>(*p, threads);
    else
        panels::pack<float>(*p, threads);
}

// x [T, H] float32, or bfloat16 where the layer has tiles; ids and weights [T, K]; inner [T * K, I] float32 in the sorted
// order of slots, or null where it need not outlive the call (never used by tiles); out [T, H], or [T * K, H] (zeroed by
// the caller) without reduce. phases: UP fills inner, DOWN reads it; tiles have both, and may ROUND sums. Returns how many
// rows of inner are in use, or -1 where there is no memory.
int64_t moe_run(const Layer* layer, const void* x, const int32_t* ids, const float* weights, int64_t tokens, float* inner,
                void* out, int phases, int threads) {
    try {
        const Sorted sorted(*layer, ids, tokens * layer->top_k);
        const auto run_panels = [&](auto run) {
            const Scratch<float> own(inner ? 0 : sorted.slots.size() * layer->inner);
            run(*layer, sorted, static_cast<const float*>(x), weights, tokens, inner ? inner : own.begin,
                static_cast<float*>(out), phases, threads);
        };
        if (layer->tiles) {
#if defined(__AVX512BF16__)
            tiles::run(*layer, sorted, static_cast<const uint16_t*>(x), weights, tokens, out, phases & ROUND, threads);
#endif
        } else if (layer->bits) {
            run_panels(panels::run<uint8_t>);
        } else if (layer->bfloat16) {
            run_panels(panels::run<uint16_t>);
        } else {
            run_panels(panels::run<float>);
        }
        return sorted.slots.size();
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // extern "C"
