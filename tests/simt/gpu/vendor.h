// csrc/gpu/vendor.h for the emulator: stands in its place on the include path.
#pragma once

#include <cstdlib>
#include <functional>

#include "cuda_language.h"

namespace batchinfer::gpu {

using gpuStream_t = void*;  // streams are in order anyway: a launch returns when the kernel is done
using gpuError_t = int;
using gpuNativeBf16 = __nv_bfloat16;
using gpuNativeBf16x2 = __nv_bfloat162;

inline constexpr gpuError_t gpuSuccess = 0;
inline constexpr int kWarp = simt::kLanes;
inline constexpr unsigned kAllLanes = simt::kAll;

inline gpuError_t gpuGetLastError() {
    return gpuSuccess;  // launches throw
}
inline const char* gpuGetErrorString(gpuError_t) {
    return "";
}
inline gpuError_t gpuGetDeviceCount(int* count) {
    *count = 1;
    return gpuSuccess;
}
inline gpuError_t gpuGetDevice(int* device) {
    *device = 0;
    return gpuSuccess;
}
// Few, so that a persistent block takes many items.
inline gpuError_t gpuMultiprocessors(int* count, int) {
    *count = 2;
    return gpuSuccess;
}
// BATCHINFER_EMULATED_CAPABILITY: 7, 8 or 9.
inline gpuError_t gpuComputeMajor(int* major, int) {
    const char* asked = std::getenv("BATCHINFER_EMULATED_CAPABILITY");
    *major = asked ? std::atoi(asked) : 9;
    return gpuSuccess;
}
template <class Kernel>
gpuError_t gpuAllowSharedMemory(Kernel, int) {
    return gpuSuccess;
}
template <class Kernel>
gpuError_t gpuBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
    *blocks = 1;
    return gpuSuccess;
}

template <class... Parameters, class... Arguments>
void gpuLaunch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, gpuStream_t,
               const Arguments&... arguments) {
    simt::block().run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

#define BATCHINFER_DYNAMIC_SHARED(name, alignment) unsigned char* const name = simt::block().dynamic_shared()

template <class T>
T shuffle_xor(T value, int mask, SIMT_HERE) {
    return __shfl_xor_sync(kAllLanes, value, mask, file, line);
}

}  // namespace batchinfer::gpu
