// Matrix products of weights that are codes: activations become signed bytes too, and the sums are of integers.
//
// A weight is scale * code + minimum, a code unsigned. int8 has a scale per column and the minimum -128 scales; blocks
// have both per 32 values of k (short ones 16). An activation is a signed byte times a scale, that of its row (int8) or
// of its block; scale = largest magnitude / 127, and codes are rounded to nearest even. So a block adds
//
//     x_scale * (scale * sum(code * x_code) + minimum * sum(x_code)),
//
// in which the sums are exact. Results therefore differ between instruction sets by the rounding of fma alone.
//
// Panels: int8 is words of four k per column, then the scales [columns] float32. Of the others each block of 32 k has
// its scales and minima [columns] float16, then the words; blocks4 keeps the codes of k + 4 in the upper halves of the
// bytes of k.
#include "cpu/kernels/code_dot.h"
#include "cpu/kernels/codes.h"
#include "cpu/kernels/gemm_matrices.h"
#include "cpu/kernels/gemm_output.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/packed_codes.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

constexpr int64_t kWordDepth = 4;  // values of k in a word
constexpr int64_t kWordRow = kPanel * sizeof(uint32_t);

int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Registers: for int8 R x C sums; for blocks as many again, of the block in hand. Few rows take more panels at once.
#if BATCHINFER_VEC_AVX512 || defined(__ARM_FEATURE_DOTPROD)
constexpr int kWholeRows = 12, kWholeWideRows = 5, kBlockRows = 6, kBlockWideRows = 2;
#else
constexpr int kWholeRows = 4, kWholeWideRows = 1, kBlockRows = 2, kBlockWideRows = 0;
#endif

// Exact: codes are small, and so are sums of up to 2^24 / 127 of them.
int32_t sum_of(Ints codes) {
    return static_cast<int32_t>(reduce_sum({__builtin_convertvector(codes, Floats)}));
}

// W values, zeros behind the first `left`.
template <class T>
Vec load_left(const T* from, int64_t left) {
    return left >= Vec::W ? Vec::load(from) : left > 0 ? Vec::load(from, static_cast<int>(left)) : Vec::zero();
}

// f(x) of a row's first value, of the type that it has.
template <class F>
void with_row(const Rows& x, int64_t row, F f) {
    x.dtype == Dtype::float32 ? f(static_cast<const float*>(x.data) + row * x.stride)
                              : f(static_cast<const bf16*>(x.data) + row * x.stride);
}

// Sums of a tile as it leaves them: [R, P * kPanel].
template <int R, int P>
void store(const Vec (&sum)[R][2 * P], float* part) {
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < 2 * P; ++c)
            sum[r][c].store(part + (r * 2 * P + c) * Vec::W);
    }
}

// One word row of each panel times R rows.
template <int R, int P>
inline void add_words(Ints (&sum)[R][2 * P], const uint8_t* const* words, int64_t offset, int shift, uint32_t mask,
                      const int8_t* x) {
    Codes u[2 * P];
#pragma GCC unroll 8
    for (int c = 0; c < 2 * P; ++c) {
        Words w = load_codes(words[c / 2] + offset + c % 2 * Vec::W * sizeof(uint32_t));
        u[c] = spread(mask == ~0u ? w : (w >> shift) & mask);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        uint32_t four;
        __builtin_memcpy(&four, x + r * kDepthBlock, sizeof(four));
        const Signed a = broadcast_codes(four);
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; ++c)
            sum[r][c] = dot(u[c], a, sum[r][c]);
    }
}

struct Int8 {
    static constexpr int kRows = kWholeRows, kWideRows = kWholeWideRows;
    static constexpr int64_t kScaleBlock = kRowScale;

    static int64_t scales(int64_t) { return 1; }
    static size_t panel_bytes(int64_t depth) {
        return round_up(depth, kWordDepth) / kWordDepth * kWordRow + kPanel * sizeof(float);
    }

    static void pack_panel(const WeightRow* columns, int64_t depth, void* panel) {
        auto* words = static_cast<uint8_t*>(panel);
        for (int64_t k = 0; k < depth; k += kWordDepth) {
            for (int64_t n = 0; n < kPanel; ++n, words += kWordDepth) {
                __builtin_memset(words, 0, kWordDepth);
                if (const auto* codes = static_cast<const uint8_t*>(columns[n].values))
                    __builtin_memcpy(words, codes + k, min(kWordDepth, depth - k));
            }
        }
        auto* scales = reinterpret_cast<float*>(words);
        for (int64_t n = 0; n < kPanel; ++n)
            scales[n] = columns[n].values ? *static_cast<const float*>(columns[n].scales) : 0.0f;
    }

    template <class T>
    static void pack_row(const T* x, int64_t row, int64_t depth, const PackedRows& to) {
        Largest largest;
        for_vectors(depth, [&](int64_t k, auto count) { largest.see(Vec::load(x + k, count)); });
        const float scale = largest.scale();
        const Vec inverse = Vec::broadcast(inverse_of(scale));
        Ints sums = {};
        for (int64_t k = 0; k < depth; k += kDepthBlock) {
            auto* codes = const_cast<int8_t*>(to.at(row, k));
            for (int64_t i = 0; i < kDepthBlock; i += Vec::W)
                sums += encode(load_left(x + k + i, depth - k - i), inverse, codes + i);
        }
        const int32_t sum = sum_of(sums);
        const_cast<float*>(to.scale)[row] = scale;
        __builtin_memcpy(const_cast<float*>(to.moment) + row, &sum, sizeof(sum));
    }

    template <int R, int P>
    static void tile(const PackedRows& x, int64_t row, const uint8_t* const* panels, int64_t depth, float* part) {
        Ints sum[R][2 * P];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 2 * P; ++c)
                sum[r][c] = -kInt8Zero * x.total(row + r) - Ints{};
        }
        int64_t offset = 0;
        for (int64_t k = 0; k < depth; k += kDepthBlock) {
            const int8_t* codes = x.at(row, k);
            const int64_t count = min(kDepthBlock, round_up(depth - k, kWordDepth));
            for (int64_t i = 0; i < count; i += kWordDepth, offset += kWordRow)
                add_words<R, P>(sum, panels, offset, 0, ~0u, codes + i);
        }
        Vec out[R][2 * P];
        for (int c = 0; c < 2 * P; ++c) {
            const auto* scales = reinterpret_cast<const float*>(panels[c / 2] + offset);
            const Vec scale = Vec::load(scales + c % 2 * Vec::W);
            for (int r = 0; r < R; ++r) {
                const Vec whole = {__builtin_convertvector(sum[r][c], Floats)};
                out[r][c] = whole * (scale * Vec::broadcast(x.scale[row + r]));
            }
        }
        store<R, P>(out, part);
    }
};

template <int Bits, int64_t Size>
struct Blocks {
    static constexpr int kRows = kBlockRows, kWideRows = kBlockWideRows;
    static constexpr int64_t kScaleBlock = Size;
    static constexpr int64_t kScaleRow = kPanel * sizeof(uint16_t);
    static constexpr int64_t kWordRows = kScaleBlock * Bits / 32;  // of a block
    static constexpr int64_t kBlockBytes = 2 * kScaleRow + kWordRows * kWordRow;
    // One row waits for memory, and a block of short codes is too much work for the processor to look beyond it: asked
    // for so far ahead they come at 70 GB/s in place of 55 (Zen 5, two cores). Longer codes come no faster.
    static constexpr int64_t kAhead = 4 * kBlockBytes;

    static int64_t scales(int64_t depth) { return depth / kScaleBlock; }
    static size_t panel_bytes(int64_t depth) { return depth / kScaleBlock * kBlockBytes; }

    static void pack_panel(const WeightRow* columns, int64_t depth, void* panel) {
        auto* out = static_cast<uint8_t*>(panel);
        for (int64_t block = 0; block < depth / kScaleBlock; ++block, out += kBlockBytes) {
            __builtin_memset(out, 0, kBlockBytes);
            for (int64_t n = 0; n < kPanel; ++n) {
                const auto* codes = static_cast<const uint8_t*>(columns[n].values);
                if (!codes) continue;
                auto* halves = reinterpret_cast<uint16_t*>(out);
                halves[n] = static_cast<const uint16_t*>(columns[n].scales)[block];
                halves[kPanel + n] = static_cast<const uint16_t*>(columns[n].minima)[block];
                codes += block * kScaleBlock;
                for (int64_t k = 0; k < kScaleBlock; ++k) {
                    const int64_t word = Bits == 8 ? k / 4 : k / 8, shift = Bits == 8 ? 0 : k / 4 % 2 * 4;
                    out[2 * kScaleRow + word * kWordRow + n * 4 + k % 4] |= static_cast<uint8_t>(codes[k] << shift);
                }
            }
        }
    }

    template <class T>
    static void pack_row(const T* x, int64_t row, int64_t depth, const PackedRows& to) {
        for (int64_t block = 0; block < depth / kScaleBlock; ++block) {
            const int64_t k = block * kScaleBlock, at = row * to.scales + block;
            Vec values[kScaleBlock / Vec::W];
            Largest largest;
            for (int64_t i = 0; i < kScaleBlock / Vec::W; ++i) {
                values[i] = Vec::load(x + k + i * Vec::W);
                largest.see(values[i]);
            }
            const float scale = largest.scale();
            const Vec inverse = Vec::broadcast(inverse_of(scale));
            Ints sums = {};
            for (int64_t i = 0; i < kScaleBlock / Vec::W; ++i)
                sums += encode(values[i], inverse, const_cast<int8_t*>(to.at(row, k)) + i * Vec::W);
            const_cast<float*>(to.scale)[at] = scale;
            const_cast<float*>(to.moment)[at] = scale * static_cast<float>(sum_of(sums));
        }
    }

    template <int R, int P>
    static void tile(const PackedRows& x, int64_t row, const uint8_t* const* panels, int64_t depth, float* part) {
        Vec sum[R][2 * P];
        for (auto& of_row : sum) {
            for (Vec& s : of_row)
                s = Vec::zero();
        }
        for (int64_t block = 0; block < depth / kScaleBlock; ++block) {
            const int8_t* codes = x.at(row, block * kScaleBlock);
            const int64_t start = block * kBlockBytes;
            if constexpr (R == 1 && Bits == 4) {
                for (int p = 0; p < P; ++p) {
                    for (int64_t line = 0; line < kBlockBytes; line += 64)
                        __builtin_prefetch(panels[p] + start + kAhead + line);
                }
            }
            Ints inner[R][2 * P] = {};
#pragma GCC unroll 8
            for (int i = 0; i < kScaleBlock / kWordDepth; ++i) {
                const int word = Bits == 8 ? i : i / 2, shift = Bits == 8 ? 0 : i % 2 * 4;
                add_words<R, P>(inner, panels, start + 2 * kScaleRow + word * kWordRow, shift,
                                Bits == 8 ? ~0u : 0x0f0f0f0fu, codes + i * kWordDepth);
            }
#pragma GCC unroll 8
            for (int c = 0; c < 2 * P; ++c) {
                const auto* halves = reinterpret_cast<const uint16_t*>(panels[c / 2] + start) + c % 2 * Vec::W;
                const Vec scale = load_halves(halves), minimum = load_halves(halves + kPanel);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const float* x_scale = x.scale + (row + r) * x.scales + block;
                    const float* moment = x.moment + (row + r) * x.scales + block;
                    const Vec whole = {__builtin_convertvector(inner[r][c], Floats)};
                    sum[r][c] = fma(whole, scale * Vec::broadcast(*x_scale), sum[r][c]);
                    sum[r][c] = fma(minimum, Vec::broadcast(*moment), sum[r][c]);
                }
            }
        }
        store<R, P>(sum, part);
    }
};

template <class Format>
size_t packed_row_bytes(int64_t depth) {
    return round_up(depth, kDepthBlock) + 2 * sizeof(float) * Format::scales(depth);
}

template <class Format>
void pack_rows(const Rows& x, int64_t rows, int64_t depth, void* packed) {
    const PackedRows to(packed, rows, depth, Format::scales(depth));
    for (int64_t r = 0; r < rows; ++r)
        with_row(x, r, [&](const auto* row) { Format::pack_row(row, r, depth, to); });
}

template <int R, class Format>
constexpr int kPanelsAtOnce = R == 1                   ? 4
                              : R <= Format::kWideRows ? 2
                                                       : 1;

template <class Format, class Output, int R>
void multiply_rows(const PackedRows& x, int64_t row, int64_t depth, const uint8_t* panels, const GemmOutput& to) {
    constexpr int P = kPanelsAtOnce<R, Format>;
    const int64_t count = (to.columns + Output::kColumns - 1) / Output::kColumns, bytes = Format::panel_bytes(depth);
    float part[R * P * kPanel];
    const auto tile = [&]<int Panels>(int64_t panel) {
        const uint8_t* at[Panels];
        for (int p = 0; p < Panels; ++p)
            at[p] = panels + (panel + p) * bytes;
        Format::template tile<R, Panels>(x, row, at, depth, part);
        for (int p = 0; p < Panels; ++p)
            Output::write(part + p * kPanel, Panels * kPanel, R, row, (panel + p) * Output::kColumns, to);
    };
    int64_t panel = 0;
    for (; panel + P <= count; panel += P)
        tile.template operator()<P>(panel);
    for (; panel < count; ++panel)
        tile.template operator()<1>(panel);
}

using MultiplyRows = void (*)(const PackedRows&, int64_t row, int64_t depth, const uint8_t*, const GemmOutput&);

// Entry r is for r + 1 rows.
template <class Format, class Output>
struct ByRows {
    MultiplyRows entry[Format::kRows];
    template <int R>
    constexpr void fill() {
        entry[R - 1] = multiply_rows<Format, Output, R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr ByRows() : entry{} { fill<Format::kRows>(); }
};

template <class Format, class Output>
void multiply(const void* packed_rows, int64_t rows, int64_t depth, const void* panels, const GemmOutput& out, Coming) {
    static constexpr ByRows<Format, Output> by_rows;
    const PackedRows x(packed_rows, rows, depth, Format::scales(depth));
    const int64_t tiles = (rows + Format::kRows - 1) / Format::kRows;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = rows * i / tiles, count = rows * (i + 1) / tiles - begin;
        by_rows.entry[count - 1](x, begin, depth, static_cast<const uint8_t*>(panels), out);
    }
}

template <class Format>
constexpr GemmKernel kernel() {
    return {kPanel,
            Format::kRows,
            INT64_MAX,
            sizeof(uint8_t),
            Format::kScaleBlock,
            Format::panel_bytes,
            Format::pack_panel,
            packed_row_bytes<Format>,
            pack_rows<Format>,
            multiply<Format, PlainOutput>,
            multiply<Format, GatedOutput>};
}

}  // namespace

const GemmKernel gemm_int8 = by_matrices<Int8Words>(kernel<Int8>());
const GemmKernel gemm_blocks8 = kernel<Blocks<8, 32>>();
const GemmKernel gemm_blocks4 = kernel<Blocks<4, 32>>();
const GemmKernel gemm_short_blocks8 = kernel<Blocks<8, 16>>();

}  // namespace batchinfer::BATCHINFER_ISA
