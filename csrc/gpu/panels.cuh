// How operands of the warpgroup products (wgmma.cuh) lie in shared memory: panels of 64 elements (128 bytes) a row with
// the 128-byte swizzle. 16-byte piece p of row r stands at piece p ^ r % 8, and 8 rows are 1,024 bytes, to which panels
// are aligned. tma.cuh's boxes come so.
#pragma once

#include <cstdint>

namespace batchinfer::gpu {

inline constexpr int kPanel = 128;  // bytes of a panel's row

// Place of 16-byte piece `piece` of row `row` in an operand of `rows` rows.
__device__ __forceinline__ uint32_t place(int row, int piece, int rows) {
    return piece / 8 * rows * kPanel + row * kPanel + (piece % 8 ^ row % 8) * 16;
}

// Descriptor of an operand. `panel_stride`: bytes between panels, for operands whose panels lie along the product's
// columns (attention's values); the others ignore it.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panel_stride = 0) {
    return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{panel_stride / 16} << 16 | (address & 0x3ffff) / 16;
}

}  // namespace batchinfer::gpu
