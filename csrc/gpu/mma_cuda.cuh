// NVIDIA's side of mma.cuh: compute capability 8.0 and later.
//
// With g = lane / 4 and t = lane % 4, a lane has rows g and g + 8 of a tile, columns 2t, 2t + 1, 2t + 8 and 2t + 9; so
// a tile's sums, packed, are the left operand of a product.
#pragma once

#include "gpu/ptx.cuh"

#if BATCHINFER_MMA

namespace batchinfer::gpu {

using SharedAddress = uint32_t;

struct Tile {
    static constexpr int kNumbers = 8;  // in a lane
    static constexpr int kRows = 2;     // that a lane has numbers of
    float x[kNumbers];

    __device__ __forceinline__ static constexpr int row(int lane, int r) { return lane / 4 + 8 * r; }
    // Of number i: which of the lane's rows, and the column, which is column(lane, 0) + column(0, i).
    __device__ __forceinline__ static constexpr int row_of(int i) { return i / 2 % 2; }
    __device__ __forceinline__ static constexpr int column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
    // Whether the lane is the first of those that share its rows.
    __device__ __forceinline__ static constexpr bool leads(int lane) { return lane % 4 == 0; }
};

// x of the lanes that share a row, combined, in each of them.
template <class Op>
__device__ __forceinline__ float across_row(float x, Op op) {
    x = op(x, shuffle_xor(x, 1));
    return op(x, shuffle_xor(x, 2));
}

struct Operand {
    static constexpr int kWords = 4;
    uint32_t word[kWords];

    // Of word i of a left operand: the row, and the column of the first of its two numbers.
    __device__ __forceinline__ static constexpr int left_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
    __device__ __forceinline__ static constexpr int left_column(int lane, int i) { return i / 2 * 8 + lane % 4 * 2; }
};

// Operands from shared memory, where at(row, piece) is the address of 16 bytes, half a row of 16 numbers. Left: query
// rows. Right: a row for each column of the product. Transposed: a row for each number that the product adds up.
template <class At>
__device__ __forceinline__ void load_left(Operand& a, At at) {
    const int lane = threadIdx.x % kWarp;
    load_tiles(a.word, at(lane % 16, lane / 16));
}
template <class At>
__device__ __forceinline__ void load_right(Operand& b, At at) {
    const int lane = threadIdx.x % kWarp;
    load_tiles(b.word, at(lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
template <class At>
__device__ __forceinline__ void load_right_transposed(Operand& b, At at) {
    const int lane = threadIdx.x % kWarp;
    load_tiles_transposed(b.word, at(lane % 16, lane / 16));
}

// A tile's numbers, rounded, as a left operand.
template <class T>
__device__ __forceinline__ Operand rounded(const Tile& c) {
    return {pack2<T>(c.x[0], c.x[1]), pack2<T>(c.x[2], c.x[3]), pack2<T>(c.x[4], c.x[5]), pack2<T>(c.x[6], c.x[7])};
}

// c += a b, where b is what load_right or load_right_transposed gave.
template <class T>
__device__ __forceinline__ void multiply_add(Tile& c, const Operand& a, const Operand& b) {
    multiply_add<T>(reinterpret_cast<float (&)[4]>(c.x[0]), a.word, b.word[0], b.word[1]);
    multiply_add<T>(reinterpret_cast<float (&)[4]>(c.x[4]), a.word, b.word[2], b.word[3]);
}

__device__ __forceinline__ float highest(const Tile& c, int r) {
    return fmaxf(fmaxf(c.x[2 * r], c.x[2 * r + 1]), fmaxf(c.x[2 * r + 4], c.x[2 * r + 5]));
}

// The lane's numbers of its row r, times `factor`, to memory: at(column) is the place of a column's number, and of
// those that follow it up to the next multiple of eight.
template <class T, class At>
__device__ __forceinline__ void store_row(const Tile& c, int r, float factor, At at) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 2 * r; i < Tile::kNumbers; i += 4) {
        T* to = at(Tile::column(lane, i));
        if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float2*>(to) = {c.x[i] * factor, c.x[i + 1] * factor};
        } else {
            *reinterpret_cast<uint32_t*>(to) = pack2<T>(c.x[i] * factor, c.x[i + 1] * factor);
        }
    }
}

}  // namespace batchinfer::gpu

#endif  // BATCHINFER_MMA
