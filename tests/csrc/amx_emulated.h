// The tile instructions that kernels/gemm_amx.cpp uses, in plain C++, for machines without AMX: included before it in
// the place of the compiler's. Operations and conditions are those of Intel's Software Developer's Manual, volume 2;
// where the processor would fault, the test ends. Tiles hold bytes, and every thread has its own eight.
#pragma once

#define BATCHINFER_EMULATE_AMX 1

#include <cmath>
#include <cstdint>
#include <cstring>

#include "check.h"

namespace batchinfer::amx_emulated {

struct Tile {
    int rows = 0, row_bytes = 0;  // 0: not configured
    uint8_t bytes[16][64] = {};

    template <class T>
    T get(int row, int index) const {
        T value;
        std::memcpy(&value, &bytes[row][index * sizeof(T)], sizeof(T));
        return value;
    }
    template <class T>
    void set(int row, int index, T value) {
        std::memcpy(&bytes[row][index * sizeof(T)], &value, sizeof(T));
    }
};

inline thread_local Tile tiles[8];

inline Tile& configured(int i) {
    CHECK(tiles[i].rows > 0 && tiles[i].row_bytes > 0);
    return tiles[i];
}

inline void release() {
    for (Tile& tile : tiles)
        tile = {};
}

inline void load_config(const void* config) {
    const auto* at = static_cast<const uint8_t*>(config);
    CHECK(at[0] == 1 && at[1] == 0);  // palette, start row
    for (int i = 2; i < 16; ++i)
        CHECK(at[i] == 0);
    release();
    for (int i = 0; i < 8; ++i) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, at + 16 + 2 * i, sizeof(row_bytes));
        tiles[i].row_bytes = row_bytes;
        tiles[i].rows = at[48 + i];
        CHECK(tiles[i].rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0);
    }
}

inline void zero(int i) {
    std::memset(configured(i).bytes, 0, sizeof(Tile::bytes));
}

inline void load(int i, const void* base, int64_t stride) {
    zero(i);
    for (int r = 0; r < tiles[i].rows; ++r)
        std::memcpy(tiles[i].bytes[r], static_cast<const char*>(base) + r * stride, tiles[i].row_bytes);
}

inline void store(int i, void* base, int64_t stride) {
    const Tile& tile = configured(i);
    for (int r = 0; r < tile.rows; ++r)
        std::memcpy(static_cast<char*>(base) + r * stride, tile.bytes[r], tile.row_bytes);
}

// Calls f(a's row, word of b, sums' tile) for each sum of a product of tiles whose shapes fit.
template <class F>
void for_sums(int sums, int a, int b, F f) {
    CHECK(sums != a && sums != b && a != b);
    CHECK(configured(sums).rows == configured(a).rows && tiles[sums].row_bytes == configured(b).row_bytes);
    CHECK(tiles[a].row_bytes == 4 * tiles[b].rows);
    for (int m = 0; m < tiles[a].rows; ++m) {
        for (int n = 0; n < tiles[b].row_bytes / 4; ++n)
            f(m, n, tiles[sums]);
    }
}

inline float flushed(float x) {
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

inline float from_bf16(uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return flushed(x);
}

// TDPBF16PS: even and odd k are summed apart, from 0, and then added to the sum.
inline void dot_bf16(int sums, int a, int b) {
    for_sums(sums, a, b, [&](int m, int n, Tile& to) {
        float part[2] = {};
        for (int k = 0; k < tiles[b].rows; ++k) {
            for (int i = 0; i < 2; ++i) {
                const float x = from_bf16(tiles[a].get<uint16_t>(m, 2 * k + i));
                part[i] = flushed(std::fma(x, from_bf16(tiles[b].get<uint16_t>(k, 2 * n + i)), part[i]));
            }
        }
        to.set(m, n, flushed(flushed(to.get<float>(m, n)) + flushed(part[0] + part[1])));
    });
}

// TDPBSUD: signed bytes of a times unsigned bytes of b.
inline void dot_signed_unsigned(int sums, int a, int b) {
    for_sums(sums, a, b, [&](int m, int n, Tile& to) {
        uint32_t sum = to.get<uint32_t>(m, n);  // wraps
        for (int k = 0; k < 4 * tiles[b].rows; ++k)
            sum += static_cast<uint32_t>(tiles[a].get<int8_t>(m, k) * tiles[b].get<uint8_t>(k / 4, 4 * n + k % 4));
        to.set(m, n, sum);
    });
}

}  // namespace batchinfer::amx_emulated

#define _tile_loadconfig(config) batchinfer::amx_emulated::load_config(config)
#define _tile_release() batchinfer::amx_emulated::release()
#define _tile_zero(tile) batchinfer::amx_emulated::zero(tile)
#define _tile_loadd(tile, base, stride) batchinfer::amx_emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) batchinfer::amx_emulated::store(tile, base, stride)
#define _tile_dpbf16ps(sums, a, b) batchinfer::amx_emulated::dot_bf16(sums, a, b)
#define _tile_dpbsud(sums, a, b) batchinfer::amx_emulated::dot_signed_unsigned(sums, a, b)
