// HIP for the emulator: what csrc/gpu/vendor_hip.h, which is compiled as it is, uses of it and of the compiler.
#pragma once

#include "gpu_language.h"

#define SIMT_RUNTIME(name) hip##name
#include "runtime.h"

enum hipDeviceAttribute { hipDeviceAttributeMultiprocessorCount };
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute, int) {
    *value = simt::kMultiprocessors;
    return hipSuccess;
}

template <class... Parameters, class... Arguments>
void hipLaunchKernelGGL(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, hipStream_t,
                        const Arguments&... arguments) {
    simt::launch(kernel, grid, threads, shared_bytes, arguments...);
}

#define HIP_DYNAMIC_SHARED(type, name) unsigned char* const name = simt::block().dynamic_shared();

// Lanes of a width, of which there is only the whole warp here.
template <class T>
T __shfl_xor(T value, int mask, int, SIMT_HERE) {
    return simt::shuffle("__shfl_xor", value, simt::block().lane() ^ mask, file, line);
}
template <class T>
T __shfl_up(T value, int delta, int, SIMT_HERE) {
    const int lane = simt::block().lane();
    return simt::shuffle("__shfl_up", value, lane < delta ? lane : lane - delta, file, line);
}
inline bool __any(bool mine, SIMT_HERE) {
    return simt::vote("__any", mine, file, line) != 0;
}
inline uint64_t __ballot(bool mine, SIMT_HERE) {
    return simt::vote("__ballot", mine, file, line);
}
inline int __popcll(uint64_t x) {
    return std::popcount(x);
}

// On the GPU the lanes are in step here by themselves; the emulator's have to meet.
inline void __builtin_amdgcn_wave_barrier(SIMT_HERE) {
    simt::vote("wave_barrier", true, file, line);
}
inline void __builtin_amdgcn_fence(int, const char*) {}

inline float __builtin_amdgcn_exp2f(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
