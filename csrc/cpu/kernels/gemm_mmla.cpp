// Matrix products by ARM's BFMMLA and USMMLA: 2 columns of weights times 2 rows of activations, 4 values of k in
// bfloat16 and 8 in int8; twice the work of a dot product's instruction.
//
// The words of two successive steps of a panel, interleaved, are the weights of two columns; 8 bytes of k of two rows
// the activations. A row that has no other beside it is multiplied twice and kept once, so that its sums do not depend
// on its neighbours. int8 gives the very integers of the vector kernels; the rounding of BFMMLA is the processor's own.
#include "cpu/kernels/gemm_matrices.h"

#if BATCHINFER_MMLA

namespace batchinfer::BATCHINFER_ISA {
namespace {

int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// sum, of columns x rows, + weights of two columns times activations of two rows.
uint32x4_t multiply_add(Bf16Words, uint32x4_t sum, uint32x4_t w, uint32x4_t x) {
    return (uint32x4_t)vbfmmlaq_f32((float32x4_t)sum, bits_as<bfloat16x8_t>(w), bits_as<bfloat16x8_t>(x));
}
uint32x4_t multiply_add(Int8Words, uint32x4_t sum, uint32x4_t w, uint32x4_t x) {
    return (uint32x4_t)vusmmlaq_s32((int32x4_t)sum, (uint8x16_t)w, (int8x16_t)x);
}

// Two words of k, or one and a zero.
template <int kWords>
uint32x2_t load_k(const char* p) {
    uint32x2_t words = {};
    __builtin_memcpy(&words, p, 4 * kWords);
    return words;
}
uint32x4_t load_columns(const char* p) {
    return vld1q_u32(reinterpret_cast<const uint32_t*>(p));
}

// M pairs of rows from `row` on, the last `count` in all, times P panels: part [count, P * kPanel].
template <class Format, int M, int P>
void sum_up(const PackedTask& task, int64_t row, int count, const char* panels, float* part) {
    uint32x4_t sum[M][4 * P] = {};  // of two columns each
    const int64_t words = Format::words(task.depth), panel_bytes = Format::panel_bytes(task.depth);
    const auto step = [&]<int kWords>(const char* x, const char* w) {
        uint32x4_t pair[M];
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            pair[m] = vcombine_u32(load_k<kWords>(x + 2 * m * Format::kRowBytes),
                                   load_k<kWords>(x + min(2 * m + 1, count - 1) * Format::kRowBytes));
        }
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; ++c) {  // four columns
            const char* at = w + c / 2 * panel_bytes + c % 2 * 16;
            const uint32x4_t low = load_columns(at), high = kWords == 2 ? load_columns(at + kPanelRow) : uint32x4_t{};
            const uint32x4_t left = vzip1q_u32(low, high), right = vzip2q_u32(low, high);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                sum[m][2 * c] = multiply_add(Format{}, sum[m][2 * c], left, pair[m]);
                sum[m][2 * c + 1] = multiply_add(Format{}, sum[m][2 * c + 1], right, pair[m]);
            }
        }
    };
    constexpr int64_t kBlockWords = Format::kRowBytes / 4;
    for (int64_t first = 0; first < words; first += kBlockWords, panels += kBlockWords * kPanelRow) {
        const char* x = task.at<Format>(row, 4 * first);
        const int64_t n = min(words - first, kBlockWords);
        for (int64_t i = 0; i + 2 <= n; i += 2)
            step.template operator()<2>(x + 4 * i, panels + i * kPanelRow);
        if (n % 2) step.template operator()<1>(x + 4 * (n - 1), panels + (n - 1) * kPanelRow);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; ++c) {
            float* out = part + 2 * m * P * kPanel + 4 * c;
            const uint32x4_t left = sum[m][2 * c], right = sum[m][2 * c + 1];
            vst1q_f32(out, (float32x4_t)vuzp1q_u32(left, right));
            if (2 * m + 1 < count) vst1q_f32(out + P * kPanel, (float32x4_t)vuzp2q_u32(left, right));
        }
    }
}

template <class Format, class Output, int M>
void multiply_rows(const PackedTask& task, int64_t row, int count, const char* weights, const GemmOutput& to) {
    constexpr int kPanels = M == 1 ? 4 : M <= 3 ? 2 : 1;  // at once: 24 registers of sums at most
    const int64_t panels = (to.columns + Output::kColumns - 1) / Output::kColumns;
    const int64_t panel_bytes = Format::panel_bytes(task.depth);
    float part[2 * M * kPanels * kPanel];
    const auto tile = [&]<int P>(int64_t first) {
        const char* panel = weights + first * panel_bytes;
        sum_up<Format, M, P>(task, row, count, panel, part);
        for (int p = 0; p < P; ++p) {
            Format::finish(task, row, count, panel + p * panel_bytes, part + p * kPanel, P * kPanel);
            Output::write(part + p * kPanel, P * kPanel, count, row, (first + p) * Output::kColumns, to);
        }
    };
    int64_t first = 0;
    for (; first + kPanels <= panels; first += kPanels)
        tile.template operator()<kPanels>(first);
    for (; first < panels; ++first)
        tile.template operator()<1>(first);
}

using MultiplyRows = void (*)(const PackedTask&, int64_t row, int count, const char* weights, const GemmOutput&);

template <class Format, class Output>
constexpr MultiplyRows kByPairs[kMatrixRows / 2] = {multiply_rows<Format, Output, 1>, multiply_rows<Format, Output, 2>,
                                                    multiply_rows<Format, Output, 3>, multiply_rows<Format, Output, 4>,
                                                    multiply_rows<Format, Output, 5>, multiply_rows<Format, Output, 6>};

}  // namespace

template <class Format, class Output>
void multiply_matrices(const void* packed, int64_t rows, int64_t depth, const void* weights, const GemmOutput& to,
                       Coming) {
    const PackedTask task = {packed, rows, depth};
    const int64_t tiles = (rows + kMatrixRows - 1) / kMatrixRows;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = rows * i / tiles;
        const int count = static_cast<int>(rows * (i + 1) / tiles - row);
        kByPairs<Format, Output>[(count - 1) / 2](task, row, count, static_cast<const char*>(weights), to);
    }
}

BATCHINFER_MULTIPLY_MATRICES

}  // namespace batchinfer::BATCHINFER_ISA

#endif
