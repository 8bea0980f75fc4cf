// What an instruction set's matrix kernels offer to csrc/cpu/gemm.cpp (made by kernels/gemm.cpp).
//
// Weights [N, K] are cut into panels of `panel_columns` output columns. A panel lies in the order in which the inner
// loop reads it: for every k the weights of all its columns. bfloat16 weights stand in pairs (k, k+1) in one 32-bit
// word per column: that is what the AVX512-BF16 dot product takes, and without it one load, one shift and one mask give
// two float vectors, half the work of widening 16-bit loads. Odd K and missing columns are filled up with zeros.
//
// Activations are copied into blocks of kDepthBlock along K, the rows of a block one after another: the inner loop then
// reaches all rows of its tile from one register, and no row stride can map them onto the same cache set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "batchinfer/ops.h"

namespace batchinfer {

inline constexpr int64_t kDepthBlock = 64;
// All panels of a task are read this deep, tile by tile, before the next slice begins: beyond it a tile's activations
// and a panel would not stay in L2 together. The sums wait in the output meanwhile, which changes no bit.
inline constexpr int64_t kDepthSlice = 2048;

struct GemmKernel {
    int panel_columns;
    int tile_rows;  // most rows that one pass over a panel serves

    size_t (*panel_bytes)(Dtype weight, int64_t depth);
    // `weight` points at the first of `columns` <= panel_columns rows of the weight matrix [.., depth].
    void (*pack_panel)(Dtype weight_dtype, const void* weight, int64_t columns, int64_t depth, void* panel);

    size_t (*packed_row_bytes)(Dtype weight, int64_t depth);
    void (*pack_rows)(Dtype weight, const float* x, int64_t rows, int64_t depth, void* packed);

    // out [rows, columns] with row stride `stride` = packed rows times consecutive packed panels, + bias [columns]
    // unless null. An element's sum is one chain along K, the same for whatever rows and columns are computed beside
    // it.
    void (*multiply)(Dtype weight, const void* packed_rows, int64_t rows, int64_t depth, const void* panels,
                     int64_t columns, const float* bias, float* out, int64_t stride);
};

}  // namespace batchinfer
