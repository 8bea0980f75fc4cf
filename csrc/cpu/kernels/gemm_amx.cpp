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
#include "cpu/kernels/gemm_amx.h"

#if BATCHINFER_AMX

#include "cpu/kernels/gemm_output.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/packed_codes.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

constexpr int kTileRows = 16;       // most that a register has
constexpr int64_t kTileBytes = 64;  // of k in a row of activations
constexpr int64_t kStepWords = kTileBytes / 4;
constexpr int64_t kPanelRow = 4 * kPanel;         // bytes: a word of k of each column
constexpr int64_t kColumnsBytes = kPanelRow / 2;  // of one tile
static_assert(kColumnsBytes <= 64 && kAmxRows == 2 * kTileRows);

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

struct Bf16Tiles {
    static constexpr int64_t kDepth = kTileBytes / 2;      // of a step
    static constexpr int64_t kRowBytes = 2 * kDepthBlock;  // of a row in a depth block
    static constexpr int64_t kScaleBytes = 0;              // behind a panel's words
    static int64_t words(int64_t depth) { return (depth + 1) / 2; }
    static void dot() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    static void dot_more_rows() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    static void dot_more_columns() {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
    }
    static void finish(const void*, int64_t, int64_t, int64_t, int, const char*, float*, int64_t) {}
};

struct Int8Tiles {
    static constexpr int64_t kDepth = kTileBytes;
    static constexpr int64_t kRowBytes = kDepthBlock;
    static constexpr int64_t kScaleBytes = kPanel * sizeof(float);
    static int64_t words(int64_t depth) { return (depth + 3) / 4; }
    static void dot() {  // signed activations, unsigned weights
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
    }
    static void dot_more_rows() {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    static void dot_more_columns() {
        _tile_dpbsud(2, 4, 6);
        _tile_dpbsud(3, 4, 7);
    }
    // The sums of a panel, integers until then, times the scales of their row and column.
    static void finish(const void* packed, int64_t rows, int64_t depth, int64_t row, int count, const char* panel,
                       float* part, int64_t stride) {
        const PackedRows x(packed, rows, depth, 1);
        const auto* scales = reinterpret_cast<const float*>(panel + words(depth) * kPanelRow);
        for (int r = 0; r < count; ++r, part += stride) {
            const Ints zero = kInt8Zero * x.total(row + r) - Ints{};
            for (int c = 0; c < kPanel; c += Vec::W) {
                const Vec whole = {__builtin_convertvector(bits_as<Ints>(Vec::load(part + c).v) - zero, Floats)};
                (whole * (Vec::load(scales + c) * Vec::broadcast(x.scale[row + r]))).store(part + c);
            }
        }
    }
};

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
    Format::dot();
    if constexpr (kMoreRows) {
        _tile_loadd(5, step.x + kTileRows * step.x_stride, step.x_stride);
        Format::dot_more_rows();
    }
    if constexpr (kMoreColumns) {
        _tile_loadd(6, step.w[1], kPanelRow);
        _tile_loadd(7, step.w[1] + kColumnsBytes, kPanelRow);
        Format::dot_more_columns();
    }
}

// A depth's end that fills no tile, with zeros behind it.
struct Rest {
    alignas(64) char x[kAmxRows * kTileBytes] = {};
    alignas(64) char w[2][kStepWords * kPanelRow] = {};
};

// The activations of a task.
struct Packed {
    const void* data;
    int64_t rows, depth;

    // 64 bytes of k of a row.
    template <class Format>
    const char* at(int64_t row, int64_t step) const {
        const int64_t k = step * Format::kDepth;
        return static_cast<const char*>(data) + (k / kDepthBlock * rows + row) * Format::kRowBytes +
               k % kDepthBlock * kTileBytes / Format::kDepth;
    }
};

// Sums of `count` rows from `row` on and of one panel, or with kMoreColumns two, to part [count, panels * kPanel].
template <class Format, bool kMoreRows, bool kMoreColumns>
void sum_up(const Packed& x, int64_t row, int count, const char* const (&panels)[2], float* part) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t steps = x.depth / Format::kDepth, words = Format::words(x.depth % Format::kDepth);
    constexpr int64_t kStepBytes = kStepWords * kPanelRow;
    for (int64_t i = 0; i < steps; ++i) {
        add<Format, kMoreRows, kMoreColumns>(
            {x.at<Format>(row, i), Format::kRowBytes, {panels[0] + i * kStepBytes, panels[1] + i * kStepBytes}});
    }
    if (words > 0) {
        Rest rest;
        for (int r = 0; r < count; ++r)
            __builtin_memcpy(rest.x + r * kTileBytes, x.at<Format>(row + r, steps), words * 4);
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

template <class Format, class Output>
void multiply(const void* packed, int64_t rows, int64_t depth, const void* weights, const GemmOutput& to, Coming) {
    const Packed x = {packed, rows, depth};
    const int64_t panel_bytes = Format::words(depth) * kPanelRow + Format::kScaleBytes;
    const int64_t panels = (to.columns + Output::kColumns - 1) / Output::kColumns;
    const int64_t blocks = (rows + kAmxRows - 1) / kAmxRows;
    for (int64_t i = 0, shaped = 0; i < blocks; ++i) {
        const int64_t row = rows * i / blocks;
        const int count = static_cast<int>(rows * (i + 1) / blocks - row);
        if (count != shaped) TileShapes(count).use();
        shaped = count;
        const auto* panel = static_cast<const char*>(weights);
        for (int64_t p = 0, n; p < panels; p += n, panel += n * panel_bytes) {
            alignas(64) float part[kAmxRows * kPanel];
            n = count <= kTileRows && p + 2 <= panels ? 2 : 1;
            const auto sum = count > kTileRows ? sum_up<Format, true, false>
                             : n == 2          ? sum_up<Format, false, true>
                                               : sum_up<Format, false, false>;
            sum(x, row, count, {panel, panel + panel_bytes}, part);
            for (int64_t j = 0; j < n; ++j) {
                Format::finish(packed, rows, depth, row, count, panel + j * panel_bytes, part + j * kPanel, n * kPanel);
                Output::write(part + j * kPanel, n * kPanel, count, row, (p + j) * Output::kColumns, to);
            }
        }
    }
    _tile_release();
}

}  // namespace

void multiply_bfloat16_on_tiles(const void* x, int64_t rows, int64_t depth, const void* panels, const GemmOutput& to,
                                Coming coming) {
    multiply<Bf16Tiles, PlainOutput>(x, rows, depth, panels, to, coming);
}
void multiply_bfloat16_gated_on_tiles(const void* x, int64_t rows, int64_t depth, const void* panels,
                                      const GemmOutput& to, Coming coming) {
    multiply<Bf16Tiles, GatedOutput>(x, rows, depth, panels, to, coming);
}
void multiply_int8_on_tiles(const void* x, int64_t rows, int64_t depth, const void* panels, const GemmOutput& to,
                            Coming coming) {
    multiply<Int8Tiles, PlainOutput>(x, rows, depth, panels, to, coming);
}
void multiply_int8_gated_on_tiles(const void* x, int64_t rows, int64_t depth, const void* panels, const GemmOutput& to,
                                  Coming coming) {
    multiply<Int8Tiles, GatedOutput>(x, rows, depth, panels, to, coming);
}

}  // namespace batchinfer::BATCHINFER_ISA

#endif
