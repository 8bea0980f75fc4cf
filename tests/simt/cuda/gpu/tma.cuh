// csrc/gpu/tma.cuh for the emulator. A box comes in 16-byte pieces, each to the place that the 128-byte swizzle gives
// its address (bits 4 to 6 turned by bits 7 to 9), early or late as other asynchronous copies do; pieces outside the
// matrix are zeros.
#pragma once

#include "gpu/wgmma.cuh"

#define __grid_constant__

namespace batchinfer::gpu {

inline constexpr int kBoxColumns = 64;

struct BoxMap {
    const unsigned char* matrix;
    int64_t rows;
    int columns, box_rows;
};

inline BoxMap box_map(const void* matrix, int64_t rows, int columns, int box_rows) {
    return {static_cast<const unsigned char*>(matrix), rows, columns, box_rows};
}

inline void barrier_arrive_expecting(uint32_t barrier, int arrivals, int bytes) {
    simt::block().phase_arrive(barrier, arrivals, bytes);
}

inline void copy_box(uint32_t to, const BoxMap& map, int row, int column, uint32_t barrier) {
    if (to % 128) simt::block().fail("a box to an address that 128 does not divide");
    if (row < 0 || row >= map.rows || column < 0 || column >= map.columns) {
        simt::block().fail("a box that begins outside its matrix");
    }
    for (int r = 0; r < map.box_rows; ++r) {
        for (int piece = 0; piece < kBoxColumns / 8; ++piece) {
            const uint32_t place = to + r * kBoxColumns * 2 + piece * 16;
            const bool inside = row + r < map.rows && column + piece * 8 < map.columns;
            const int64_t element = (int64_t{row} + r) * map.columns + column + piece * 8;
            simt::block().copy(place ^ (place >> 7 & 7) << 4, inside ? map.matrix + element * 2 : nullptr);
        }
    }
    simt::block().phase_count_after_copies(barrier, map.box_rows * kBoxColumns * 2);
}

}  // namespace batchinfer::gpu
