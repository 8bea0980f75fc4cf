// Where the instruction set has AMX, products of bfloat16 and int8 are done on its tiles (kernels/gemm_amx.cpp).
#pragma once

#include "cpu/kernels/gemm.h"

#if (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)) || defined(BATCHINFER_EMULATE_AMX)
#define BATCHINFER_AMX 1
#endif

namespace batchinfer::BATCHINFER_ISA {

#if BATCHINFER_AMX

inline constexpr int kAmxRows = 32;

void multiply_bfloat16_on_tiles(const void*, int64_t, int64_t, const void*, const GemmOutput&, Coming);
void multiply_bfloat16_gated_on_tiles(const void*, int64_t, int64_t, const void*, const GemmOutput&, Coming);
void multiply_int8_on_tiles(const void*, int64_t, int64_t, const void*, const GemmOutput&, Coming);
void multiply_int8_gated_on_tiles(const void*, int64_t, int64_t, const void*, const GemmOutput&, Coming);

// The packing of the vector kernel with these products.
constexpr GemmKernel on_tiles(GemmKernel kernel, decltype(kernel.multiply) multiply, decltype(kernel.multiply) gated) {
    kernel.tile_rows = kAmxRows;
    kernel.depth_slice = INT64_MAX;
    kernel.multiply = multiply;
    kernel.multiply_gated = gated;
    return kernel;
}
constexpr GemmKernel bfloat16_on_tiles(GemmKernel kernel) {
    return on_tiles(kernel, multiply_bfloat16_on_tiles, multiply_bfloat16_gated_on_tiles);
}
constexpr GemmKernel int8_on_tiles(GemmKernel kernel) {
    return on_tiles(kernel, multiply_int8_on_tiles, multiply_int8_gated_on_tiles);
}

#else

constexpr GemmKernel bfloat16_on_tiles(GemmKernel kernel) {
    return kernel;
}
constexpr GemmKernel int8_on_tiles(GemmKernel kernel) {
    return kernel;
}

#endif

}  // namespace batchinfer::BATCHINFER_ISA
