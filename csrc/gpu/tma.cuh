// The tensor memory accelerator (TMA) of compute capability 9.0: one thread's instruction brings a box of a matrix in
// global memory to shared memory, permuted as the matrix unit wants it, and counts its bytes at a barrier. For
// the sources named *_sm90.cu; needs CUDA 12. What lies outside the matrix is zero.
#pragma once

#include <cuda.h>

#include "gpu/wgmma.cuh"

namespace batchinfer::gpu {

// Columns of a box: 128 bytes, the width of the swizzle.
inline constexpr int kBoxColumns = 64;

// Where the matrix lies and what a box of it is; a kernel takes it as `const __grid_constant__`.
using BoxMap = CUtensorMap;

// Of a row-major matrix [rows, columns] of 2-byte elements, whose boxes are [box_rows, kBoxColumns].
inline BoxMap box_map(const void* matrix, int64_t rows, int columns, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        check(error, "tensor map");
        if (!found) throw std::runtime_error("tensor map: the driver has no cuTensorMapEncodeTiled; CUDA 12's has");
        return reinterpret_cast<Encode>(found);
    }();
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
    BoxMap map;
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(matrix), sizes, row_bytes,
                                   box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("tensor map: cuTensorMapEncodeTiled ended with " + std::to_string(result));
    }
    return map;
}

#if BATCHINFER_WGMMA

// Arrives so many times, and makes the barrier's phase wait for so many bytes too.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int arrivals, int bytes) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %2;\n"
        "mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
        "r"(arrivals), "r"(bytes)
        : "memory");
}
// The box whose first element is (row, column); its rows stand 128 bytes apart at `to`, 16-byte piece p of row r at p ^
// r % 8 for a `to` that 1,024 divides. The bytes count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const BoxMap& map, int row, int column, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

#endif  // BATCHINFER_WGMMA

}  // namespace batchinfer::gpu
