// What an instruction set's matrix kernels offer to csrc/cpu/gemm.cpp (made by kernels/gemm.cpp).
//
// Weights [N, K] are cut into panels of `panel_columns` output columns. A panel lies in the order in which the inner
// loop reads it: for every k the weights of all its columns. bfloat16 weights stand in pairs (k, k+1) in one 32-bit
// word per column: that is what the AVX512-BF16 dot product takes, and without it one load, one shift and one mask give
// two float vectors, half the work of widening 16-bit loads. Odd K and missing columns are filled up with zeros.
//
// A gated weight holds the gates [N / 2, K] above what they gate; a panel has both of a column, vector by vector, so
// that silu(gate) * up is taken from registers and the sums are never written.
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

// The inputs or outputs of a product: float32 or bfloat16.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t stride;  // elements from one row to the next
};

// Where the sums of a task go: `rows` begins with the task's first row and column.
struct GemmOutput {
    Rows rows;          // float32 unless gated
    int64_t columns;    // that the task computes
    const float* bias;  // of the first column, or null
    const float* bias_of_gated;
    float* sums;  // gated: [rows, panels * panel_columns], for the sums of a depth of more than kDepthSlice
};

// Weights that this thread will read next, brought to L2 bit by bit while it computes. Both null: none.
struct Coming {
    const char* at;
    const char* end;
};

// One output column's weights: float32 or bfloat16 [depth], or codes uint8 [depth] with scales.
struct WeightRow {
    const void* values;  // null: a column of zeros
    const void* scales;
    const void* minima;
};

// What stands beside the values of a row: nothing, a float32 for all of them, or a float16 scale and minimum for so
// many.
inline constexpr int64_t kNoScales = 0, kRowScale = -1;

// The kernels for one format of weights.
struct GemmKernel {
    int panel_columns;
    int tile_rows;        // most rows that one pass over a panel serves
    int64_t depth_slice;  // kDepthSlice, or more than any depth where the sums don't wait in the output
    size_t value_bytes;   // of a weight before it is packed
    int64_t scale_block;  // kNoScales, kRowScale or a number of values

    size_t (*panel_bytes)(int64_t depth);
    // columns [panel_columns].
    void (*pack_panel)(const WeightRow* columns, int64_t depth, void* panel);

    size_t (*packed_row_bytes)(int64_t depth);
    void (*pack_rows)(const Rows& x, int64_t rows, int64_t depth, void* packed);

    // Packed rows times consecutive packed panels, + bias. An element's sum is one chain along K, the same for whatever
    // rows and columns are computed beside it.
    void (*multiply)(const void* packed_rows, int64_t rows, int64_t depth, const void* panels, const GemmOutput& out,
                     Coming coming);
    // The same for panels of a gated weight: silu(gate) * up.
    void (*multiply_gated)(const void* packed_rows, int64_t rows, int64_t depth, const void* panels,
                           const GemmOutput& out, Coming coming);
};

// A format's number is that in batchinfer/ops/native.py; the first two are those of Dtype.
enum class WeightFormat : int32_t { float32, bfloat16, int8, blocks8, blocks4, short_blocks8 };
inline constexpr int kWeightFormats = 6;

}  // namespace batchinfer
