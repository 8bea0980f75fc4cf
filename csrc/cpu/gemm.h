// linear: out = x W^T + bias, with weights packed once at load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/kernels/gemm.h"
#include "cpu/parallel.h"

namespace batchinfer {

class PackedWeight {
  public:
    // `weight` [outputs, depth], contiguous. Packed on `pool`, so that its threads touch the pages first. `kernel` must
    // outlive the weight (kernel tables are static).
    PackedWeight(const GemmKernel& kernel, Dtype dtype, const void* weight, int64_t outputs, int64_t depth,
                 ThreadPool& pool);

    int64_t outputs() const { return outputs_; }
    int64_t depth() const { return depth_; }
    size_t bytes() const { return panels_ * panel_bytes_; }

    // out [rows, outputs] = x [rows, depth] times the weight transposed, + bias [outputs] unless it is null.
    void multiply(const float* x, int64_t rows, const float* bias, float* out, ThreadPool& pool) const;

  private:
    struct Free {
        void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };

    const std::byte* panel(int64_t index) const { return data_.get() + index * panel_bytes_; }

    const GemmKernel& kernel_;
    Dtype dtype_;
    int64_t outputs_, depth_, panels_;
    size_t panel_bytes_;
    std::unique_ptr<std::byte[], Free> data_;
};

}  // namespace batchinfer
