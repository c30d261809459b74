// Vectors of float32, the compiler's own, as wide as the flags allow; and the activations on them.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef V UnalignedV __attribute__((aligned(4), may_alias));
typedef U UnalignedU __attribute__((aligned(2), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }
inline V broadcast(float x) { return x - V{}; }

// Not memcpy, for which compilers write a string instruction: it costs more than a row of a block.
inline void copy(const float* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    for (; i < n; i++) to[i] = from[i];
}

// e^x to 2 units in the last place; 0 below the smallest normal number, inf above the largest, NaN for NaN.
inline V exponential(V x) {
    const V high = broadcast(88.37f), low = broadcast(-87.33f);
    V y = x > high ? high : x;
    y = y < low ? low : y;
    // y = n ln 2 + r. Adding 1.5 * 2^23 leaves n in the lowest bits.
    const V shifted = y * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = y - n * 0.693359375f - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const V power = (V)(((U)shifted + 127u) << 23);
    const V inf = broadcast(std::numeric_limits<float>::infinity());
    V result = p * power;
    result = x > high ? inf : result;
    return x < low ? V{} : result;
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

enum Activation { IDENTITY, SILU, GELU, GELU_TANH, RELU, RELU2 };

template <int A>
inline V activate(V x, float alpha) {
    if (A == SILU) return x * sigmoid(alpha * x);
    if (A == GELU_TANH) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // tanh(z) = 2 sigmoid(2z) - 1
    if (A == GELU) {
        V y;
        for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * std::erfc(-0.70710678f * x[i]);
        return y;
    }
    if (A == RELU || A == RELU2) {
        const V y = x < V{} ? V{} : x;  // NaN stays
        return A == RELU ? y : y * y;
    }
    return x;
}

}  // namespace
