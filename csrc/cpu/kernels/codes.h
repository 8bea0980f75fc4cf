// Values as signed bytes times a scale: scale = largest magnitude / 127, codes are rounded to nearest even.
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

// A row of a cache of codes: head_width signed bytes, then their scale.
inline constexpr int64_t kScaleBytes = sizeof(float);

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
    __builtin_memcpy(out + width, &scale, kScaleBytes);
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

// The codes as numbers, which bfloat16 has all of; returns the scale. `width` is a multiple of 8.
template <class T>
inline float decode_head(const int8_t* codes, int64_t width, T* out) {
    int64_t i = 0;
    for (; i + Vec::W <= width; i += Vec::W)
        widen(codes + i).store(out + i);
    if (i < width) {  // half a vector
        int8_t rest[Vec::W] = {};
        __builtin_memcpy(rest, codes + i, Vec::W / 2);
        widen(rest).store(out + i, Vec::W / 2);
    }
    float scale;
    __builtin_memcpy(&scale, codes + width, kScaleBytes);
    return scale;
}

}  // namespace batchinfer::BATCHINFER_ISA
