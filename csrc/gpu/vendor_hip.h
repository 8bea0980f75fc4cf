// AMD's side of vendor.h: CDNA 2 and later (gfx90a, gfx942: warps of 64 lanes) and RDNA (gfx1100: 32).
#pragma once

#include <hip/hip_runtime.h>

#include "gpu/matrix_unit.h"

#if defined(__gfx900__) || defined(__gfx902__) || defined(__gfx904__) || defined(__gfx906__) || defined(__gfx908__) || \
    defined(__gfx909__) || defined(__gfx90c__)
#error "gfx90a (MI200) is the oldest of the gfx9 GPUs that batchinfer compiles for"
#endif

namespace batchinfer::gpu {

using gpuStream_t = hipStream_t;

// The host's code is compiled once for all targets. It only rounds numbers of threads up to whole warps, which a
// multiple of 64 is everywhere.
#if defined(__HIP_DEVICE_COMPILE__) && !defined(__GFX9__)
inline constexpr int kWarp = 32;
#else
inline constexpr int kWarp = 64;
#endif

inline constexpr bool kAsyncCopies = false;  // to shared memory, past the registers

inline hipError_t gpuMultiprocessors(int* count, int device) {
    return hipDeviceGetAttribute(count, hipDeviceAttributeMultiprocessorCount, device);
}
// CDNA 2 and later, and RDNA 3; RDNA 4 has other layouts.
inline hipError_t gpuMatrixUnit(MatrixUnit* unit, int device) {
    int major = 0;
    const hipError_t error = hipDeviceGetAttribute(&major, hipDeviceAttributeComputeCapabilityMajor, device);
    *unit = major == 9 || major == 11 ? MatrixUnit::warp : MatrixUnit::none;
    return error;
}

template <class... Parameters, class... Arguments>
void gpuLaunch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, gpuStream_t stream,
               const Arguments&... arguments) {
    hipLaunchKernelGGL(kernel, grid, threads, shared_bytes, stream, arguments...);
}

// HIP's second bound counts something else, and all registers of a lane are wanted.
#define BATCHINFER_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)

#define BATCHINFER_DYNAMIC_SHARED(name, alignment) \
    HIP_DYNAMIC_SHARED(__attribute__((aligned(alignment))) unsigned char, name)

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor(value, mask, kWarp);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
    return __shfl_up(value, delta, kWarp);
}
__device__ __forceinline__ bool any_lane(bool mine) {
    return __any(mine);
}
__device__ __forceinline__ int count_lanes(bool mine) {
    return __popcll(__ballot(mine));
}
// The lanes run in step; only the compiler may move accesses.
__device__ __forceinline__ void sync_warp() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}

// The units round one number at a time, and bfloat16 not at all before gfx950: the carry of the half that is added does
// it. NaN keeps its sign and upper bits, and becomes quiet.
__device__ __forceinline__ uint16_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    return uint32_t{bf16_bits(high)} << 16 | bf16_bits(low);
}
__device__ __forceinline__ uint16_t f16_bits(float x) {
    return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}
__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
    return uint32_t{f16_bits(high)} << 16 | f16_bits(low);
}
__device__ __forceinline__ float f16_value(uint16_t bits) {
    return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}

// v_exp_f32: one unit in the last place, no denormals.
__device__ __forceinline__ float exp2_fast(float x) {
    return __builtin_amdgcn_exp2f(x);
}

// HIP's intrinsics of these names are plain expressions, which are contracted where they are used.
namespace exact {

__device__ __forceinline__ float mul(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
__device__ __forceinline__ float add(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
__device__ __forceinline__ float sub(float a, float b) {
#pragma clang fp contract(off)
    return a - b;
}
__device__ __forceinline__ float div(float a, float b) {
#pragma clang fp contract(off)
    return a / b;
}

}  // namespace exact

}  // namespace batchinfer::gpu
