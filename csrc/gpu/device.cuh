// What every kernel file needs: loads and stores of eight elements, block sums, launch checks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu/dispatch.h"
#include "gpu/ops.h"
#include "gpu/vendor.h"

namespace batchinfer::gpu {

__device__ __forceinline__ uint32_t float_bits(float x) {
    return __float_as_uint(x);
}
__device__ __forceinline__ float float_of(uint32_t bits) {
    return __uint_as_float(bits);
}

}  // namespace batchinfer::gpu

#define BATCHINFER_ON_DEVICE __device__ __forceinline__
#include "gpu/portable.h"

namespace batchinfer::gpu {

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ float to_float(f16 x) {
    return f16_value(x.bits);
}
__device__ __forceinline__ float to_float(e4m3 x) {
    return e4m3_value(x.bits);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return {bf16_bits(x)};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return {f16_bits(x)};
}
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
    return {e4m3_code(x)};
}

// Two neighbours in one 32-bit word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    return bf16_pair(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    return f16_pair(low, high);
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t word) {
    return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

// N elements from or to an address aligned to them: N = 8 takes 16-byte accesses (32 for float), N = 1 anything.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&x)[N]) {
    static_assert(N == 1 || N == 8);
    if constexpr (N == 1) {
        x[0] = to_float(*from);
    } else if constexpr (sizeof(T) == 4) {
        const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack2<T>(word[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&x)[N]) {
    if constexpr (N == 1) {
        *to = from_float<T>(x[0]);
    } else if constexpr (sizeof(T) == 4) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else if constexpr (sizeof(T) == 1) {
        uint32_t word[2] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            word[i / 4] |= uint32_t{from_float<T>(x[i]).bits} << 8 * (i % 4);
        }
        *reinterpret_cast<uint2*>(to) = {word[0], word[1]};
    } else {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
    }
}

// The combination of all threads' values, in every thread. `scratch` has one place per warp and may be used again after
// the call. The order is fixed: warps by butterfly, then the warps in order.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Op op) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        value = op(value, shuffle_xor(value, mask));
    }
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < blockDim.x / kWarp; ++w) {
        value = op(value, scratch[w]);
    }
    return value;
}

inline gpuStream_t native(Stream stream) {
    return static_cast<gpuStream_t>(stream);
}

inline void check(gpuError_t error, const char* what) {
    if (error != gpuSuccess) throw std::runtime_error(std::string(what) + ": " + gpuGetErrorString(error));
}

inline void check_launch(const char* op) {
    check(gpuGetLastError(), op);
}

// Of the current device when first asked: a process uses one.
inline MatrixUnit matrix_unit() {
    static const MatrixUnit found = [] {
        int device = 0;
        MatrixUnit unit = MatrixUnit::none;
        check(gpuGetDevice(&device), "matrix unit");
        check(gpuMatrixUnit(&unit, device), "matrix unit");
        return unit;
    }();
    return found;
}
inline int multiprocessors() {
    static const int found = [] {
        int device = 0, count = 0;
        check(gpuGetDevice(&device), "multiprocessors");
        check(gpuMultiprocessors(&count, device), "multiprocessors");
        return count;
    }();
    return found;
}

// Blocks of a persistent grid: as many as the device can hold at once.
template <class Kernel>
int persistent_blocks(Kernel kernel, int threads, int shared_bytes) {
    int per_multiprocessor = 0;
    const auto* handle = reinterpret_cast<const void*>(kernel);
    check(gpuAllowSharedMemory(handle, shared_bytes), "persistent grid");
    check(gpuBlocksPerMultiprocessor(&per_multiprocessor, handle, threads, shared_bytes), "persistent grid");
    if (per_multiprocessor == 0) throw std::runtime_error("persistent grid: the kernel does not fit on this device");
    return multiprocessors() * per_multiprocessor;
}

}  // namespace batchinfer::gpu
