// How wide the tiles are that gated_sm90.cu cuts its output into, and when it should not. No device.
#pragma once

#include <cstdint>

namespace batchinfer::gpu {

inline constexpr int kGatedRows = 128;  // of a tile

// Columns of a tile: 64, 112 or 128, whichever ends first on so many multiprocessors; 0: the vendor's product is
// faster.
//
// A tile's time goes with its columns, and rounds of as many tiles as there are multiprocessors follow one another. The
// costs are those that order what an H100 took for 192 to 8,192 rows of 4,096 -> 14,336, 2,048 -> 8,192 and 1,024 ->
// 3,072: beside the columns 6 for what a tile begins and ends with, and 128 columns, whose sums leave few registers,
// cost 4 more. Few rows are bound by their weights, and 160 take as long either way. From 257 rows on, where the matrix
// unit bounds both, rounds and tiles that stay a quarter empty lose to cuBLAS, which divides the depth.
inline int gated_columns(int64_t rows, int64_t width, int multiprocessors) {
    struct {
        int columns, cost;
    } constexpr kinds[] = {{64, 70}, {112, 118}, {128, 138}};
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    if (rows <= 160) return 0;
    int best = 0;
    int64_t least = INT64_MAX;
    for (const auto& kind : kinds) {
        const int64_t tiles = up(rows, kGatedRows) * up(width, kind.columns);
        const int64_t cost = up(tiles, multiprocessors) * kind.cost;
        if (cost <= least) best = kind.columns, least = cost;
    }
    const bool empty = 3 * least * multiprocessors * kGatedRows > 4 * rows * width;
    return rows > 256 && empty ? 0 : best;
}

}  // namespace batchinfer::gpu
