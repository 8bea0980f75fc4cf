// AMD's side of mma.cuh: MFMA of CDNA (gfx90a and later, 64 lanes) and WMMA of RDNA 3 (gfx11, 32 lanes). Layouts as in
// AMD's matrix instruction calculator.
//
// Products are turned: the unit computes b^T a^T, so that a lane has one query row of a tile, number lane % 16. In
// MFMA's layout its sums, four neighbouring columns, then are, packed, the left operand of the next product; in WMMA's
// it has every other column, and gets the rest from its partner, lane ^ 16. There are no asynchronous copies.
#pragma once

#include <type_traits>

#include "gpu/device.cuh"

// The host's pass compiles what it never runs.
#if !defined(__HIP_DEVICE_COMPILE__) || defined(__GFX9__) || defined(__GFX11__)
#define BATCHINFER_MMA 1
#else
#define BATCHINFER_MMA 0
#endif

#if BATCHINFER_MMA

namespace batchinfer::gpu {

using SharedAddress = unsigned char*;

__device__ __forceinline__ SharedAddress shared_address(unsigned char* p) {
    return p;
}
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool wanted) {
    *reinterpret_cast<uint4*>(to) = wanted ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}
__device__ __forceinline__ void copy_commit() {}
template <int Left>
__device__ __forceinline__ void copy_wait() {}

struct Tile {
    static constexpr int kNumbers = 256 / kWarp;
    static constexpr int kRows = 1;
    float x[kNumbers];

    __device__ __forceinline__ static constexpr int row(int lane, int) { return lane % 16; }
    __device__ __forceinline__ static constexpr int row_of(int) { return 0; }
    __device__ __forceinline__ static constexpr int column(int lane, int i) {
        return kWarp == 64 ? lane / 16 * 4 + i : 2 * i + lane / 16;
    }
    __device__ __forceinline__ static constexpr bool leads(int lane) { return lane < 16; }
};

template <class Op>
__device__ __forceinline__ float across_row(float x, Op op) {
    x = op(x, shuffle_xor(x, 16));
    if constexpr (kWarp == 64) x = op(x, shuffle_xor(x, 32));
    return x;
}

// MFMA: row lane % 16, four numbers from lane / 16 * 4 on. WMMA: all sixteen of row lane % 16, in both halves of the
// warp.
struct Operand {
    static constexpr int kWords = kWarp == 64 ? 2 : 8;
    uint32_t word[kWords];

    __device__ __forceinline__ static constexpr int left_row(int lane, int) { return lane % 16; }
    __device__ __forceinline__ static constexpr int left_column(int lane, int i) {
        return (kWarp == 64 ? lane / 16 * 4 : 0) + 2 * i;
    }
};

template <class At>
__device__ __forceinline__ void load_left(Operand& a, At at) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kWarp == 64) {
        const uint2 words = *reinterpret_cast<const uint2*>(at(lane % 16, lane / 32) + lane / 16 % 2 * 8);
        a.word[0] = words.x, a.word[1] = words.y;
    } else {
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
            const uint4 words = *reinterpret_cast<const uint4*>(at(lane % 16, piece));
            a.word[4 * piece] = words.x, a.word[4 * piece + 1] = words.y;
            a.word[4 * piece + 2] = words.z, a.word[4 * piece + 3] = words.w;
        }
    }
}
template <class At>
__device__ __forceinline__ void load_right(Operand& b, At at) {
    load_left(b, at);
}
// Number by number: no instruction turns a tile.
template <class At>
__device__ __forceinline__ void load_right_transposed(Operand& b, At at) {
    const int lane = threadIdx.x % kWarp, column = lane % 16;
    const auto number = [&](int row) -> uint32_t {
        return *reinterpret_cast<const uint16_t*>(at(row, column / 8) + column % 8 * 2);
    };
#pragma unroll
    for (int i = 0; i < Operand::kWords; ++i) {
        const int row = Operand::left_column(lane, i);
        b.word[i] = number(row) | number(row + 1) << 16;
    }
}

template <class T>
__device__ __forceinline__ Operand rounded(const Tile& c) {
    Operand a;
    if constexpr (kWarp == 64) {
        a.word[0] = pack2<T>(c.x[0], c.x[1]), a.word[1] = pack2<T>(c.x[2], c.x[3]);
    } else {
        const bool upper = threadIdx.x % kWarp >= 16;
#pragma unroll
        for (int i = 0; i < Operand::kWords; ++i) {
            const float other = shuffle_xor(c.x[i], 16);
            a.word[i] = upper ? pack2<T>(other, c.x[i]) : pack2<T>(c.x[i], other);
        }
    }
    return a;
}

// A lane's numbers of an operand, and its sums, as the compiler's built-ins want them.
#if defined(__GFX11__)
typedef short Bf16s __attribute__((vector_size(32)));
typedef _Float16 F16s __attribute__((vector_size(32)));
typedef float Sums __attribute__((vector_size(32)));
#else
typedef short Bf16s __attribute__((vector_size(8)));
typedef _Float16 F16s __attribute__((vector_size(8)));
typedef float Sums __attribute__((vector_size(16)));
#endif

template <class T>
__device__ __forceinline__ void multiply_add(Tile& c, const Operand& a, const Operand& b) {
    using Numbers = std::conditional_t<std::is_same_v<T, bf16>, Bf16s, F16s>;
    const auto left = __builtin_bit_cast(Numbers, b), right = __builtin_bit_cast(Numbers, a);
    auto sums = __builtin_bit_cast(Sums, c);
#if defined(__GFX11__)
    if constexpr (std::is_same_v<T, bf16>) {
        sums = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(left, right, sums);
    } else {
        sums = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(left, right, sums);
    }
#else
    if constexpr (std::is_same_v<T, bf16>) {
        sums = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(left, right, sums, 0, 0, 0);
    } else {
        sums = __builtin_amdgcn_mfma_f32_16x16x16f16(left, right, sums, 0, 0, 0);
    }
#endif
    c = __builtin_bit_cast(Tile, sums);
}

__device__ __forceinline__ float highest(const Tile& c, int) {
    float x = c.x[0];
#pragma unroll
    for (int i = 1; i < Tile::kNumbers; ++i) {
        x = fmaxf(x, c.x[i]);
    }
    return x;
}

template <class T, class At>
__device__ __forceinline__ void store_row(const Tile& c, int, float factor, At at) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kWarp == 64) {
        T* to = at(Tile::column(lane, 0));
        const float x[4] = {c.x[0] * factor, c.x[1] * factor, c.x[2] * factor, c.x[3] * factor};
        if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
        } else {
            *reinterpret_cast<uint2*>(to) = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])};
        }
    } else {
#pragma unroll
        for (int i = 0; i < Tile::kNumbers; ++i) {
            *at(Tile::column(lane, i)) = from_float<T>(c.x[i] * factor);
        }
    }
}

}  // namespace batchinfer::gpu

#endif  // BATCHINFER_MMA
