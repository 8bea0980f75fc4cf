// NVIDIA's side of vendor.h. tests/simt has its own, so that the kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gpu/matrix_unit.h"

namespace batchinfer::gpu {

using gpuStream_t = cudaStream_t;

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr bool kAsyncCopies = true;  // to shared memory, past the registers

inline cudaError_t gpuMultiprocessors(int* count, int device) {
    return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
inline cudaError_t gpuMatrixUnit(MatrixUnit* unit, int device) {
    int major = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    *unit = major < 8 ? MatrixUnit::none : major == 9 ? MatrixUnit::warpgroup : MatrixUnit::warp;
    return error;
}

template <class... Parameters, class... Arguments>
void gpuLaunch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, gpuStream_t stream,
               const Arguments&... arguments) {
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
}

// Of a kernel: threads of a block at most, and blocks that a multiprocessor shall hold at least.
#define BATCHINFER_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

// Declares the shared memory that the launch gives the block. A function that returned it would cost registers.
#define BATCHINFER_DYNAMIC_SHARED(name, alignment) \
    extern __shared__ __align__(alignment)         \
    unsigned char name[]

// What the lanes of a warp do together; all of them must come.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}
// Of the lane `delta` below; of its own where there is none.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
    return __shfl_up_sync(kAllLanes, value, delta);
}
__device__ __forceinline__ bool any_lane(bool mine) {
    return __any_sync(kAllLanes, mine);
}
__device__ __forceinline__ int count_lanes(bool mine) {
    return __popc(__ballot_sync(kAllLanes, mine));
}
// What lanes have written to shared memory before, others may read after.
__device__ __forceinline__ void sync_warp() {
    __syncwarp();
}

// Conversions round to nearest, ties to even. Pairs have the first number in the low half.
__device__ __forceinline__ uint16_t bf16_bits(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(both);
}
__device__ __forceinline__ uint16_t f16_bits(float x) {
    return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(both);
}
__device__ __forceinline__ float f16_value(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

// Two e4m3 codes, exactly; from 8.9 on there is a unit for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define BATCHINFER_E4M3_UNIT 1
__device__ __forceinline__ uint32_t f16_pair_of_e4m3(uint16_t codes) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
    return pair;
}
#endif

// 2**x by the special function unit: relative error 2**-22, 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One rounding each; an expression could be contracted to a fused product and sum.
namespace exact {

__device__ __forceinline__ float mul(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ float add(float a, float b) {
    return __fadd_rn(a, b);
}
__device__ __forceinline__ float sub(float a, float b) {
    return __fsub_rn(a, b);
}
__device__ __forceinline__ float div(float a, float b) {
    return __fdiv_rn(a, b);
}

}  // namespace exact

}  // namespace batchinfer::gpu
