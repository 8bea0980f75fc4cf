// HIP for the emulator: what csrc/gpu/vendor_hip.h, which is compiled as it is, uses of it and of the compiler.
#pragma once

#include "gpu_language.h"

#define SIMT_RUNTIME(name) hip##name
#include "runtime.h"

enum hipDeviceAttribute { hipDeviceAttributeMultiprocessorCount, hipDeviceAttributeComputeCapabilityMajor };
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute attribute, int) {
    const int major = simt::kLanes == 64 ? 9 : 11;
    *value = attribute == hipDeviceAttributeComputeCapabilityMajor ? major : simt::kMultiprocessors;
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

// c + a b of 16 x 16 matrices, by the layouts of AMD's matrix instruction calculator. A lane has one row of a and one
// column of b, lane % 16: of MFMA four numbers of it, from lane / 16 * 4 on; of WMMA all sixteen, and both halves of
// the warp have the same. Its sums are of column lane % 16: of MFMA rows lane / 16 * 4 + i, of WMMA 2 i + lane / 16.
namespace simt {

template <float (*number)(uint16_t), class Factors, class Sums>
Sums product(const char* operation, Factors a, Factors b, Sums c, const char* file, int line) {
    constexpr int kNumbers = sizeof(Factors) / 2, kSums = sizeof(Sums) / 4;
    constexpr bool kMfma = kNumbers == 4;
    static_assert(kMfma ? kLanes == 64 : kLanes == 32 && kNumbers == 16);
    struct Lane {
        uint16_t a[kNumbers], b[kNumbers];
    };
    struct Totals {  // Sums is a vector, and asks for more alignment than the lanes' mailbox has
        float of[kSums];
    };
    Lane mine;
    __builtin_memcpy(mine.a, &a, sizeof a);
    __builtin_memcpy(mine.b, &b, sizeof b);
    const Totals totals = block().together<Totals>(
        Site{operation, file, line}, mine, [](const Lane* in, Totals* out) __attribute__((no_sanitize_address)) {
            float left[16][16], right[16][16];
            for (int i = 0; i < kLanes; ++i) {
                if (!kMfma && __builtin_memcmp(&in[i], &in[i % 16], sizeof(Lane)) != 0) {
                    block().fail("WMMA with factors that differ between the halves of the warp");
                }
                for (int j = 0; j < kNumbers; ++j) {
                    const int k = (kMfma ? i / 16 * 4 : 0) + j;
                    left[i % 16][k] = number(in[i].a[j]), right[k][i % 16] = number(in[i].b[j]);
                }
            }
            for (int i = 0; i < kLanes; ++i) {
                for (int j = 0; j < kSums; ++j) {
                    const int row = kMfma ? i / 16 * 4 + j : 2 * j + i / 16;
                    float sum = 0;
                    for (int k = 0; k < 16; ++k) {
                        sum += left[row][k] * right[k][i % 16];
                    }
                    out[i].of[j] = sum;
                }
            }
        });
    Sums sums;
    __builtin_memcpy(&sums, totals.of, sizeof sums);
    return c + sums;
}
inline float bf16_number(uint16_t bits) {
    return std::bit_cast<float>(uint32_t{bits} << 16);
}
inline float f16_number(uint16_t bits) {
    return _cvtsh_ss(bits);
}

}  // namespace simt

template <class Factors, class Sums>
Sums __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(Factors a, Factors b, Sums c, int, int, int, SIMT_HERE) {
    return simt::product<simt::bf16_number>("mfma", a, b, c, file, line);
}
template <class Factors, class Sums>
Sums __builtin_amdgcn_mfma_f32_16x16x16f16(Factors a, Factors b, Sums c, int, int, int, SIMT_HERE) {
    return simt::product<simt::f16_number>("mfma", a, b, c, file, line);
}
template <class Factors, class Sums>
Sums __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(Factors a, Factors b, Sums c, SIMT_HERE) {
    return simt::product<simt::bf16_number>("wmma", a, b, c, file, line);
}
template <class Factors, class Sums>
Sums __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(Factors a, Factors b, Sums c, SIMT_HERE) {
    return simt::product<simt::f16_number>("wmma", a, b, c, file, line);
}
