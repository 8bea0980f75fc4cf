// csrc/gpu/vendor_cuda.h for the emulator: stands in its place on the include path.
#pragma once

#include "gpu/matrix_unit.h"
#include "gpu_language.h"

#define SIMT_RUNTIME(name) cuda##name
#include "runtime.h"

// Those that the kernels of compute capability 9.0 use by CUDA's names.
inline void __syncwarp(SIMT_HERE) {
    simt::vote("__syncwarp", true, file, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, SIMT_HERE) {
    return simt::shuffle("__shfl_sync", value, source, file, line);
}
inline bool __any_sync(unsigned, bool mine, SIMT_HERE) {
    return simt::vote("__any_sync", mine, file, line) != 0;
}

namespace batchinfer::gpu {

using gpuStream_t = cudaStream_t;

inline constexpr int kWarp = simt::kLanes;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr bool kAsyncCopies = true;

inline cudaError_t gpuMultiprocessors(int* count, int) {
    *count = simt::kMultiprocessors;
    return cudaSuccess;
}
// BATCHINFER_EMULATED_CAPABILITY: 7, 8 or 9.
inline cudaError_t gpuMatrixUnit(MatrixUnit* unit, int) {
    const char* asked = std::getenv("BATCHINFER_EMULATED_CAPABILITY");
    const int major = asked ? std::atoi(asked) : 9;
    *unit = major < 8 ? MatrixUnit::none : major == 9 ? MatrixUnit::warpgroup : MatrixUnit::warp;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
void gpuLaunch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, gpuStream_t,
               const Arguments&... arguments) {
    simt::launch(kernel, grid, threads, shared_bytes, arguments...);
}

#define BATCHINFER_LAUNCH_BOUNDS(threads, blocks)
#define BATCHINFER_DYNAMIC_SHARED(name, alignment) unsigned char* const name = simt::block().dynamic_shared()

template <class T>
T shuffle_xor(T value, int mask, SIMT_HERE) {
    return simt::shuffle("__shfl_xor_sync", value, simt::block().lane() ^ mask, file, line);
}
template <class T>
T shuffle_up(T value, int delta, SIMT_HERE) {
    const int lane = simt::block().lane();
    return simt::shuffle("__shfl_up_sync", value, lane < delta ? lane : lane - delta, file, line);
}
inline bool any_lane(bool mine, SIMT_HERE) {
    return simt::vote("__any_sync", mine, file, line) != 0;
}
inline int count_lanes(bool mine, SIMT_HERE) {
    return std::popcount(simt::vote("__ballot_sync", mine, file, line));
}
inline void sync_warp(SIMT_HERE) {
    simt::vote("__syncwarp", true, file, line);
}

inline uint16_t bf16_bits(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t bf16_pair(float low, float high) {
    return uint32_t{bf16_bits(high)} << 16 | bf16_bits(low);
}
inline uint16_t f16_bits(float x) {
    return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
inline uint32_t f16_pair(float low, float high) {
    return uint32_t{f16_bits(high)} << 16 | f16_bits(low);
}
inline float f16_value(uint16_t bits) {
    return _cvtsh_ss(bits);
}

// Flushes denormal results, as the special function unit does with .ftz.
inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}

// Built with -ffp-contract=off: each is one rounding.
namespace exact {

inline float mul(float a, float b) {
    return a * b;
}
inline float add(float a, float b) {
    return a + b;
}
inline float sub(float a, float b) {
    return a - b;
}
inline float div(float a, float b) {
    return a / b;
}

}  // namespace exact

}  // namespace batchinfer::gpu
