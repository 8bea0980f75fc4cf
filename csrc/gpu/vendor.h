// One name per runtime call and intrinsic, so that the kernels do not know whose GPU they run on. Only CUDA today; HIP
// needs one more block here, with the same names, and nothing else outside mma.cuh. tests/simt has its own of both, so
// that the kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace batchinfer::gpu {

using gpuStream_t = cudaStream_t;
using gpuError_t = cudaError_t;
using gpuNativeBf16 = __nv_bfloat16;
using gpuNativeBf16x2 = __nv_bfloat162;

inline constexpr gpuError_t gpuSuccess = cudaSuccess;
inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline gpuError_t gpuGetLastError() {
    return cudaGetLastError();
}
inline const char* gpuGetErrorString(gpuError_t error) {
    return cudaGetErrorString(error);
}
inline gpuError_t gpuGetDeviceCount(int* count) {
    return cudaGetDeviceCount(count);
}
inline gpuError_t gpuGetDevice(int* device) {
    return cudaGetDevice(device);
}
inline gpuError_t gpuMultiprocessors(int* count, int device) {
    return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
inline gpuError_t gpuComputeMajor(int* major, int device) {
    return cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
}
template <class Kernel>
gpuError_t gpuAllowSharedMemory(Kernel kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
template <class Kernel>
gpuError_t gpuBlocksPerMultiprocessor(int* blocks, Kernel kernel, int threads, int shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes);
}

template <class... Parameters, class... Arguments>
void gpuLaunch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, gpuStream_t stream,
               const Arguments&... arguments) {
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
}

// Declares the shared memory that the launch gives the block. A function that returned it would cost registers.
#define BATCHINFER_DYNAMIC_SHARED(name, alignment) \
    extern __shared__ __align__(alignment)         \
    unsigned char name[]

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}

}  // namespace batchinfer::gpu
