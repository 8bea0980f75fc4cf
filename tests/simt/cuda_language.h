// CUDA C++ for a C++20 compiler: qualifiers, built-in variables and types, and those intrinsics that csrc/gpu uses.
// What waits or moves data between threads goes to the block (block.h); the rest is arithmetic, rounded as the GPU
// rounds it where the intrinsic promises that.
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

namespace simt {
template <class T>
struct Shuffle {
    T value;
    int source;
};
inline void whole_warp(unsigned mask) {
    if (mask != kAll) block().fail("an operation of some lanes: only that of a whole warp is emulated");
}
template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, const char* file, int line) {
    whole_warp(mask);
    return block().together<T>(Site{operation, file, line}, Shuffle<T>{value, source & (kLanes - 1)},
                               [](const Shuffle<T>* in, T* out) {
                                   for (int i = 0; i < kLanes; ++i) {
                                       out[i] = in[in[i].source].value;
                                   }
                               });
}
inline unsigned vote(const char* operation, unsigned mask, bool mine, const char* file, int line) {
    whole_warp(mask);
    return block().together<unsigned>(Site{operation, file, line}, mine, [](const bool* in, unsigned* out) {
        unsigned votes = 0;
        for (int i = 0; i < kLanes; ++i) {
            votes |= static_cast<unsigned>(in[i]) << i;
        }
        std::fill_n(out, kLanes, votes);
    });
}
}  // namespace simt

inline void __syncwarp(unsigned mask = simt::kAll, SIMT_HERE) {
    simt::vote("__syncwarp", mask, true, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_HERE) {
    return simt::shuffle("__shfl_sync", mask, value, source, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, SIMT_HERE) {
    return simt::shuffle("__shfl_xor_sync", mask, value, simt::block().lane() ^ lane_mask, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, SIMT_HERE) {
    const int lane = simt::block().lane();
    return simt::shuffle("__shfl_up_sync", mask, value, lane < delta ? lane : lane - delta, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool mine, SIMT_HERE) {
    return simt::vote("__ballot_sync", mask, mine, file, line);
}
inline bool __any_sync(unsigned mask, bool mine, SIMT_HERE) {
    return simt::vote("__any_sync", mask, mine, file, line) != 0;
}

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
inline int __popc(unsigned x) {
    return std::popcount(x);
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

// Conversions saturate, NaN becomes 0.
inline int __float2int_rz(float x) {
    return isnan(x) ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<int>(x);
}
inline unsigned long long __float2ull_rz(float x) {
    return isnan(x) || x < 0 ? 0 : x >= 0x1p64f ? UINT64_MAX : static_cast<unsigned long long>(x);
}
inline float __uint2float_rn(unsigned x) {
    return static_cast<float>(x);
}

// Built with -ffp-contract=off: each is one rounding.
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
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

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half low, high;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 low, high;
};
inline __half __ushort_as_half(uint16_t bits) {
    return {bits};
}
inline uint16_t __half_as_ushort(__half x) {
    return x.bits;
}
inline float __half2float(__half x) {
    return _cvtsh_ss(x.bits);
}
inline __half __float2half_rn(float x) {
    return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
}
inline __half2 __floats2half2_rn(float low, float high) {
    return {__float2half_rn(low), __float2half_rn(high)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.bits;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
