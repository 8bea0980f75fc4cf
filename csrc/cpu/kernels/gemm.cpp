#include "cpu/kernels/gemm.h"

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tile.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

constexpr int kPanel = 2 * Vec::W;

// x rounded to bfloat16 and dotted two at a time with an f32 sum. This processor's rounding of the sum is its own
// (it flushes subnormals), so results differ in the last bits from those of Bf16Weights.
#if defined(__AVX512BF16__) || defined(BATCHINFER_EMULATE_BF16_DOT)
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
#else
        return {_mm512_dpbf16_ps(sum.v, bits_as<__m512bh>(x), bits_as<__m512bh>(w))};
#endif
    }
};
using HalfWeights = Bf16DotWeights;
#else
using HalfWeights = Bf16Weights;
#endif

int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Words of a panel per step; a step is one word per column.
template <class Format>
constexpr int64_t kStepDepth = Format::kParts * Format::kDepth;

template <class Format>
int64_t steps(int64_t depth) {
    return (depth + kStepDepth<Format> - 1) / kStepDepth<Format>;
}

size_t panel_bytes(Dtype weight, int64_t depth) {
    return kPanel * 4 * (weight == Dtype::float32 ? steps<F32Weights>(depth) : steps<HalfWeights>(depth));
}

void pack_panel(Dtype dtype, const void* weight, int64_t columns, int64_t depth, void* panel) {
    if (dtype == Dtype::float32) {
        const float* w = static_cast<const float*>(weight);
        float* out = static_cast<float*>(panel);
        for (int64_t k = 0; k < depth; ++k) {
            for (int64_t n = 0; n < kPanel; ++n)
                *out++ = n < columns ? w[n * depth + k] : 0.0f;
        }
        return;
    }
    const uint16_t* w = static_cast<const uint16_t*>(weight);
    uint32_t* out = static_cast<uint32_t*>(panel);
    for (int64_t k = 0; k < depth; k += 2) {
        for (int64_t n = 0; n < kPanel; ++n) {
            const uint32_t low = n < columns ? w[n * depth + k] : 0;
            const uint32_t high = n < columns && k + 1 < depth ? w[n * depth + k + 1] : 0;
            *out++ = low | high << 16;
        }
    }
}

size_t packed_row_bytes(Dtype weight, int64_t depth) {
    const bool words = weight == Dtype::bfloat16 && HalfWeights::kDepth == 2;
    return round_up(depth, kDepthBlock) * (words ? 2 : 4);
}

// One row's part of a depth block. What a step reads beyond `depth` is zero.
void pack_block(const float* x, int64_t depth, float* out) {
    for (int64_t k = 0; k < depth; k += Vec::W) {
        const int count = static_cast<int>(min(depth - k, Vec::W));
        Vec::load(x + k, count).store(out + k);  // kDepthBlock is a multiple of the width
    }
    if (depth % 2) out[depth] = 0.0f;
}
[[maybe_unused]] void pack_block(const float* x, int64_t depth, uint32_t* out) {
    bf16* half = reinterpret_cast<bf16*>(out);
    for (int64_t k = 0; k < depth; k += Vec::W) {
        const int count = static_cast<int>(min(depth - k, Vec::W));
        Vec::load(x + k, count).store(half + k);
    }
}

template <class Activation>
void pack_rows_as(const float* x, int64_t rows, int64_t depth, Activation* out, int64_t block_width) {
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
        for (int64_t r = 0; r < rows; ++r, out += block_width) {
            pack_block(x + r * depth + k, min(depth - k, kDepthBlock), out);
        }
    }
}

void pack_rows(Dtype weight, const float* x, int64_t rows, int64_t depth, void* packed) {
    if (weight == Dtype::bfloat16 && HalfWeights::kDepth == 2) {
        pack_rows_as(x, rows, depth, static_cast<uint32_t*>(packed), kDepthBlock / 2);
    } else {
        pack_rows_as(x, rows, depth, static_cast<float*>(packed), kDepthBlock);
    }
}

// What the tiles of one pass over a slice of the depth have in common.
struct Pass {
    int64_t depth;        // of the slice
    int64_t block;        // activations from one depth block to the next
    int64_t panel_words;  // from one panel to the next
    bool more;            // out holds the sums of the slices before
    const float* bias;    // with the last slice
    int64_t stride;       // of out
};

// R rows times P panels; bias and out belong to the first column.
template <class Format, int R, int P>
void multiply_tile(const Pass& pass, const typename Format::Activation* x, const typename Format::Word* w,
                   const float* bias, float* out, int64_t stride) {
    Vec sum[R][2 * P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * P; ++c) {
            sum[r][c] = pass.more ? Vec::load(out + r * stride + c * Vec::W) : Vec::zero();
        }
    }
    for (int64_t depth = pass.depth; depth > 0; depth -= kDepthBlock, x += pass.block) {
        const int64_t count = steps<Format>(min(depth, kDepthBlock));
        accumulate<Format>(sum, count, x, w, kPanel, pass.panel_words);
        w += count * kPanel;
    }
#pragma GCC unroll 16
    for (int c = 0; c < 2 * P; ++c) {
        const Vec b = bias ? Vec::load(bias + c * Vec::W) : Vec::zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            (sum[r][c] + b).store(out + r * stride + c * Vec::W);
    }
}

// The same for `columns` < panel columns: through a buffer, because a whole panel is computed.
template <class Format, int R>
void multiply_part(const Pass& pass, const typename Format::Activation* x, const typename Format::Word* w,
                   int64_t columns, const float* bias, float* out) {
    float padded_bias[kPanel] = {}, part[R * kPanel] = {};
    if (bias) __builtin_memcpy(padded_bias, bias, columns * sizeof(float));
    if (pass.more) {
        for (int r = 0; r < R; ++r)
            __builtin_memcpy(part + r * kPanel, out + r * pass.stride, columns * sizeof(float));
    }
    multiply_tile<Format, R, 1>(pass, x, w, padded_bias, part, kPanel);
    for (int r = 0; r < R; ++r)
        __builtin_memcpy(out + r * pass.stride, part + r * kPanel, columns * sizeof(float));
}

// R rows times any number of columns.
template <class Format, int R>
void multiply_rows(const Pass& pass, const typename Format::Activation* x, const typename Format::Word* w,
                   int64_t columns, float* out) {
    // Few rows leave registers for more panels at once: more chains of additions to hide their latency.
    constexpr int P = R == 1 ? 4 : R <= kWideTileRows ? 2 : 1;
    const auto bias = [&](int64_t n) { return pass.bias ? pass.bias + n : nullptr; };
    int64_t n = 0;
    for (; n + P * kPanel <= columns; n += P * kPanel, w += P * pass.panel_words) {
        multiply_tile<Format, R, P>(pass, x, w, bias(n), out + n, pass.stride);
    }
    for (; n + kPanel <= columns; n += kPanel, w += pass.panel_words) {
        multiply_tile<Format, R, 1>(pass, x, w, bias(n), out + n, pass.stride);
    }
    if (n < columns) multiply_part<Format, R>(pass, x, w, columns - n, bias(n), out + n);
}

template <class Format>
using MultiplyRows = void (*)(const Pass&, const typename Format::Activation*, const typename Format::Word*,
                              int64_t columns, float* out);

// Entry r is for r + 1 rows.
template <class Format>
struct ByRows {
    MultiplyRows<Format> entry[kTileRows];
    template <int R>
    constexpr void fill() {
        entry[R - 1] = multiply_rows<Format, R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr ByRows() : entry{} { fill<kTileRows>(); }
};

template <class Format>
void multiply_as(const void* packed_rows, int64_t rows, int64_t depth, const void* panels, int64_t columns,
                 const float* bias, float* out, int64_t stride) {
    static constexpr ByRows<Format> by_rows;
    constexpr int64_t row = kDepthBlock / Format::kDepth;
    const auto* x = static_cast<const typename Format::Activation*>(packed_rows);
    const auto* w = static_cast<const typename Format::Word*>(panels);
    // Tiles of nearly equal height: a last tile of one row would take half the time of a full one.
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t k = 0; k < depth; k += kDepthSlice) {
        const bool last = k + kDepthSlice >= depth;
        const Pass pass = {min(depth - k, kDepthSlice), rows * row, steps<Format>(depth) * kPanel, k > 0,
                           last ? bias : nullptr,       stride};
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t begin = rows * i / tiles, count = rows * (i + 1) / tiles - begin;
            by_rows.entry[count - 1](pass, x + begin * row, w, columns, out + begin * stride);
        }
        x += kDepthSlice / kDepthBlock * pass.block;
        w += steps<Format>(pass.depth) * kPanel;
    }
}

void multiply(Dtype weight, const void* packed_rows, int64_t rows, int64_t depth, const void* panels, int64_t columns,
              const float* bias, float* out, int64_t stride) {
    const auto as = weight == Dtype::float32 ? multiply_as<F32Weights> : multiply_as<HalfWeights>;
    as(packed_rows, rows, depth, panels, columns, bias, out, stride);
}

}  // namespace

const GemmKernel gemm_kernel = {kPanel, kTileRows, panel_bytes, pack_panel, packed_row_bytes, pack_rows, multiply};

}  // namespace batchinfer::BATCHINFER_ISA
