// A small vector vocabulary for the ONE instruction set that this translation unit is compiled for.
//
// Everything lives in namespace batchinfer::BATCHINFER_ISA (avx2, avx512, ...), so the linker never
// merges an inline function compiled for AVX-512 with its AVX2 twin (see isa.h). Built on the vector extension of GCC
// and Clang, with intrinsics where the extension has no word (fma, max, masks) or compiles badly.
#pragma once

#ifndef BATCHINFER_ISA
#error "vec.h is for csrc/cpu/kernels only, which CMake compiles once per instruction set"
#endif

#include <stdint.h>

#include "batchinfer/bf16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BATCHINFER_VEC_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define BATCHINFER_VEC_AVX2 1
#elif defined(__aarch64__)
#define BATCHINFER_VEC_NEON 1
#endif

namespace batchinfer::BATCHINFER_ISA {

#if BATCHINFER_VEC_AVX512
#define BATCHINFER_VEC_WIDTH 16
#elif BATCHINFER_VEC_AVX2
#define BATCHINFER_VEC_WIDTH 8
#else
#define BATCHINFER_VEC_WIDTH 4  // NEON, and SSE2, which every x86-64 has
#endif

typedef float Floats __attribute__((vector_size(4 * BATCHINFER_VEC_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * BATCHINFER_VEC_WIDTH)));  // also masks: -1 true, 0 false
typedef uint32_t Words __attribute__((vector_size(4 * BATCHINFER_VEC_WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * BATCHINFER_VEC_WIDTH)));

// Bits of one vector type as another one of the same size.
template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

// 0, 1, ..., W-1.
inline Ints lane_index() {
    Ints lanes;
    for (int i = 0; i < BATCHINFER_VEC_WIDTH; ++i)
        lanes[i] = i;
    return lanes;
}

// In the place of a count: all W lanes.
struct All {};

// W floats. Pointers need no alignment. A `count` touches only the first count (0..W) elements in memory.
struct Vec {
    static constexpr int W = BATCHINFER_VEC_WIDTH;
    Floats v;

    static Vec broadcast(float x) { return {x - Floats{}}; }
    static Vec zero() { return {Floats{}}; }

    static Vec load(const float* p) {
        Vec r;
        __builtin_memcpy(&r.v, p, sizeof(r.v));
        return r;
    }

    static Vec load(const bf16* p) {
        Halves h;
        __builtin_memcpy(&h, p, sizeof(h));
        return widen(h);
    }

    // Lanes from `count` on hold `fill`.
    static Vec load(const float* p, int count, float fill = 0.0f) {
#if BATCHINFER_VEC_AVX512
        return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes_below(count), p)};
#elif BATCHINFER_VEC_AVX2
        const __m256i mask = (__m256i)(lane_index() < count);
        return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), (__m256)mask)};
#else
        Vec r = broadcast(fill);
        for (int i = 0; i < count; ++i)
            r.v[i] = p[i];
        return r;
#endif
    }

    // Lanes from `count` on hold 0.
    static Vec load(const bf16* p, int count) {
#if BATCHINFER_VEC_AVX512
        return widen((Halves)_mm256_maskz_loadu_epi16(lanes_below(count), p));
#else
        Halves h{};
        for (int i = 0; i < count; ++i)
            h[i] = p[i].bits;
        return widen(h);
#endif
    }

    static Vec load(const float* p, All) { return load(p); }
    static Vec load(const bf16* p, All) { return load(p); }

    void store(float* p) const { __builtin_memcpy(p, &v, sizeof(v)); }

    void store(float* p, int count) const {
#if BATCHINFER_VEC_AVX512
        _mm512_mask_storeu_ps(p, lanes_below(count), v);
#elif BATCHINFER_VEC_AVX2
        _mm256_maskstore_ps(p, (__m256i)(lane_index() < count), v);
#else
        for (int i = 0; i < count; ++i)
            p[i] = v[i];
#endif
    }

    // Rounds to nearest even; a NaN stays one.
    void store(bf16* p) const {
        const Halves h = narrow();
        __builtin_memcpy(p, &h, sizeof(h));
    }

    void store(bf16* p, int count) const {
        const Halves h = narrow();
#if BATCHINFER_VEC_AVX512
        _mm256_mask_storeu_epi16(p, lanes_below(count), (__m256i)h);
#else
        for (int i = 0; i < count; ++i)
            p[i].bits = h[i];
#endif
    }

    void store(float* p, All) const { store(p); }
    void store(bf16* p, All) const { store(p); }

  private:
#if BATCHINFER_VEC_AVX512
    static __mmask16 lanes_below(int count) { return static_cast<__mmask16>((1u << count) - 1); }
#endif

    static Vec widen(Halves h) { return {bits_as<Floats>(__builtin_convertvector(h, Words) << 16)}; }

    Halves narrow() const {
#if defined(__AVX512BF16__)
        return (Halves)_mm512_cvtneps_pbh(v);  // as below, but for subnormals, which become 0
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
        return bits_as<Halves>(vcvt_bf16_f32((float32x4_t)v));
#else
        const Words x = bits_as<Words>(v);
        const Words rounded = x + 0x7fff + (x >> 16 & 1);
        const Words quiet_nan = x | 0x400000;  // truncation alone could make an infinity of a NaN
        return __builtin_convertvector(bits_as<Words>(v == v ? rounded : quiet_nan) >> 16, Halves);
#endif
    }
};

inline Vec operator+(Vec a, Vec b) {
    return {a.v + b.v};
}
inline Vec operator-(Vec a, Vec b) {
    return {a.v - b.v};
}
inline Vec operator*(Vec a, Vec b) {
    return {a.v * b.v};
}
inline Vec operator/(Vec a, Vec b) {
    return {a.v / b.v};
}
inline Vec select(Ints mask, Vec a, Vec b) {
    return {mask ? a.v : b.v};
}

// a * b + c, rounded once where the instruction set has it (everywhere but the portable x86 build).
inline Vec fma(Vec a, Vec b, Vec c) {
#if BATCHINFER_VEC_AVX512
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif BATCHINFER_VEC_AVX2
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
#elif BATCHINFER_VEC_NEON
    return {(Floats)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
    return {a.v * b.v + c.v};
#endif
}

// The larger; b where a is NaN. So max(x, accumulator) skips the NaNs among x.
inline Vec max(Vec a, Vec b) {
#if BATCHINFER_VEC_AVX512
    return {_mm512_max_ps(a.v, b.v)};
#elif BATCHINFER_VEC_AVX2
    return {_mm256_max_ps(a.v, b.v)};
#else
    return select(a.v > b.v, a, b);
#endif
}

#if BATCHINFER_VEC_AVX2 || BATCHINFER_VEC_AVX512
inline float reduce_sum(__m128 x) {
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(__m128 x) {
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_sum(__m256 x) {
    return reduce_sum(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
inline float reduce_max(__m256 x) {
    return reduce_max(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
#endif

// Sum and maximum over the lanes, in a fixed order (the same for every call). reduce_max: no NaN.
#if BATCHINFER_VEC_AVX512
inline float reduce_sum(Vec x) {
    return reduce_sum(_mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)));
}
inline float reduce_max(Vec x) {
    return reduce_max(_mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)));
}
#elif BATCHINFER_VEC_AVX2
inline float reduce_sum(Vec x) {
    return reduce_sum(static_cast<__m256>(x.v));
}
inline float reduce_max(Vec x) {
    return reduce_max(static_cast<__m256>(x.v));
}
#else
inline float reduce_sum(Vec x) {
    return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
}
inline float reduce_max(Vec x) {
    const float a = x.v[0] > x.v[1] ? x.v[0] : x.v[1], b = x.v[2] > x.v[3] ? x.v[2] : x.v[3];
    return a > b ? a : b;
}
#endif

// How a product and a sum are rounded. Fused: once, fast. Separate: each, which any IEEE machine, and numpy, repeats
// bit for bit; the sampler needs that.
struct Fused {
    static Vec mul_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
struct Separate {
    static Vec mul_add(Vec a, Vec b, Vec c) { return a * b + c; }
};

// e^x within 2 ulp; exactly 0 below -87 (no subnormals), +inf above 88.37; NaN stays.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 and ln 2 in two parts (Cody & Waite 1980, "Software Manual for the Elementary
// Functions"); e^r = 1 + r + r^2 p(r), p minimax of degree 4 (relative error 3e-9), fitted for this file.
template <class Rounding = Fused>
inline Vec exp(Vec x) {
    constexpr auto c = Vec::broadcast;
    constexpr auto mul_add = Rounding::mul_add;
    const Vec shifter = c(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits
    const Vec shifted = mul_add(x, c(1.44269504f), shifter);
    const Vec n = shifted - shifter;
    const Vec r = mul_add(n, c(2.12194440e-4f), mul_add(n, c(-0.693359375f), x));
    Vec p = c(0.00138144672f);
    p = mul_add(p, r, c(0.00836878084f));
    p = mul_add(p, r, c(0.0416683927f));
    p = mul_add(p, r, c(0.166665196f));
    p = mul_add(p, r, c(0.49999994f));
    const Vec e = mul_add(p, r * r, r) + c(1.0f);
    const Vec power = {bits_as<Floats>((bits_as<Words>(shifted.v) + 127) << 23)};  // 2^n
    const Vec y = select(x.v < -87.0f, Vec::zero(), e * power);
    return select(x.v > 88.37f, c(__builtin_inff()), y);
}

inline Vec silu(Vec x) {
    return x / (Vec::broadcast(1.0f) + exp(Vec::zero() - x));
}

// ln x within 2 ulp for positive normal x.
//
// x = 2^k m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s) = 2 s + s z p(z) with s = (m - 1) / (m + 1) and z = s^2,
// p minimax of degree 2 (error 8e-10), fitted for this file. Products and sums are rounded separately.
inline Vec log(Vec x) {
    constexpr auto c = Vec::broadcast;
    const Ints bits = bits_as<Ints>(x.v);
    const Ints k = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: the bits of sqrt(1/2)
    const Vec f = Vec{bits_as<Floats>(bits - (k << 23))} - c(1.0f);
    const Vec s = f / (c(2.0f) + f);
    const Vec z = s * s;
    const Vec p = (c(0.298851877f) * z + c(0.399770796f)) * z + c(0.666667819f);
    const Vec n = {__builtin_convertvector(k, Floats)};
    return n * c(0.693359375f) + ((s + s) + (s * (z * p) + n * c(-2.12194440e-4f)));
}

// tanh x within 4 ulp.
//
// Up to 5/8, x + x z p(z) with z = x^2 and p minimax of degree 4 (relative error 5e-9), fitted for this file; beyond,
// where nothing cancels, 1 - 2 / (e^2|x| + 1).
inline Vec tanh(Vec x) {
    constexpr auto c = Vec::broadcast;
    const Vec z = x * x;
    Vec p = c(-0.00570494682f);
    p = fma(p, z, c(0.0206390526f));
    p = fma(p, z, c(-0.0537397042f));
    p = fma(p, z, c(0.133314416f));
    p = fma(p, z, c(-0.333332807f));
    const Vec small = fma(x * z, p, x), size = max(x, Vec::zero() - x);
    const Vec large = c(1.0f) - c(2.0f) / (exp(size + size) + c(1.0f));
    return select(size.v > 0.625f, select(x.v < 0.0f, Vec::zero() - large, large), small);
}

// Calls f(offset, count) over [0, n) in steps of W; count is All{}, or an int for what is left at the end.
template <class F>
inline void for_vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + Vec::W <= n; i += Vec::W)
        f(i, All{});
    if (i < n) f(i, static_cast<int>(n - i));
}

}  // namespace batchinfer::BATCHINFER_ISA
