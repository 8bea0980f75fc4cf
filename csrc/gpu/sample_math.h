// The arithmetic of the sampler's specification, bit for bit, for CUDA and SYCL.
//
// The specification is batchinfer/ops/reference_sampler.py: float32, every product and sum rounded by itself.
// Probabilities are integers in units of 2**-34, so that sums (in shared memory, by atomics) do not depend on an order.
//
// Who includes it has defined BATCHINFER_ON_DEVICE (portable.h) and in namespace exact: mul, add, sub and div, rounded
// to nearest, once, whatever stands around them; bits_of and from_bits of a float; mul_high of 32-bit words.
#pragma once

#include <cmath>
#include <cstdint>

namespace batchinfer::gpu {
namespace exact {

// e**x for x <= 0; 0 below -87.
BATCHINFER_ON_DEVICE float exp(float x) {
    const float inside = fmaxf(x, -88.f);
    const float n = sub(add(mul(inside, 1.44269504f), 12582912.f), 12582912.f);
    const float r = add(mul(n, 2.12194440e-4f), add(mul(n, -0.693359375f), inside));
    float p = 0.00138144672f;
    p = add(mul(p, r), 0.00836878084f);
    p = add(mul(p, r), 0.0416683927f);
    p = add(mul(p, r), 0.166665196f);
    p = add(mul(p, r), 0.49999994f);
    const float y = add(add(mul(p, mul(r, r)), r), 1.f);
    return x < -87.f ? 0.f : mul(y, from_bits((static_cast<int>(n) + 127) << 23));
}

// Natural logarithm of a positive normal float.
BATCHINFER_ON_DEVICE float log(float x) {
    const int bits = bits_of(x), k = (bits - 0x3F3504F3) >> 23;
    const float f = sub(from_bits(bits - k * (1 << 23)), 1.f);
    const float s = div(f, add(2.f, f)), z = mul(s, s);
    const float p = add(mul(add(mul(0.298851877f, z), 0.399770796f), z), 0.666667819f);
    const float n = static_cast<float>(k);
    return add(mul(n, 0.693359375f), add(add(s, s), add(mul(s, mul(z, p)), mul(n, -2.12194440e-4f))));
}

// e**x in units of 2**-34, x <= 0.
BATCHINFER_ON_DEVICE uint64_t mass(float x) {
    const float grid = 4.8828125e-4f;
    return static_cast<uint64_t>(mul(sub(add(exp(x), grid), grid), 17179869184.f));
}

// v = 1 - u of a random word, and the Gumbel noise -log(-log(u)).
BATCHINFER_ON_DEVICE float uniform(uint32_t word) {
    return fminf(mul(add(static_cast<float>(word), 0.5f), 2.3283064365386963e-10f), 1.f - 5.9604644775390625e-8f);
}
BATCHINFER_ON_DEVICE float gumbel(float v) {
    const float rest = sub(1.f, v), lost = sub(sub(1.f, rest), v);
    return sub(0.f, log(sub(0.f, add(log(rest), div(lost, rest)))));
}

}  // namespace exact

struct Words {
    uint32_t x, y, z, w;

    BATCHINFER_ON_DEVICE uint32_t word(int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};

// Philox4x32-10 (Salmon et al. 2011). The four words of counter (block, position, 0, 0).
BATCHINFER_ON_DEVICE Words philox(uint32_t block, uint32_t position, uint64_t seed) {
    uint32_t c0 = block, c1 = position, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = exact::mul_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = exact::mul_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// Larger is more likely; among equals the smaller id. NaN counts as -inf.
BATCHINFER_ON_DEVICE uint64_t ranked(float x, int id) {
    x = x != x ? -INFINITY : x + 0.f;  // -0 equals +0
    const uint32_t bits = exact::bits_of(x);
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(id);
}
BATCHINFER_ON_DEVICE int id_of(uint64_t rank) {
    return ~static_cast<uint32_t>(rank);
}

BATCHINFER_ON_DEVICE uint64_t larger(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

// One row's scaled logits x <= 0, as the filters see them; the most likely token has 0.
struct Row {
    const float* logits;
    int vocab;
    float highest, inverse;  // of the temperature

    BATCHINFER_ON_DEVICE float x(int i) const {
        const float logit = logits[i];
        return logit != logit ? -INFINITY : exact::mul(exact::sub(logit, highest), inverse);
    }
    // Grows as x falls; -inf has 0x7f800000.
    BATCHINFER_ON_DEVICE static uint32_t key(float x) { return exact::bits_of(fabsf(x)); }
};

inline constexpr uint32_t kLastKey = 0x7f800000u;
inline constexpr float kNoMass = -25.f;  // e**x rounds to 0 in units of 2**-34 below

}  // namespace batchinfer::gpu
