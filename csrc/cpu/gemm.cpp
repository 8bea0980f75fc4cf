#include "cpu/gemm.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/scratch.h"

namespace batchinfer {
namespace {

// The first line that holds a product is its blocking, as measured by tests/csrc/bench_products.cpp (Zen 5, two cores):
// one row waits for memory, which comes faster to long tasks; more rows leave time to bring the next task's weights to
// L2, where both must fit; and many columns pay for rows that are packed by every thread, as their weights are then
// read once for 208 rows (192 rows: 5-35 % faster with 3,072 columns and more, 1-15 % slower with fewer).
constexpr struct {
    int64_t rows, columns;  // up to so many
    Blocking blocking;
} kBlockings[] = {{9, INT64_MAX, {104, 256 << 10, 4}},
                  {104, INT64_MAX, {104, 128 << 10, 4}},
                  {INT64_MAX, 3071, {104, 128 << 10, 4}},
                  {INT64_MAX, INT64_MAX, {208, 256 << 10, 4}}};
// The kernels take up to so many panels at once, if there are fewer than so many rows.
constexpr int64_t kPanelsAtOnce = 4, kFewRows = 6;

size_t size_of(Dtype dtype) {
    return dtype == Dtype::float32 ? sizeof(float) : sizeof(uint16_t);
}
int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
int64_t round_up(int64_t n, int64_t multiple) {
    return ceil_div(n, multiple) * multiple;
}

}  // namespace

const Blocking& Blocking::of(int64_t rows, int64_t columns) {
    const auto holds = [&](const auto& line) { return rows <= line.rows && columns <= line.columns; };
    return std::ranges::find_if(kBlockings, holds)->blocking;
}

PackedWeight::PackedWeight(const GemmKernel& kernel, int64_t outputs, int64_t depth, bool gated,
                           std::shared_ptr<std::byte> memory)
    : kernel_(kernel),
      outputs_(gated ? outputs / 2 : outputs),
      depth_(depth),
      gated_(gated),
      panel_outputs_(gated ? kernel.panel_columns / 2 : kernel.panel_columns),
      panels_(ceil_div(outputs_, panel_outputs_)),
      panel_bytes_(kernel.panel_bytes(depth)),
      data_(memory ? std::move(memory) : huge_pages(bytes())) {}

size_t PackedWeight::bytes_of(const GemmKernel& kernel, int64_t outputs, int64_t depth, bool gated) {
    // A gated panel has half as many outputs, and as many weights.
    const int64_t columns = gated ? kernel.panel_columns / 2 : kernel.panel_columns;
    return ceil_div(gated ? outputs / 2 : outputs, columns) * kernel.panel_bytes(depth);
}

void PackedWeight::pack(const WeightRow& rows, ThreadPool& pool) {
    const size_t value_bytes = depth_ * kernel_.value_bytes;
    const int64_t block = kernel_.scale_block;
    const size_t scale_bytes = block > 0 ? depth_ / block * sizeof(uint16_t) : block == kRowScale ? sizeof(float) : 0;
    const auto row = [&](int64_t i) -> WeightRow {
        const auto at = [&](const void* p, size_t stride) { return static_cast<const std::byte*>(p) + i * stride; };
        return {at(rows.values, value_bytes), at(rows.scales, scale_bytes), at(rows.minima, scale_bytes)};
    };
    pool.parallel_for(panels_, [&](int64_t begin, int64_t end, int) {
        std::vector<WeightRow> columns(kernel_.panel_columns);
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t c = 0; c < kernel_.panel_columns; ++c) {
                const int64_t output = i * panel_outputs_ + c % panel_outputs_;
                columns[c] = output < outputs_ ? row(output + c / panel_outputs_ * outputs_) : WeightRow{};
            }
            kernel_.pack_panel(columns.data(), depth_, data_.get() + i * panel_bytes_);
        }
    });
}

void PackedWeight::multiply(Dtype x_dtype, const void* x, int64_t rows, const float* bias, Dtype out_dtype, void* out,
                            ThreadPool& pool, const Blocking& blocking) const {
    if (rows == 0 || outputs_ == 0) return;
    // Row blocks of nearly equal size, cut at whole tiles.
    const int64_t tiles = ceil_div(rows, kernel_.tile_rows);
    const int64_t row_blocks = ceil_div(rows, blocking.rows);
    const int64_t tile_rows = ceil_div(rows, tiles);
    const int64_t block_rows = ceil_div(tiles, row_blocks) * tile_rows;
    // Panels of a task: what fits into L2, less where that would leave threads without work; cut evenly, and for few
    // rows at what the kernels take at once.
    const int64_t fair = panels_ * row_blocks / (blocking.tasks_per_thread * pool.size());
    const int64_t slice_bytes = kernel_.panel_bytes(std::min(depth_, kDepthSlice));
    const int64_t least = std::min(kPanelsAtOnce, ceil_div(panels_, pool.size()));
    const int64_t wanted = std::max(least, std::min(fair, blocking.weight_bytes / slice_bytes));
    const int64_t unit = rows < kFewRows ? least : 1;
    const int64_t units = ceil_div(panels_, unit);
    const int64_t column_blocks = std::min(units, round_up(ceil_div(panels_, wanted), pool.size()));
    const int64_t task_panels = ceil_div(units, column_blocks) * unit;  // at most
    const auto begin_of = [&](int64_t i) { return std::min(units * i / column_blocks * unit, panels_); };
    const int64_t tasks = ceil_div(rows, block_rows) * column_blocks;
    const int64_t packed_bytes = block_rows * kernel_.packed_row_bytes(depth_);
    const int64_t sums_bytes =
        gated_ && depth_ > kernel_.depth_slice ? block_rows * task_panels * kernel_.panel_columns * sizeof(float) : 0;

    TaskShares shares(tasks, pool.size());
    pool.run([&](int thread, int) {
        std::byte* const packed = thread_scratch(packed_bytes + sums_bytes);
        int64_t packed_block = -1;
        for (int64_t task = shares.take(thread); task >= 0; task = shares.take(thread)) {
            const int64_t block = task / column_blocks, first_row = block * block_rows;
            const int64_t count = std::min(block_rows, rows - first_row);
            const auto at = [&](const void* p, Dtype dtype, int64_t width, int64_t column) -> Rows {
                return {static_cast<const std::byte*>(p) + (first_row * width + column) * size_of(dtype), dtype, width};
            };
            if (block != packed_block) {
                kernel_.pack_rows(at(x, x_dtype, depth_, 0), count, depth_, packed);
                packed_block = block;
            }
            const int64_t first_panel = begin_of(task % column_blocks), column = first_panel * panel_outputs_;
            const int64_t end_panel = begin_of(task % column_blocks + 1);
            const GemmOutput to = {at(out, out_dtype, outputs_, column),
                                   std::min((end_panel - first_panel) * panel_outputs_, outputs_ - column),
                                   bias ? bias + column : nullptr, bias && gated_ ? bias + outputs_ + column : nullptr,
                                   reinterpret_cast<float*>(packed + packed_bytes)};
            Coming coming = {};
            if (shares.goes_on(thread, task)) {  // with the same rows, or with the first panels again
                const int64_t next = (task + 1) % column_blocks;
                coming = {reinterpret_cast<const char*>(panel(begin_of(next))),
                          reinterpret_cast<const char*>(panel(begin_of(next + 1)))};
            }
            const auto multiply = gated_ ? kernel_.multiply_gated : kernel_.multiply;
            multiply(packed, count, depth_, panel(first_panel), to, coming);
        }
    });
}

}  // namespace batchinfer
