// The inner loop of every matrix product on the CPU: a tile of R rows times C vectors of columns, held in registers.
//
// The tile is as large as the register file allows, because a weight vector is used R times per load and an
// activation C times: then the multiply-add units are the limit. Measured on one core of a Cascade Lake Xeon with
// weights in L2: 13 rows x 2 vectors reach 120-126 of 153 GFLOP/s, with bfloat16 weights as with float ones.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// Rows of a tile two vectors wide, and of one four wide (for few rows). Both leave registers for the weights of
// a step and one activation.
#if BATCHINFER_VEC_AVX512 || BATCHINFER_VEC_NEON
inline constexpr int kTileRows = 13, kWideTileRows = 5;  // 32 registers; GCC spills with 14
#else
inline constexpr int kTileRows = 6, kWideTileRows = 2;  // 16 registers
#endif

// A weight format says what one step along K takes: kParts activations per row, each for kDepth values of k, and as
// many operands per vector of columns. Every two vectors c, c + 1 of columns stand together, pairs `pair` words apart.

inline Words load_words(const uint32_t* p) {
    Words r;
    __builtin_memcpy(&r, p, sizeof(r));
    return r;
}
inline Vec low_half(Words w) {
    return {bits_as<Floats>(w << 16)};
}
inline Vec high_half(Words w) {
    return {bits_as<Floats>(w & 0xffff0000u)};
}

struct F32Weights {
    using Word = float;
    using Activation = float;
    using Operand = Vec;
    static constexpr int kParts = 1, kDepth = 1;
    static Vec load(const Word* w, int64_t pair, int c) { return Vec::load(w + c / 2 * pair + c % 2 * Vec::W); }
    static Operand part(Vec w, int) { return w; }
    static Operand broadcast(Activation x) { return Vec::broadcast(x); }
    static Vec add(Operand x, Operand w, Vec sum) { return fma(x, w, sum); }
};

// Words of two bfloat16 of one column: k in the lower half and k + 1 in the upper one.
struct Bf16Weights : F32Weights {
    using Word = uint32_t;
    static constexpr int kParts = 2;
    static Words load(const Word* w, int64_t pair, int c) { return load_words(w + c / 2 * pair + c % 2 * Vec::W); }
    static Operand part(Words w, int i) { return i == 0 ? low_half(w) : high_half(w); }
};

// Words of two bfloat16 of one k: a pair of vectors has the even columns first, then the odd ones.
struct Bf16Columns : F32Weights {
    using Word = uint32_t;
    static Vec load(const Word* w, int64_t pair, int c) {
        const Words both = load_words(w + c / 2 * pair);
        return c % 2 ? high_half(both) : low_half(both);
    }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(BATCHINFER_EMULATE_BF16_DOT)
#define BATCHINFER_BF16_DOT 1

// x rounded to bfloat16 and dotted two at a time with an f32 sum. A processor's rounding of the sum is its own (and
// it flushes subnormals), so results differ in the last bits from those of Bf16Weights.
struct Bf16DotWeights {
    using Word = uint32_t;
    using Activation = uint32_t;
    using Operand = Words;
    static constexpr int kParts = 1, kDepth = 2;
    static Words load(const Word* w, int64_t pair, int c) { return load_words(w + c / 2 * pair + c % 2 * Vec::W); }
    static Operand part(Words w, int) { return w; }
    static Operand broadcast(Activation x) { return x - Words{}; }
    static Vec add(Operand x, Operand w, Vec sum) {
#if defined(BATCHINFER_EMULATE_BF16_DOT)
        sum = fma({bits_as<Floats>(x & 0xffff0000u)}, {bits_as<Floats>(w & 0xffff0000u)}, sum);
        return fma({bits_as<Floats>(x << 16)}, {bits_as<Floats>(w << 16)}, sum);
#elif BATCHINFER_VEC_NEON
        return {(Floats)vbfdotq_f32((float32x4_t)sum.v, bits_as<bfloat16x8_t>(x), bits_as<bfloat16x8_t>(w))};
#else
        return {_mm512_dpbf16_ps(sum.v, bits_as<__m512bh>(x), bits_as<__m512bh>(w))};
#endif
    }
};
#else
#define BATCHINFER_BF16_DOT 0
#endif

// Adds `steps` steps to the tile. Rows of x are kDepthBlock values of k apart, the weights of two steps `step` words.
template <class Format, int R, int C>
inline void accumulate(Vec (&sum)[R][C], int64_t steps, const typename Format::Activation* x,
                       const typename Format::Word* w, int64_t step, int64_t pair) {
    constexpr int64_t row = kDepthBlock / Format::kDepth;
    for (; steps > 0; --steps, x += Format::kParts, w += step) {
        decltype(Format::load(w, pair, 0)) loaded[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
            loaded[c] = Format::load(w, pair, c);
#pragma GCC unroll 2
        for (int i = 0; i < Format::kParts; ++i) {
            typename Format::Operand part[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c)
                part[c] = Format::part(loaded[c], i);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const typename Format::Operand a = Format::broadcast(x[r * row + i]);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c)
                    sum[r][c] = Format::add(a, part[c], sum[r][c]);
            }
        }
    }
}

}  // namespace batchinfer::BATCHINFER_ISA
