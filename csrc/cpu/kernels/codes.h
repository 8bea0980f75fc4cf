// Values as bytes, rounded to nearest even: signed ones times a scale = largest magnitude / 127, or those of e4m3
// (batchinfer/ops/quantized.py), without a scale.
#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// The largest magnitude among values. Compared as integers, in whose order infinities and NaN come last.
class Largest {
  public:
    void see(Vec v) {
        const Ints size = bits_as<Ints>(v.v) & 0x7fffffff;
        bits_ = size > bits_ ? size : bits_;
    }

    // The scale of the values; NaN if one of them is not finite.
    float scale() const {
        const Ints infinity = 0x7f800000 - Ints{};
        const float largest = reduce_max({bits_as<Floats>(bits_ < infinity ? bits_ : infinity)});
        return largest < __builtin_inff() ? largest / 127.0f : __builtin_nanf("");
    }

  private:
    Ints bits_ = {};
};

inline float inverse_of(float scale) {  // of a subnormal one it could be infinite
    return scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
}

// Values as codes, which are 0 for an inverse of 0; the first `count` are written.
inline Ints encode(Vec v, Vec inverse, int8_t* codes, int count = Vec::W) {
    constexpr float kShifter =
        12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits
    typedef int8_t Bytes __attribute__((vector_size(Vec::W)));
    const Vec shifted = v * inverse + Vec::broadcast(kShifter);
    const Ints code = bits_as<Ints>(shifted.v) - bits_as<Ints>(Vec::broadcast(kShifter).v);
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    __builtin_memcpy(codes, &bytes, count);
    return code;
}

// An element of a cache of e4m3.
struct e4m3 {
    uint8_t bits;
};

// The bytes of a row of a cache of codes: head_width of them; signed ones have their scale behind them.
template <class Code>
inline constexpr int64_t kScaleBytes = __is_same(Code, int8_t) ? sizeof(float) : 0;

inline int count_of(All) {
    return Vec::W;
}
inline int count_of(int count) {
    return count;
}

inline void encode_head(const float* x, int64_t width, int8_t* out) {
    Largest largest;
    for_vectors(width, [&](int64_t i, auto count) { largest.see(Vec::load(x + i, count)); });
    const float scale = largest.scale();
    const Vec inverse = Vec::broadcast(inverse_of(scale));
    for_vectors(width,
                [&](int64_t i, auto count) { encode(Vec::load(x + i, count), inverse, out + i, count_of(count)); });
    __builtin_memcpy(out + width, &scale, sizeof(scale));
}

// What is larger than 448 becomes 448, NaN stays NaN.
inline void encode_head(const float* x, int64_t width, e4m3* out) {
    const Floats units = 16384.0f - Floats{};  // whose last bit is 2^-9, the unit of codes below 2^-6
    typedef uint8_t Bytes __attribute__((vector_size(Vec::W)));
    for_vectors(width, [&](int64_t i, auto count) {
        const Words bits = bits_as<Words>(Vec::load(x + i, count).v), size = bits & 0x7fffffff, zero = {};
        const Words small = bits_as<Words>(bits_as<Floats>(size) + units) - bits_as<Words>(units);
        const Words normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - ((127 - 7) << 3);
        Words code = bits_as<Words>(size < 0x3c800000 ? small : normal);
        code = bits_as<Words>(size < 0x43e00000 ? code : zero + 0x7e);
        code = bits_as<Words>(size > 0x7f800000 ? zero + 0x7f : code) | (bits >> 24 & 0x80);
        const Bytes bytes = __builtin_convertvector(code, Bytes);
        __builtin_memcpy(out + i, &bytes, count_of(count));
    });
}

// W signed bytes as numbers. (GCC 12 takes a vector's conversion apart into single bytes.)
inline Vec widen(const int8_t* codes) {
#if BATCHINFER_VEC_AVX512
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))))};
#elif BATCHINFER_VEC_AVX2
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))))};
#else
    Vec r;
    for (int i = 0; i < Vec::W; ++i)
        r.v[i] = codes[i];
    return r;
#endif
}

// W codes of e4m3 as numbers.
inline Vec widen(const e4m3* codes) {
#if BATCHINFER_VEC_AVX512
    const Ints code = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#elif BATCHINFER_VEC_AVX2
    const Ints code = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
    Ints code;
    for (int i = 0; i < Vec::W; ++i)
        code[i] = codes[i].bits;
#endif
    const Ints size = code & 0x7f, nan = 0x7fc00000 - Ints{};
    const Ints small = bits_as<Ints>(__builtin_convertvector(size, Floats) * 0x1p-9f);
    const Ints large = size < 0x7f ? (size << 20) + ((127 - 7) << 23) : nan;
    return {bits_as<Floats>((size < 8 ? small : large) | code >> 7 << 31)};
}

inline float scale_behind(const int8_t* codes) {
    float scale;
    __builtin_memcpy(&scale, codes, sizeof(scale));
    return scale;
}
inline float scale_behind(const e4m3*) {
    return 1.0f;
}

// The codes as numbers, which bfloat16 has all of; returns the scale. `width` is a multiple of 8.
template <class Code, class T>
inline float decode_head(const Code* codes, int64_t width, T* out) {
    int64_t i = 0;
    for (; i + Vec::W <= width; i += Vec::W)
        widen(codes + i).store(out + i);
    if (i < width) {  // half a vector
        Code rest[Vec::W] = {};
        __builtin_memcpy(rest, codes + i, Vec::W / 2);
        widen(rest).store(out + i, Vec::W / 2);
    }
    return scale_behind(codes + width);
}

}  // namespace batchinfer::BATCHINFER_ISA
