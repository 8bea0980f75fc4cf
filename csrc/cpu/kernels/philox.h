// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), one block of four words per lane.
#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

struct Product {
    Words high, low;
};

// The 64-bit products of every lane and m.
inline Product multiply(Words a, uint32_t m) {
#if BATCHINFER_VEC_AVX512
    const __m512i x = (__m512i)a, factor = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    return {(Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd),
            (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
#elif BATCHINFER_VEC_AVX2
    const __m256i x = (__m256i)a, factor = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    return {(Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
            (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#elif BATCHINFER_VEC_NEON
    const uint32x4_t x = (uint32x4_t)a, factor = vdupq_n_u32(m);
    const uint32x4_t first = (uint32x4_t)vmull_u32(vget_low_u32(x), vget_low_u32(factor));
    const uint32x4_t last = (uint32x4_t)vmull_high_u32(x, factor);
    return {(Words)vuzp2q_u32(first, last), (Words)vuzp1q_u32(first, last)};
#else
    Product p;
    for (int i = 0; i < Vec::W; ++i) {
        const uint64_t product = static_cast<uint64_t>(a[i]) * m;
        p.high[i] = static_cast<uint32_t>(product >> 32);
        p.low[i] = static_cast<uint32_t>(product);
    }
    return p;
#endif
}

struct PhiloxBlocks {
    Words word[4];
};

// The blocks counted by (counter, second, 0, 0) under the 64-bit key.
inline PhiloxBlocks philox(Words counter, uint32_t second, uint64_t key) {
    Words c0 = counter, c1 = Words{} + second, c2{}, c3{};
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const Product a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
        c0 = b.high ^ c1 ^ k0;
        c2 = a.high ^ c3 ^ k1;
        c1 = b.low;
        c3 = a.low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace batchinfer::BATCHINFER_ISA
