// Matrix products on AMX tiles: bfloat16 weights, and int8 ones with activations as codes.
//
// A tile register has up to 16 rows of 64 bytes. One of weights is 16 words of k of 16 columns, which is half a panel
// as the vector kernels pack it; one of activations is 64 bytes of k of 16 rows, in bfloat16 half a depth block. So
// the packing is theirs (kernels/gemm.cpp, kernels/gemm_codes.cpp), and only the products are here.
//
// Registers 0-3 hold sums: of 32 rows times a panel, or of up to 16 rows times two panels; 4 and 5 activations, 6 and 7
// weights. Every element is summed in order of k, whatever stands beside it. int8 gives the very integers of the vector
// kernels; bfloat16 products are summed apart for even and odd k of a tile, with subnormals as 0.
//
// tests/csrc runs this with tile instructions emulated; it has not run on a processor that has them.
#include "cpu/kernels/gemm_matrices.h"

#if BATCHINFER_AMX

namespace batchinfer::BATCHINFER_ISA {
namespace {

constexpr int kTileRows = 16;       // most that a register has
constexpr int64_t kTileBytes = 64;  // of k in a row of activations
constexpr int64_t kStepWords = kTileBytes / 4;
constexpr int64_t kColumnsBytes = kPanelRow / 2;  // of one tile
static_assert(kColumnsBytes <= 64 && kMatrixRows == 2 * kTileRows);

// What the intrinsics are pointed to is in memory from here on: GCC 12 does not take them for reads.
void settle(const void* p) {
    asm volatile("" : : "r"(p) : "memory");
}

// Shapes of the tile registers for a block of 1 to 32 rows.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int count) {
        const int first = count < kTileRows ? count : kTileRows, second = count > kTileRows ? count - kTileRows : first;
        const int height[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
        for (int i = 0; i < 8; ++i) {
            rows[i] = static_cast<uint8_t>(height[i]);
            row_bytes[i] = i == 4 || i == 5 ? kTileBytes : kColumnsBytes;
        }
    }
    void use() const {
        settle(this);
        _tile_loadconfig(this);
    }
};
static_assert(sizeof(TileShapes) == 64);

void dot(Bf16Words) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
}
void dot_more_rows(Bf16Words) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}
void dot_more_columns(Bf16Words) {
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
}

void dot(Int8Words) {  // signed activations, unsigned weights
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
}
void dot_more_rows(Int8Words) {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
}
void dot_more_columns(Int8Words) {
    _tile_dpbsud(2, 4, 6);
    _tile_dpbsud(3, 4, 7);
}

// What a step reads: tiles of activations one below the other, and of one or two panels.
struct Step {
    const char* x;
    int64_t x_stride;
    const char* w[2];
};

template <class Format, bool kMoreRows, bool kMoreColumns>
void add(const Step& step) {
    _tile_loadd(4, step.x, step.x_stride);
    _tile_loadd(6, step.w[0], kPanelRow);
    _tile_loadd(7, step.w[0] + kColumnsBytes, kPanelRow);
    dot(Format{});
    if constexpr (kMoreRows) {
        _tile_loadd(5, step.x + kTileRows * step.x_stride, step.x_stride);
        dot_more_rows(Format{});
    }
    if constexpr (kMoreColumns) {
        _tile_loadd(6, step.w[1], kPanelRow);
        _tile_loadd(7, step.w[1] + kColumnsBytes, kPanelRow);
        dot_more_columns(Format{});
    }
}

// A depth's end that fills no tile, with zeros behind it.
struct Rest {
    alignas(64) char x[kMatrixRows * kTileBytes] = {};
    alignas(64) char w[2][kStepWords * kPanelRow] = {};
};

// Sums of `count` rows from `row` on and of one panel, or with kMoreColumns two, to part [count, panels * kPanel].
template <class Format, bool kMoreRows, bool kMoreColumns>
void sum_up(const PackedTask& x, int64_t row, int count, const char* const (&panels)[2], float* part) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t steps = Format::words(x.depth) / kStepWords, words = Format::words(x.depth) % kStepWords;
    constexpr int64_t kStepBytes = kStepWords * kPanelRow;
    for (int64_t i = 0; i < steps; ++i) {
        add<Format, kMoreRows, kMoreColumns>({x.at<Format>(row, i * kTileBytes),
                                              Format::kRowBytes,
                                              {panels[0] + i * kStepBytes, panels[1] + i * kStepBytes}});
    }
    if (words > 0) {
        Rest rest;
        for (int r = 0; r < count; ++r)
            __builtin_memcpy(rest.x + r * kTileBytes, x.at<Format>(row + r, steps * kTileBytes), words * 4);
        for (int p = 0; p <= kMoreColumns; ++p)
            __builtin_memcpy(rest.w[p], panels[p] + steps * kStepBytes, words * kPanelRow);
        settle(&rest);
        add<Format, kMoreRows, kMoreColumns>({rest.x, kTileBytes, {rest.w[0], rest.w[1]}});
        settle(&rest);
    }
    constexpr int64_t kStride = (1 + kMoreColumns) * kPanel, kStrideBytes = kStride * sizeof(float);
    float* const more = part + (kMoreRows ? kTileRows * kStride : kPanel);
    _tile_stored(0, part, kStrideBytes);
    _tile_stored(1, part + Vec::W, kStrideBytes);
    if constexpr (kMoreRows || kMoreColumns) {
        _tile_stored(2, more, kStrideBytes);
        _tile_stored(3, more + Vec::W, kStrideBytes);
    }
}

}  // namespace

template <class Format, class Output>
void multiply_matrices(const void* packed, int64_t rows, int64_t depth, const void* weights, const GemmOutput& to,
                       Coming) {
    const PackedTask x = {packed, rows, depth};
    const int64_t panel_bytes = Format::panel_bytes(depth);
    const int64_t panels = (to.columns + Output::kColumns - 1) / Output::kColumns;
    const int64_t blocks = (rows + kMatrixRows - 1) / kMatrixRows;
    for (int64_t i = 0, shaped = 0; i < blocks; ++i) {
        const int64_t row = rows * i / blocks;
        const int count = static_cast<int>(rows * (i + 1) / blocks - row);
        if (count != shaped) TileShapes(count).use();
        shaped = count;
        const auto* panel = static_cast<const char*>(weights);
        for (int64_t p = 0, n; p < panels; p += n, panel += n * panel_bytes) {
            alignas(64) float part[kMatrixRows * kPanel];
            n = count <= kTileRows && p + 2 <= panels ? 2 : 1;
            const auto sum = count > kTileRows ? sum_up<Format, true, false>
                             : n == 2          ? sum_up<Format, false, true>
                                               : sum_up<Format, false, false>;
            sum(x, row, count, {panel, panel + panel_bytes}, part);
            for (int64_t j = 0; j < n; ++j) {
                Format::finish(x, row, count, panel + j * panel_bytes, part + j * kPanel, n * kPanel);
                Output::write(part + j * kPanel, n * kPanel, count, row, (p + j) * Output::kColumns, to);
            }
        }
    }
    _tile_release();
}

BATCHINFER_MULTIPLY_MATRICES

}  // namespace batchinfer::BATCHINFER_ISA

#endif
