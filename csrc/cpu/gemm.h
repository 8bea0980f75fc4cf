// linear: out = x W^T + bias, with weights packed once at load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/kernels/gemm.h"
#include "cpu/parallel.h"

namespace batchinfer {

// How a product is cut into tasks. It decides what stays in which cache, and no bit of the results.
struct Blocking {
    int64_t rows;              // packed together; one tile of them is in use at a time
    int64_t weight_bytes;      // of a task, per depth slice: read from L2 by every tile after the first
    int64_t tasks_per_thread;  // at least: a thread that lost its core for a while does not hold up the others

    // The fastest for so many rows and columns.
    static const Blocking& of(int64_t rows, int64_t columns);
};

class PackedWeight {
  public:
    // Of a weight [outputs, depth]. `gated`: its first half are the gates of the second. `memory` holds bytes() of what
    // pack() has packed for the same kernel, or is to hold it; null: new memory. `kernel` must outlive the weight
    // (kernel tables are static).
    PackedWeight(const GemmKernel& kernel, int64_t outputs, int64_t depth, bool gated,
                 std::shared_ptr<std::byte> memory = nullptr);

    // What bytes() will be.
    static size_t bytes_of(const GemmKernel& kernel, int64_t outputs, int64_t depth, bool gated);

    // Packs the weight whose first row is `rows`; the others follow it. On `pool`, so that its threads touch the pages
    // first.
    void pack(const WeightRow& rows, ThreadPool& pool);

    int64_t outputs() const { return outputs_; }  // columns of what multiply() gives
    int64_t depth() const { return depth_; }
    bool gated() const { return gated_; }
    size_t bytes() const { return panels_ * panel_bytes_; }

    // out [rows, outputs] = x [rows, depth] times the weight transposed, + bias unless it is null. With a gated weight
    // silu of the gates times the rest, and `bias` has 2 * outputs. Only then may `out` be bfloat16.
    void multiply(Dtype x_dtype, const void* x, int64_t rows, const float* bias, Dtype out_dtype, void* out,
                  ThreadPool& pool) const {
        multiply(x_dtype, x, rows, bias, out_dtype, out, pool, Blocking::of(rows, gated_ ? 2 * outputs_ : outputs_));
    }
    void multiply(Dtype x_dtype, const void* x, int64_t rows, const float* bias, Dtype out_dtype, void* out,
                  ThreadPool& pool, const Blocking& blocking) const;

  private:
    const std::byte* panel(int64_t index) const { return data_.get() + index * panel_bytes_; }

    const GemmKernel& kernel_;
    int64_t outputs_, depth_;
    bool gated_;
    int64_t panel_outputs_, panels_;
    size_t panel_bytes_;
    std::shared_ptr<std::byte> data_;
};

}  // namespace batchinfer
