#include "cpu/gemm.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/scratch.h"

namespace batchinfer {
namespace {

// Rows packed together; one tile of them is in use at a time.
constexpr int64_t kBlockRows = 104;
// Weights of a task, per depth slice: read from L2 (1-2 MiB) by every tile after the first.
constexpr int64_t kTaskWeightBytes = 256 * 1024;
// The kernels take up to so many panels at once.
constexpr int64_t kMinTaskPanels = 4;
// Enough tasks that a thread which lost its core for a while does not hold up the others.
constexpr int64_t kTasksPerThread = 4;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace

PackedWeight::PackedWeight(const GemmKernel& kernel, Dtype dtype, const void* weight, int64_t outputs, int64_t depth,
                           ThreadPool& pool)
    : kernel_(kernel),
      dtype_(dtype),
      outputs_(outputs),
      depth_(depth),
      panels_(ceil_div(outputs, kernel.panel_columns)),
      panel_bytes_(kernel.panel_bytes(dtype, depth)),
      data_(static_cast<std::byte*>(::operator new[](panels_* panel_bytes_, std::align_val_t{64}))) {
    const size_t row_bytes = depth * (dtype == Dtype::float32 ? sizeof(float) : sizeof(uint16_t));
    pool.parallel_for(panels_, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i * kernel.panel_columns;
            kernel.pack_panel(dtype, static_cast<const std::byte*>(weight) + first * row_bytes,
                              std::min<int64_t>(kernel.panel_columns, outputs - first), depth,
                              data_.get() + i * panel_bytes_);
        }
    });
}

void PackedWeight::multiply(const float* x, int64_t rows, const float* bias, float* out, ThreadPool& pool) const {
    if (rows == 0 || outputs_ == 0) return;
    // Row blocks of nearly equal size, cut at whole tiles.
    const int64_t tiles = ceil_div(rows, kernel_.tile_rows);
    const int64_t row_blocks = ceil_div(rows, kBlockRows);
    const int64_t tile_rows = ceil_div(rows, tiles);
    const int64_t block_rows = ceil_div(tiles, row_blocks) * tile_rows;
    // Panels of a task: what fits into L2, less where that would leave threads without work.
    const int64_t fair = panels_ * row_blocks / (kTasksPerThread * pool.size());
    const int64_t slice_bytes = kernel_.panel_bytes(dtype_, std::min(depth_, kDepthSlice));
    const int64_t least = std::min(kMinTaskPanels, ceil_div(panels_, pool.size()));
    const int64_t task_panels = std::max(least, std::min(fair, kTaskWeightBytes / slice_bytes));
    const int64_t column_blocks = ceil_div(panels_, task_panels);
    const int64_t tasks = ceil_div(rows, block_rows) * column_blocks;

    std::atomic<int64_t> next{0};
    pool.run([&](int, int) {
        std::byte* packed = nullptr;
        int64_t packed_block = -1;
        for (int64_t task = next++; task < tasks; task = next++) {
            const int64_t block = task / column_blocks, first_row = block * block_rows;
            const int64_t count = std::min(block_rows, rows - first_row);
            if (block != packed_block) {
                packed = thread_scratch(block_rows * kernel_.packed_row_bytes(dtype_, depth_));
                kernel_.pack_rows(dtype_, x + first_row * depth_, count, depth_, packed);
                packed_block = block;
            }
            const int64_t first_panel = task % column_blocks * task_panels;
            const int64_t first_column = first_panel * kernel_.panel_columns;
            const int64_t columns = std::min(task_panels * kernel_.panel_columns, outputs_ - first_column);
            kernel_.multiply(dtype_, packed, count, depth_, panel(first_panel), columns,
                             bias ? bias + first_column : nullptr, out + first_row * outputs_ + first_column, outputs_);
        }
    });
}

}  // namespace batchinfer
