// Runs experts.cpp without Python, for sanitizers: layers of many sizes in buffers of exactly their size, ids of every kind,
// each result compared with plain loops.

#include "experts.cpp"

#include <cstdio>
#include <algorithm>
#include <cstdlib>
#include <memory>

namespace {

uint32_t state = 1;
float uniform() {  // -1 .. 1
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) / 2147483648.0f;
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits >> 16;
}
float from_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
void put(float& to, float x) { to = x; }
void put(uint16_t& to, float x) { to = to_bfloat16(x); }
void put(uint8_t& to, float x) { to = static_cast<uint8_t>((x + 1) * 127.9f); }
double get(float x) { return x; }
double get(uint16_t x) { return from_bfloat16(x); }
double get(uint8_t x) { return x; }

// Codes [experts][rows][depth] as numbers: powers of two as scales, so that bfloat16 holds a weight exactly.
constexpr int64_t GROUP = 32;
const float TABLE[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
struct Numbers {
    std::unique_ptr<double[]> values;
    std::unique_ptr<float[]> scales, zeros;  // [experts][panels][groups][columns of a panel]
    int64_t groups;

    Numbers(const uint8_t* codes, int bits, int64_t experts, int64_t rows, int64_t depth, int64_t halves, bool interleaved,
            bool with_zeros, int64_t panels, int64_t width)
        : values(new double[experts * rows * depth]), groups((depth + GROUP - 1) / GROUP) {
        scales.reset(new float[experts * panels * groups * width]());
        zeros.reset(new float[experts * panels * groups * width]());
        for (int64_t e = 0; e < experts; e++)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t half = halves == 1 ? 0 : interleaved ? r % 2 : r / (rows / 2);
                const int64_t column = halves == 1 ? r : interleaved ? r / 2 : r % (rows / 2);
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t panel = column / width * halves + half;
                    const int64_t at = ((e * panels + panel) * groups + g) * width + column % width;
                    scales[at] = 1.0f / (bits == 8 ? 64 : 8) / (1 + (r + g) % 2);
                    zeros[at] = with_zeros ? (r + g) % 3 : 0;
                    for (int64_t k = g * GROUP; k < std::min(depth, (g + 1) * GROUP); k++) {
                        const int64_t i = (e * rows + r) * depth + k;
                        const double number = bits == 8 ? static_cast<int8_t>(codes[i]) : TABLE[codes[i]];
                        values[i] = (number - zeros[at]) * scales[at];
                    }
                }
            }
    }
};

// TILES: packed for the matrix unit, whose rows are bfloat16, also between the products. BITS: of codes, W is uint8_t.
template <typename W, bool TILES = false, int BITS = 0>
bool agrees(int64_t tokens, int64_t k, int64_t hidden, int64_t inner, int64_t experts, bool gated, bool reduce,
            bool interleaved) {
    const int64_t rows = gated ? 2 * inner : inner, slots = tokens * k;
    std::unique_ptr<W[]> w13(new W[experts * rows * hidden]), w2(new W[experts * hidden * inner]);
    for (int64_t i = 0; i < experts * rows * hidden; i++) put(w13[i], uniform());
    for (int64_t i = 0; i < experts * hidden * inner; i++) put(w2[i], uniform());
    if constexpr (BITS == 4) {
        for (int64_t i = 0; i < experts * rows * hidden; i++) w13[i] %= 16;
        for (int64_t i = 0; i < experts * hidden * inner; i++) w2[i] %= 16;
    }
    std::unique_ptr<float[]> x(new float[tokens * hidden]), weights(new float[slots]);
    std::unique_ptr<int32_t[]> ids(new int32_t[slots]);
    for (int64_t i = 0; i < tokens * hidden; i++) x[i] = uniform();
    std::unique_ptr<uint16_t[]> rounded(new uint16_t[tokens * hidden]);
    for (int64_t i = 0; TILES && i < tokens * hidden; i++) x[i] = from_bfloat16(rounded[i] = to_bfloat16(x[i]));
    for (int64_t s = 0; s < slots; s++) {
        weights[s] = uniform();
        ids[s] = static_cast<int64_t>((uniform() + 1) * 0.4999 * (experts + 2)) - 1;  // -1 .. experts
        if (s % 17 == 3) ids[s] = s % 2 ? INT32_MAX : INT32_MIN;
    }
    const int64_t panel = TILES ? 16 : panels::PANEL, step = TILES ? 32 : 1;
    const auto whole = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
    const auto panels_of = [&](int64_t columns) { return whole(columns, TILES ? 32 : panel) / panel; };
    const int64_t up_panels = panels_of(inner) * (gated ? 2 : 1), down_panels = panels_of(hidden);
    const int64_t up_size = up_panels * panel * whole(hidden, step), down_size = down_panels * panel * whole(inner, step);
    std::unique_ptr<W[]> packed13(new W[experts * up_size]), packed2(new W[experts * down_size]);
    for (int64_t e = 0; e < experts; e++) {
        for (int which = 0; which < (gated ? 2 : 1); which++) {
            const int64_t first = interleaved ? which : which * inner, step = interleaved ? 2 : 1;
            const Pack up{&w13[e * rows * hidden], hidden, first, step, inner, hidden, which, gated ? 2 : 1, up_panels,
                          &packed13[e * up_size], sizeof(W), TILES};
            moe_pack(&up, 2);
        }
        const Pack down{&w2[e * hidden * inner], inner, 0, 1, hidden, inner, 0, 1, down_panels, &packed2[e * down_size],
                        sizeof(W), TILES};
        moe_pack(&down, 2);
    }
    std::unique_ptr<uint8_t[]> halves13, halves2;  // two codes a byte
    if (BITS == 4) {
        const auto fold = [](const void* packed, int64_t size) {
            const uint8_t* from = static_cast<const uint8_t*>(packed);
            std::unique_ptr<uint8_t[]> to(new uint8_t[size / 2]);
            for (int64_t run = 0; run < size; run += 2 * LANES)
                for (int64_t i = 0; i < LANES; i++) to[run / 2 + i] = from[run + i] | from[run + LANES + i] << 4;
            return to;
        };
        halves13 = fold(packed13.get(), experts * up_size), halves2 = fold(packed2.get(), experts * down_size);
    }
    const void *given13 = packed13.get(), *given2 = packed2.get();
    if (BITS == 4) given13 = halves13.get(), given2 = halves2.get();
    std::unique_ptr<Numbers> numbers13, numbers2;
    if constexpr (BITS != 0) {
        numbers13.reset(new Numbers(w13.get(), BITS, experts, rows, hidden, gated ? 2 : 1, interleaved, reduce,
                                    up_panels, panel));
        numbers2.reset(new Numbers(w2.get(), BITS, experts, hidden, inner, 1, false, reduce, down_panels, panel));
    }
    const auto weight13 = [&](int64_t i) { return BITS ? numbers13->values[i] : get(w13[i]); };
    const auto weight2 = [&](int64_t i) { return BITS ? numbers2->values[i] : get(w2[i]); };
    Layer layer{hidden, inner, experts, k, experts, experts + 1, given13, given2, nullptr, nullptr,
                sizeof(W) == 2, TILES, gated, SILU, reduce, 1.0f, 0.0f, 0.9f, 2.0f};
    if (BITS) {
        const bool zeros = reduce;
        layer.bits = BITS, layer.table = TABLE;
        layer.scales13 = {numbers13->scales.get(), zeros ? numbers13->zeros.get() : nullptr, GROUP, numbers13->groups};
        layer.scales2 = {numbers2->scales.get(), zeros ? numbers2->zeros.get() : nullptr, GROUP, numbers2->groups};
    }
    std::unique_ptr<float[]> between(new float[slots * inner]);
    std::unique_ptr<float[]> out(new float[(reduce ? tokens : slots) * hidden]());
    const void* given = TILES ? static_cast<void*>(rounded.get()) : x.get();
    float* room = TILES || interleaved ? nullptr : between.get();
    const int64_t used = moe_run(&layer, given, ids.get(), weights.get(), tokens, room, out.get(), UP | DOWN, 2);
    bool same = true;  // rounded by the kernel, or here
    if (TILES && reduce) {
        std::unique_ptr<uint16_t[]> sums(new uint16_t[tokens * hidden]);
        moe_run(&layer, given, ids.get(), weights.get(), tokens, room, sums.get(), UP | DOWN | ROUND, 1);
        for (int64_t i = 0; i < tokens * hidden; i++)
            same &= std::fabs(from_bfloat16(sums[i]) - out[i]) <= std::fabs(out[i]) / 256 + 1e-37f;
    }
    int64_t held = 0;
    double difference = 0, size = 0;
    std::vector<double> h(inner), sum(hidden), scale(hidden);
    for (int64_t t = 0; t < tokens; t++) {
        std::fill(sum.begin(), sum.end(), 0.0);
        std::fill(scale.begin(), scale.end(), 0.0);
        for (int64_t s = t * k; s < (t + 1) * k; s++) {
            std::vector<double> y(hidden, 0.0), terms(hidden, 0.0);  // sizes of what is added, and may cancel
            if (ids[s] >= 0 && ids[s] < experts) {
                held++;
                for (int64_t i = 0; i < inner; i++) {
                    double gate = 0, up = 0;
                    const int64_t g = interleaved ? 2 * i : i, u = interleaved ? 2 * i + 1 : inner + i;
                    for (int64_t c = 0; c < hidden; c++) {
                        gate += x[t * hidden + c] * weight13((ids[s] * rows + g) * hidden + c);
                        if (gated) up += x[t * hidden + c] * weight13((ids[s] * rows + u) * hidden + c);
                    }
                    if (gated) gate = std::fmin(gate, 0.9), up = std::fmax(std::fmin(up, 0.9), -0.9);
                    h[i] = gate / (1 + std::exp(-gate)) * (gated ? up : 1);
                }
                for (int64_t c = 0; c < hidden; c++)
                    for (int64_t i = 0; i < inner; i++) {
                        const double term = h[i] * weight2((ids[s] * hidden + c) * inner + i);
                        y[c] += term, terms[c] += std::fabs(term);
                    }
            } else if (ids[s] == experts) {
                for (int64_t c = 0; c < hidden; c++) y[c] = x[t * hidden + c], terms[c] = std::fabs(y[c]);
            }
            for (int64_t c = 0; c < hidden; c++) {
                sum[c] += 2.0 * weights[s] * y[c];
                scale[c] += std::fabs(2.0 * weights[s]) * terms[c];
                if (!reduce) difference += std::pow(out[s * hidden + c] - y[c], 2), size += terms[c] * terms[c];
            }
        }
        for (int64_t c = 0; reduce && c < hidden; c++)
            difference += std::pow(out[t * hidden + c] - sum[c], 2), size += scale[c] * scale[c];
    }
    // Tiles round what lies between the products: by 2^-8 of it at most.
    const bool ok = same && used == held && difference <= (TILES ? 1.6e-5 : 1e-10) * size;
    if (!ok)
        std::printf("tokens %ld, k %ld, hidden %ld, inner %ld, gated %d, reduce %d: rounded %d, used %ld of %ld, error %g\n",
                    (long)tokens, (long)k, (long)hidden, (long)inner, gated, reduce, same, (long)used, (long)held,
                    std::sqrt(difference / size));
    return ok;
}

}  // namespace

int main() {
    int layers = 0;
    for (int64_t tokens : {0, 1, 5, 13, 100})
        for (int64_t hidden : {1, 64, 270})
            for (int64_t inner : {1, 45})
                for (int variant = 0; variant < 4; variant++, layers += 4) {
                    const bool gated = variant != 3, reduce = variant != 2, interleaved = variant == 1;
                    const int64_t k = tokens < 100 ? 2 : 1, experts = tokens < 100 ? 4 : 1;
                    if (!agrees<float>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!agrees<uint16_t>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!agrees<uint8_t, false, 8>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!agrees<uint8_t, false, 4>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!moe_tiles()) continue;
                    if (!agrees<uint16_t, true>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!agrees<uint8_t, true, 8>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    if (!agrees<uint8_t, true, 4>(tokens, k, hidden, inner, experts, gated, reduce, interleaved)) return 1;
                    layers += 3;
                }
    std::printf("%d layers agree\n", layers);
}
