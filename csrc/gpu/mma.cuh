// 16 x 16 tiles of a warp's matrix unit, the same for both vendors: Tile (float32 sums), Operand (16-bit factors),
// loads of operands from shared memory, products, and copies to shared memory. The rows of a tile are query rows, its
// columns keys or elements of a head. BATCHINFER_MMA is 0 for targets without such a unit.
#pragma once

#if defined(__HIP__)
#include "gpu/mma_hip.cuh"
#else
#include "gpu/mma_cuda.cuh"
#endif
