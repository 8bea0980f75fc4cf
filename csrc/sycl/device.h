// What every kernel needs: element types and what a work-item is told about itself.
//
// A kernel is a struct: its arguments (Args), what the work-items of a group share (Local), how many they are
// (kThreads), and run(), which each of them calls. So its source includes only SYCL and <cmath>, and has two callers:
// launch.h, a lambda for DPC++ (icpx -fsycl), and that of tests/sycl, which compiles kernels at run time.
//
// Sub-groups have 16 work-items, which every Intel GPU since Gen9 has. No double: Arc has none.
#pragma once

#include <cmath>
#include <cstdint>
#include <sycl/sycl.hpp>

#include "gpu/dispatch.h"
#include "gpu/ops.h"

namespace batchinfer::gpu {

inline uint32_t float_bits(float x) {
    return sycl::bit_cast<uint32_t>(x);
}
inline float float_of(uint32_t bits) {
    return sycl::bit_cast<float>(bits);
}

}  // namespace batchinfer::gpu

#define BATCHINFER_ON_DEVICE inline
#include "gpu/portable.h"

namespace batchinfer::gpu {

using Item = sycl::nd_item<2>;  // group(0): row of the problem; group(1): piece of the row

inline constexpr int kSubGroup = 16;

struct NoLocal {};

inline int thread_of(const Item& item) {
    return static_cast<int>(item.get_local_id(1));
}

inline float to_float(float x) {
    return x;
}
inline float to_float(f16 x) {
    return sycl::bit_cast<sycl::half>(x.bits);
}
inline float to_float(bf16 x) {
    return float_of(uint32_t{x.bits} << 16);
}
inline float to_float(e4m3 x) {
    return e4m3_value(x.bits);
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline f16 from_float<f16>(float x) {
    return {sycl::bit_cast<uint16_t>(static_cast<sycl::half>(x))};
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even
    const uint32_t bits = float_bits(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline e4m3 from_float<e4m3>(float x) {
    return {e4m3_code(x)};
}

}  // namespace batchinfer::gpu
