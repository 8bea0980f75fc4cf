// Dot products of codes: four unsigned weights of each column with four signed activations of a row, added to int32.
//
// All instruction sets give the same integers. (AVX2's vpmaddubsw, made for this, saturates at 16 bits.)
#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// Words of four bytes, one word per column.
inline Words load_codes(const void* p) {
    Words r;
    __builtin_memcpy(&r, p, sizeof(r));
    return r;
}

#if defined(__AVX512VNNI__) && BATCHINFER_VEC_AVX512

struct Codes {
    Words u;
};
using Signed = Words;
inline Codes spread(Words u) {
    return {u};
}
inline Signed broadcast_codes(uint32_t a) {
    return a - Words{};
}
inline Ints dot(Codes u, Signed a, Ints sum) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u.u, (__m512i)a);
}

#elif BATCHINFER_VEC_AVX512 || BATCHINFER_VEC_AVX2

// Bytes 0 and 2, and 1 and 3, as 16-bit numbers, whose products are added in pairs.
struct Codes {
    Words even, odd;
};
typedef int16_t Shorts __attribute__((vector_size(sizeof(Words))));
struct Signed {
    Words even, odd;
};
inline Codes spread(Words u) {
    return {u & 0x00ff00ffu, (u >> 8) & 0x00ff00ffu};
}
inline Signed broadcast_codes(uint32_t a) {
    const Shorts both = bits_as<Shorts>(a - Words{});
    return {bits_as<Words>((both << 8) >> 8), bits_as<Words>(both >> 8)};
}
inline Ints dot(Codes u, Signed a, Ints sum) {
#if BATCHINFER_VEC_AVX512
    const __m512i even = _mm512_madd_epi16((__m512i)u.even, (__m512i)a.even);
    return sum + (Ints)even + (Ints)_mm512_madd_epi16((__m512i)u.odd, (__m512i)a.odd);
#else
    const __m256i even = _mm256_madd_epi16((__m256i)u.even, (__m256i)a.even);
    return sum + (Ints)even + (Ints)_mm256_madd_epi16((__m256i)u.odd, (__m256i)a.odd);
#endif
}

#elif defined(__ARM_FEATURE_MATMUL_INT8)

struct Codes {
    Words u;
};
using Signed = Words;
inline Codes spread(Words u) {
    return {u};
}
inline Signed broadcast_codes(uint32_t a) {
    return a - Words{};
}
inline Ints dot(Codes u, Signed a, Ints sum) {
    return (Ints)vusdotq_s32((int32x4_t)sum, (uint8x16_t)u.u, (int8x16_t)a);
}

#elif defined(__ARM_FEATURE_DOTPROD)

// Both signed, so a weight is its code less 128, and 128 times the activations is given back.
struct Codes {
    int8x16_t s;
};
struct Signed {
    int8x16_t s;
    Ints lost;
};
inline Codes spread(Words u) {
    return {(int8x16_t)(u ^ 0x80808080u)};
}
inline Signed broadcast_codes(uint32_t a) {
    const int8x16_t s = (int8x16_t)(a - Words{});
    return {s, (Ints)vdotq_s32(vdupq_n_s32(0), s, vdupq_n_s8(64)) * 2};
}
inline Ints dot(Codes u, Signed a, Ints sum) {
    return (Ints)vdotq_s32((int32x4_t)(sum + a.lost), u.s, a.s);
}

#else

struct Codes {
    Ints byte[4];
};
struct Signed {
    Ints byte[4];
};
inline Codes spread(Words u) {
    Codes r;
    for (int i = 0; i < 4; ++i)
        r.byte[i] = bits_as<Ints>((u >> 8 * i) & 0xffu);
    return r;
}
inline Signed broadcast_codes(uint32_t a) {
    Signed r;
    for (int i = 0; i < 4; ++i)
        r.byte[i] = static_cast<int8_t>(a >> 8 * i) - Ints{};
    return r;
}
inline Ints dot(const Codes& u, const Signed& a, Ints sum) {
    for (int i = 0; i < 4; ++i)
        sum += u.byte[i] * a.byte[i];
    return sum;
}

#endif

// W numbers from float16, none of which is infinite or NaN.
inline Vec load_halves(const uint16_t* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof(h));
#if BATCHINFER_VEC_AVX512
    return {_mm512_cvtph_ps((__m256i)h)};
#elif BATCHINFER_VEC_AVX2
    return {_mm256_cvtph_ps((__m128i)h)};
#elif BATCHINFER_VEC_NEON
    return {(Floats)vcvt_f32_f16(bits_as<float16x4_t>(h))};
#else
    const Words bits = __builtin_convertvector(h, Words);
    const Vec size = Vec{bits_as<Floats>((bits & 0x7fff) << 13)} * Vec::broadcast(0x1p112f);  // subnormals too
    return {bits_as<Floats>(bits_as<Words>(size.v) | (bits & 0x8000) << 16)};
#endif
}

}  // namespace batchinfer::BATCHINFER_ISA
