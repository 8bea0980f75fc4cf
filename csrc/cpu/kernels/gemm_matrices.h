// Products of bfloat16 and int8 on instructions that multiply small matrices: AMX's tiles (kernels/gemm_amx.cpp), or
// the 2 x 2 products of ARM's bf16 and i8mm (kernels/gemm_mmla.cpp). All packing stays that of the vector kernels.
#pragma once

#include "cpu/kernels/gemm_output.h"
#include "cpu/kernels/packed_codes.h"

#if (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)) || defined(BATCHINFER_EMULATE_AMX)
#define BATCHINFER_AMX 1
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define BATCHINFER_MMLA 1
#endif

namespace batchinfer::BATCHINFER_ISA {

inline constexpr int64_t kPanelRow = 4 * kPanel;  // bytes: a word of k of each column of a panel

// A task's activations as they are packed: bytes of k in depth blocks, row after row.
struct PackedTask {
    const void* data;
    int64_t rows, depth;

    template <class Format>
    const char* at(int64_t row, int64_t byte) const {
        return static_cast<const char*>(data) + (byte / Format::kRowBytes * rows + row) * Format::kRowBytes +
               byte % Format::kRowBytes;
    }
};

// Pairs of bfloat16 in a word.
struct Bf16Words {
    static constexpr int64_t kRowBytes = 2 * kDepthBlock;  // of a row in a depth block
    static int64_t words(int64_t depth) { return (depth + 1) / 2; }
    static int64_t panel_bytes(int64_t depth) { return words(depth) * kPanelRow; }
    static void finish(const PackedTask&, int64_t, int, const char*, float*, int64_t) {}
};

// Fours of codes in a word.
struct Int8Words {
    static constexpr int64_t kRowBytes = kDepthBlock;
    static int64_t words(int64_t depth) { return (depth + 3) / 4; }
    static int64_t panel_bytes(int64_t depth) { return words(depth) * kPanelRow + kPanel * sizeof(float); }

    // The sums of a panel and of `count` rows, integers until then, times the scales of their row and column.
    static void finish(const PackedTask& task, int64_t row, int count, const char* panel, float* part, int64_t stride) {
        const PackedRows x(task.data, task.rows, task.depth, 1);
        const auto* scales = reinterpret_cast<const float*>(panel + words(task.depth) * kPanelRow);
        for (int r = 0; r < count; ++r, part += stride) {
            const Ints zero = kInt8Zero * x.total(row + r) - Ints{};
            for (int c = 0; c < kPanel; c += Vec::W) {
                const Vec whole = {__builtin_convertvector(bits_as<Ints>(Vec::load(part + c).v) - zero, Floats)};
                (whole * (Vec::load(scales + c) * Vec::broadcast(x.scale[row + r]))).store(part + c);
            }
        }
    }
};

#if BATCHINFER_AMX || BATCHINFER_MMLA

#if BATCHINFER_AMX
inline constexpr int kMatrixRows = 32;
#else
inline constexpr int kMatrixRows = 12;
#endif

// As GemmKernel::multiply.
template <class Format, class Output>
void multiply_matrices(const void* packed_rows, int64_t rows, int64_t depth, const void* panels, const GemmOutput& out,
                       Coming coming);

// For the file that defines it.
#define BATCHINFER_MULTIPLY_AS(F, O) \
    template void multiply_matrices<F, O>(const void*, int64_t, int64_t, const void*, const GemmOutput&, Coming);
#define BATCHINFER_MULTIPLY_MATRICES               \
    BATCHINFER_MULTIPLY_AS(Bf16Words, PlainOutput) \
    BATCHINFER_MULTIPLY_AS(Bf16Words, GatedOutput) \
    BATCHINFER_MULTIPLY_AS(Int8Words, PlainOutput) \
    BATCHINFER_MULTIPLY_AS(Int8Words, GatedOutput)

template <class Format>
constexpr GemmKernel by_matrices(GemmKernel kernel) {
    kernel.tile_rows = kMatrixRows;
    kernel.depth_slice = INT64_MAX;
    kernel.multiply = multiply_matrices<Format, PlainOutput>;
    kernel.multiply_gated = multiply_matrices<Format, GatedOutput>;
    return kernel;
}

#else

template <class Format>
constexpr GemmKernel by_matrices(GemmKernel kernel) {
    return kernel;
}

#endif

}  // namespace batchinfer::BATCHINFER_ISA
