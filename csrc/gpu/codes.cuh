// Caches of e4m3 codes on their way to the matrix units, which multiply bf16 here: the copies bring codes to shared
// memory as they are, half the bytes, and from there the threads that wait for them widen them into a tile as bf16
// caches have it. Exact: bf16 has all of e4m3's numbers.
#pragma once

#include "gpu/device.cuh"

namespace batchinfer::gpu {

// The two codes in the lower half of `codes` as bf16.
__device__ __forceinline__ uint32_t widen_pair(uint32_t codes) {
#ifdef BATCHINFER_E4M3_UNIT
    const float2 pair = unpack2<f16>(f16_pair_of_e4m3(codes));
    return pack2<bf16>(pair.x, pair.y);
#else
    // The same bits at another place make floats too small by 2**120, also where they have no exponent.
    const uint32_t both = (codes & 0xff) << 8 | (codes & 0xff00) << 16, size = both & 0x7f007f00;
    const uint32_t low = float_bits(float_of(size << 12) * 0x1p120f);
    const uint32_t high = float_bits(float_of(size >> 4 & 0x07f00000) * 0x1p120f);
    const uint32_t nan = (size + 0x01000100) & 0x80008000;
    return low >> 16 | (high & 0xffff0000) | (both & 0x80008000) | (nan - (nan >> 7));
#endif
}

// kRows rows of E codes as rows of bf16 whose 16-byte pieces are permuted by the row's number, for the operands' loads.
// By kThreads threads, of which this is number `thread`.
template <int E, int kRows, int kThreads>
__device__ __forceinline__ void widen_rows(const unsigned char* from, unsigned char* to, int thread) {
    constexpr int kPieces = E / 8;
#pragma unroll 4
    for (int i = thread; i < kRows * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const uint2 codes = reinterpret_cast<const uint2*>(from)[i];
        *reinterpret_cast<uint4*>(to + row * E * 2 + (piece ^ row % 8) * 16) =
            make_uint4(widen_pair(codes.x), widen_pair(codes.x >> 16), widen_pair(codes.y), widen_pair(codes.y >> 16));
    }
}

}  // namespace batchinfer::gpu
