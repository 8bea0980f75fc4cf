// Shuffles: a square of words transposed, two vectors interleaved.
#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// transpose: row i of the result holds word i of every input.
// interleave: a0 a1 a2 .., b0 b1 b2 .. -> a0 b0 a1 .. and the rest. interleave_halves: the same of 16-bit elements.

#if BATCHINFER_VEC_AVX512

inline void interleave(Vec (&v)[2]) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 a = v[0].v, b = v[1].v;
    v[0] = {_mm512_permutex2var_ps(a, low, b)};
    v[1] = {_mm512_permutex2var_ps(a, high, b)};
}

inline void interleave_halves(Words (&v)[2]) {
    const __m512i step = (__m512i)(lane_index() * 0x00010001 + 0x00200000);  // i, 32 + i
    const __m512i a = (__m512i)v[0], b = (__m512i)v[1];
    v[0] = (Words)_mm512_permutex2var_epi16(a, step, b);
    v[1] = (Words)_mm512_permutex2var_epi16(a, _mm512_add_epi32(step, _mm512_set1_epi32(0x00100010)), b);
}

inline void transpose(Words (&w)[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = (__m512i)w[i];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {  // words of neighbours
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // pairs of words: a[i + j] has column j of each 128-bit lane of rows i .. i+3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {                                                   // lanes
        const __m512i low_even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);        // lanes 0, 2 of rows 0-3 and 4-7
        const __m512i low_odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);         // lanes 1, 3
        const __m512i high_even = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);  // of rows 8-11 and 12-15
        const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        w[j] = (Words)_mm512_shuffle_i32x4(low_even, high_even, 0x88);
        w[4 + j] = (Words)_mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        w[8 + j] = (Words)_mm512_shuffle_i32x4(low_even, high_even, 0xdd);
        w[12 + j] = (Words)_mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

#elif BATCHINFER_VEC_AVX2

inline void interleave(Vec (&v)[2]) {
    const __m256 low = _mm256_unpacklo_ps(v[0].v, v[1].v), high = _mm256_unpackhi_ps(v[0].v, v[1].v);
    v[0] = {_mm256_permute2f128_ps(low, high, 0x20)};
    v[1] = {_mm256_permute2f128_ps(low, high, 0x31)};
}

inline void interleave_halves(Words (&v)[2]) {
    const __m256i low = _mm256_unpacklo_epi16((__m256i)v[0], (__m256i)v[1]);
    const __m256i high = _mm256_unpackhi_epi16((__m256i)v[0], (__m256i)v[1]);
    v[0] = (Words)_mm256_permute2x128_si256(low, high, 0x20);
    v[1] = (Words)_mm256_permute2x128_si256(low, high, 0x31);
}

inline void transpose(Words (&w)[8]) {
    __m256i a[8], b[8];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i)
        a[i] = (__m256i)w[i];
#pragma GCC unroll 16
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
        w[j] = (Words)_mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        w[4 + j] = (Words)_mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
    }
}

#elif BATCHINFER_VEC_NEON

inline void interleave(Vec (&v)[2]) {
    const float32x4_t a = (float32x4_t)v[0].v, b = (float32x4_t)v[1].v;
    v[0] = {(Floats)vzip1q_f32(a, b)};
    v[1] = {(Floats)vzip2q_f32(a, b)};
}

inline void interleave_halves(Words (&v)[2]) {
    const uint16x8_t a = (uint16x8_t)v[0], b = (uint16x8_t)v[1];
    v[0] = (Words)vzip1q_u16(a, b);
    v[1] = (Words)vzip2q_u16(a, b);
}

inline void transpose(Words (&w)[4]) {
    const uint32x4_t a = (uint32x4_t)w[0], b = (uint32x4_t)w[1], c = (uint32x4_t)w[2], d = (uint32x4_t)w[3];
    const uint64x2_t ab_even = (uint64x2_t)vtrn1q_u32(a, b), ab_odd = (uint64x2_t)vtrn2q_u32(a, b);
    const uint64x2_t cd_even = (uint64x2_t)vtrn1q_u32(c, d), cd_odd = (uint64x2_t)vtrn2q_u32(c, d);
    w[0] = (Words)vtrn1q_u64(ab_even, cd_even);
    w[1] = (Words)vtrn1q_u64(ab_odd, cd_odd);
    w[2] = (Words)vtrn2q_u64(ab_even, cd_even);
    w[3] = (Words)vtrn2q_u64(ab_odd, cd_odd);
}

#else

inline void interleave(Vec (&v)[2]) {
    const Floats a = v[0].v, b = v[1].v;
    for (int i = 0; i < Vec::W; ++i) {
        v[i / (Vec::W / 2)].v[2 * i % Vec::W] = a[i];
        v[i / (Vec::W / 2)].v[2 * i % Vec::W + 1] = b[i];
    }
}

inline void interleave_halves(Words (&v)[2]) {
    const Words a = v[0], b = v[1];
    for (int i = 0; i < 2 * Vec::W; ++i) {
        const int shift = 16 * (i % 2);
        v[i / Vec::W][i % Vec::W] = (a[i / 2] >> shift & 0xffff) | (b[i / 2] >> shift & 0xffff) << 16;
    }
}

inline void transpose(Words (&w)[Vec::W]) {
    for (int i = 0; i < Vec::W; ++i) {
        for (int j = 0; j < i; ++j) {
            const uint32_t t = w[i][j];
            w[i][j] = w[j][i];
            w[j][i] = t;
        }
    }
}

#endif

}  // namespace batchinfer::BATCHINFER_ISA
