// What the attention kernels can use of a GPU's matrix unit.
#pragma once

namespace batchinfer::gpu {

enum class MatrixUnit {
    none,
    warp,       // products of a warp: mma.cuh
    warpgroup,  // and those of four warps: wgmma.cuh
};

}  // namespace batchinfer::gpu
