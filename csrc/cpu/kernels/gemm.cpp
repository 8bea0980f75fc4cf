#include "cpu/kernels/gemm.h"

#include "cpu/kernels/gemm_matrices.h"
#include "cpu/kernels/gemm_output.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tile.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

#if BATCHINFER_BF16_DOT
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
int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// Words of a panel per step; a step is one word per column.
template <class Format>
constexpr int64_t kStepDepth = Format::kParts * Format::kDepth;

template <class Format>
int64_t steps(int64_t depth) {
    return (depth + kStepDepth<Format> - 1) / kStepDepth<Format>;
}

template <class Format>
size_t panel_bytes(int64_t depth) {
    return kPanel * 4 * steps<Format>(depth);
}

template <class T, class Word>
void pack_panel(const WeightRow* columns, int64_t depth, void* panel) {
    constexpr int64_t per_word = sizeof(Word) / sizeof(T);
    auto* out = static_cast<Word*>(panel);
    for (int64_t k = 0; k < depth; k += per_word) {
        for (int64_t n = 0; n < kPanel; ++n, ++out) {
            *out = 0;
            if (const auto* values = static_cast<const T*>(columns[n].values))
                __builtin_memcpy(out, values + k, min(per_word, depth - k) * sizeof(T));
        }
    }
}

// What a format reads of the activations: pairs of bf16 in a word, or floats.
template <class Format>
constexpr bool kReadsHalves = Format::kDepth == 2;

template <class Format>
size_t packed_row_bytes(int64_t depth) {
    return round_up(depth, kDepthBlock) * (kReadsHalves<Format> ? 2 : 4);
}

// One row's part of a depth block: `Packed` is float or bf16. What a step reads beyond `depth` is zero.
template <class T, class Packed>
void pack_block(const T* x, int64_t depth, Packed* out) {
    for (int64_t k = 0; k < depth; k += Vec::W) {
        const int count = static_cast<int>(min(depth - k, Vec::W));
        Vec::load(x + k, count).store(out + k);  // kDepthBlock is a multiple of the width
    }
    if (depth % 2) out[depth] = Packed{};
}
[[maybe_unused]] void pack_block(const bf16* x, int64_t depth, bf16* out) {
    __builtin_memcpy(out, x, depth * sizeof(bf16));
    if (depth % 2) out[depth] = bf16{};
}

template <class T, class Packed>
void pack_rows_as(const Rows& x, int64_t rows, int64_t depth, Packed* out) {
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
        for (int64_t r = 0; r < rows; ++r, out += kDepthBlock) {
            pack_block(static_cast<const T*>(x.data) + r * x.stride + k, min(depth - k, kDepthBlock), out);
        }
    }
}

template <class Format>
void pack_rows(const Rows& x, int64_t rows, int64_t depth, void* packed) {
    const auto as = [&]<class Packed>(Packed* out) {
        x.dtype == Dtype::float32 ? pack_rows_as<float>(x, rows, depth, out) : pack_rows_as<bf16>(x, rows, depth, out);
    };
    if constexpr (kReadsHalves<Format>) {
        as(static_cast<bf16*>(packed));
    } else {
        as(static_cast<float*>(packed));
    }
}

// What the tiles of one pass over a slice of the depth have in common.
struct Pass {
    int64_t depth;        // of the slice
    int64_t block;        // activations from one depth block to the next
    int64_t panel_words;  // from one panel to the next
    bool first, last;
    int64_t prefetch;  // cache lines to ask for with every depth block of a tile
};

// Sums as a tile finds and leaves them.
struct Sums {
    float* at;
    int64_t stride;
};

// R rows times P panels, added to `before` unless its pointer is null.
template <class Format, int R, int P>
void multiply_tile(const Pass& pass, const typename Format::Activation* x, const typename Format::Word* w, Sums before,
                   const float* bias, Sums out, Coming& coming) {
    Vec sum[R][2 * P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * P; ++c) {
            sum[r][c] = before.at ? Vec::load(before.at + r * before.stride + c * Vec::W) : Vec::zero();
        }
    }
    for (int64_t depth = pass.depth; depth > 0; depth -= kDepthBlock, x += pass.block) {
        for (int64_t i = 0; i < pass.prefetch && coming.at < coming.end; ++i, coming.at += 64)
            __builtin_prefetch(coming.at, 0, 2);
        const int64_t count = steps<Format>(min(depth, kDepthBlock));
        accumulate<Format>(sum, count, x, w, kPanel, pass.panel_words);
        w += count * kPanel;
    }
#pragma GCC unroll 16
    for (int c = 0; c < 2 * P; ++c) {
        const Vec b = bias ? Vec::load(bias + c * Vec::W) : Vec::zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            (sum[r][c] + b).store(out.at + r * out.stride + c * Vec::W);
    }
}

// Few rows leave registers for more panels at once: more chains of additions to hide their latency.
template <int R>
constexpr int kPanelsAtOnce = R == 1               ? 4
                              : R <= kWideTileRows ? 2
                                                   : 1;

// R rows, the first of which is `row`, times all columns of a task.
struct Plain {
    static constexpr int64_t kColumns = kPanel;  // of the output, in a panel

    template <class Format, int R>
    static void multiply_rows(const Pass& pass, int64_t row, const typename Format::Activation* x,
                              const typename Format::Word* w, const GemmOutput& to, Coming& coming) {
        constexpr int P = kPanelsAtOnce<R>;
        const int64_t stride = to.rows.stride;
        float* out = static_cast<float*>(const_cast<void*>(to.rows.data)) + row * stride;
        const auto tile = [&]<int Panels>(int64_t n) {
            const float* bias = pass.last && to.bias ? to.bias + n : nullptr;
            multiply_tile<Format, R, Panels>(pass, x, w, {pass.first ? nullptr : out + n, stride}, bias,
                                             {out + n, stride}, coming);
            w += Panels * pass.panel_words;
        };
        int64_t n = 0;
        for (; n + P * kPanel <= to.columns; n += P * kPanel)
            tile.template operator()<P>(n);
        for (; n + kPanel <= to.columns; n += kPanel)
            tile.template operator()<1>(n);
        if (n == to.columns) return;
        // Through a buffer, because a whole panel is computed.
        const int64_t bytes = (to.columns - n) * sizeof(float);
        float bias[kPanel] = {}, part[R * kPanel] = {};
        if (pass.last && to.bias) __builtin_memcpy(bias, to.bias + n, bytes);
        for (int r = 0; r < R && !pass.first; ++r)
            __builtin_memcpy(part + r * kPanel, out + r * stride + n, bytes);
        multiply_tile<Format, R, 1>(pass, x, w, {part, kPanel}, bias, {part, kPanel}, coming);
        for (int r = 0; r < R; ++r)
            __builtin_memcpy(out + r * stride + n, part + r * kPanel, bytes);
    }
};

struct Gated {
    static constexpr int64_t kColumns = Vec::W;

    template <class Format, int R>
    static void multiply_rows(const Pass& pass, int64_t row, const typename Format::Activation* x,
                              const typename Format::Word* w, const GemmOutput& to, Coming& coming) {
        constexpr int P = kPanelsAtOnce<R>;
        const int64_t panels = (to.columns + Vec::W - 1) / Vec::W, stride = panels * kPanel;
        float part[R * P * kPanel];
        const auto tile = [&]<int Panels>(int64_t panel) {
            float* sums = to.sums + row * stride + panel * kPanel;
            const Sums before = {pass.first ? nullptr : sums, stride};
            const Sums after = pass.last ? Sums{part, Panels * kPanel} : Sums{sums, stride};
            multiply_tile<Format, R, Panels>(pass, x, w, before, nullptr, after, coming);
            w += Panels * pass.panel_words;
            for (int p = 0; p < Panels && pass.last; ++p) {
                gate(part + p * kPanel, Panels * kPanel, R, row, (panel + p) * Vec::W, to);
            }
        };
        int64_t panel = 0;
        for (; panel + P <= panels; panel += P)
            tile.template operator()<P>(panel);
        for (; panel < panels; ++panel)
            tile.template operator()<1>(panel);
    }
};

template <class Format>
using MultiplyRows = void (*)(const Pass&, int64_t row, const typename Format::Activation*,
                              const typename Format::Word*, const GemmOutput&, Coming&);

// Entry r is for r + 1 rows.
template <class Format, class Kind>
struct ByRows {
    MultiplyRows<Format> entry[kTileRows];
    template <int R>
    constexpr void fill() {
        entry[R - 1] = Kind::template multiply_rows<Format, R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr ByRows() : entry{} { fill<kTileRows>(); }
};

// From here on two tiles are faster than one, which waits for memory in place of asking ahead: 13 rows reach 520
// GFLOP/s and not 365, 8 rows 360 and not 390 (bf16 weights from memory, Zen 5, two cores).
constexpr int64_t kTwoTilesRows = 10;

template <class Format, class Kind>
void multiply(const void* packed_rows, int64_t rows, int64_t depth, const void* panels, const GemmOutput& out,
              Coming coming) {
    static constexpr ByRows<Format, Kind> by_rows;
    constexpr int64_t row = kDepthBlock / Format::kDepth;
    const auto* x = static_cast<const typename Format::Activation*>(packed_rows);
    const auto* w = static_cast<const typename Format::Word*>(panels);
    // Tiles of nearly equal height: a last tile of one row would take half the time of a full one.
    const int64_t tiles = max((rows + kTileRows - 1) / kTileRows, rows >= kTwoTilesRows ? 2 : 1);
    // One tile alone waits for memory all the time, and would lose by asking for more.
    const int64_t width = Kind::kColumns,
                  blocks = tiles * ((out.columns + width - 1) / width) * ((depth + kDepthBlock - 1) / kDepthBlock);
    const int64_t prefetch = tiles > 1 ? ((coming.end - coming.at) / 64 + blocks - 1) / blocks : 0;
    for (int64_t k = 0; k < depth; k += kDepthSlice) {
        const Pass pass = {min(depth - k, kDepthSlice), rows * row, steps<Format>(depth) * kPanel, k == 0,
                           k + kDepthSlice >= depth,    prefetch};
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t begin = rows * i / tiles, count = rows * (i + 1) / tiles - begin;
            by_rows.entry[count - 1](pass, begin, x + begin * row, w, out, coming);
        }
        x += kDepthSlice / kDepthBlock * pass.block;
        w += steps<Format>(pass.depth) * kPanel;
    }
}

template <class Format, class T, class Word>
constexpr GemmKernel kernel() {
    return {kPanel,
            kTileRows,
            kDepthSlice,
            sizeof(T),
            kNoScales,
            panel_bytes<Format>,
            pack_panel<T, Word>,
            packed_row_bytes<Format>,
            pack_rows<Format>,
            multiply<Format, Plain>,
            multiply<Format, Gated>};
}

}  // namespace

const GemmKernel gemm_float32 = kernel<F32Weights, float, float>();
const GemmKernel gemm_bfloat16 = by_matrices<Bf16Words>(kernel<HalfWeights, uint16_t, uint32_t>());

}  // namespace batchinfer::BATCHINFER_ISA
