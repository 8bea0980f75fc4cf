// What CUDA C++ and HIP have in common, for a C++20 compiler: qualifiers, built-in variables and types, and those
// intrinsics that csrc/gpu uses. What waits or moves data between threads goes to the block (block.h); the rest is
// arithmetic, rounded as the GPU rounds it where the intrinsic promises that.
#pragma once

#include <immintrin.h>
#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("simt_shared")))  // blocks run one at a time

#define threadIdx (simt::block().thread_index())
#define blockIdx (simt::block().index)
#define blockDim (simt::block().threads_per_block)
#define gridDim (simt::block().grid)

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

// Threads that wait for each other. The caller's place in the source goes into error messages.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) {
    simt::block().barrier(0, simt::block().thread_count(), {"__syncthreads", file, line});
}

// What the lanes of a warp do together.
namespace simt {
template <class T>
struct Shuffle {
    T value;
    int source;
};
template <class T>
T shuffle(const char* operation, T value, int source, const char* file, int line) {
    return block().together<T>(Site{operation, file, line}, Shuffle<T>{value, source & (kLanes - 1)},
                               [](const Shuffle<T>* in, T* out) {
                                   for (int i = 0; i < kLanes; ++i) {
                                       out[i] = in[in[i].source].value;
                                   }
                               });
}
inline LaneMask vote(const char* operation, bool mine, const char* file, int line) {
    return block().together<LaneMask>(Site{operation, file, line}, mine, [](const bool* in, LaneMask* out) {
        LaneMask votes = 0;
        for (int i = 0; i < kLanes; ++i) {
            votes |= LaneMask{in[i]} << i;
        }
        std::fill_n(out, kLanes, votes);
    });
}
}  // namespace simt

// No thread runs while another does: every access is atomic, and ordered.
inline void __threadfence() {}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
    const T old = *at;
    *at = static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
    return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
    const T old = *at;
    *at |= value;
    return old;
}
template <class T>
T __ldg(const T* at) {
    return *at;
}

inline int __clz(int x) {
    return std::countl_zero(static_cast<unsigned>(x));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __float_as_uint(float x) {
    return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
    return std::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
    return std::bit_cast<float>(x);
}

// Saturates, NaN becomes 0.
inline unsigned long long __float2ull_rz(float x) {
    return isnan(x) || x < 0 ? 0 : x >= 0x1p64f ? UINT64_MAX : static_cast<unsigned long long>(x);
}
inline float __uint2float_rn(unsigned x) {
    return static_cast<float>(x);
}

inline float __expf(float x) {
    return expf(x);
}
inline float __log2f(float x) {
    return log2f(x);
}
inline float __fdividef(float a, float b) {
    return fabsf(b) > 0x1p126f && !isnan(b) ? 0 : a / b;
}
inline float rsqrtf(float x) {
    return 1 / sqrtf(x);
}
