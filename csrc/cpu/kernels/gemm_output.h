// What becomes of the sums of a matrix product's tile: a bias, or the gate, and the way into the output.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

inline constexpr int kPanel = 2 * Vec::W;

// silu(gate) * up of `rows` rows, the first of which is `row`, and one vector of columns, the first of which is
// `column`.
template <class T>
inline void gate_as(const float* sums, int64_t sums_stride, int rows, int64_t row, int64_t column,
                    const GemmOutput& to) {
    const int count = static_cast<int>(to.columns - column < Vec::W ? to.columns - column : Vec::W);
    const Vec gate_bias = to.bias ? Vec::load(to.bias + column, count) : Vec::zero();
    const Vec up_bias = to.bias ? Vec::load(to.bias_of_gated + column, count) : Vec::zero();
    T* out = static_cast<T*>(const_cast<void*>(to.rows.data)) + row * to.rows.stride + column;
    for (int r = 0; r < rows; ++r, sums += sums_stride, out += to.rows.stride) {
        const Vec gated = silu(Vec::load(sums) + gate_bias) * (Vec::load(sums + Vec::W) + up_bias);
        count == Vec::W ? gated.store(out) : gated.store(out, count);
    }
}

inline void gate(const float* sums, int64_t sums_stride, int rows, int64_t row, int64_t column, const GemmOutput& to) {
    const auto as = to.rows.dtype == Dtype::float32 ? gate_as<float> : gate_as<bf16>;
    as(sums, sums_stride, rows, row, column, to);
}

// Where the sums of a panel go: those of `rows` rows, the first of which is `row`, and of columns from `column` on.
struct PlainOutput {
    static constexpr int64_t kColumns = kPanel;  // of the output, in a panel

    static void write(const float* part, int64_t stride, int rows, int64_t row, int64_t column, const GemmOutput& to) {
        for (int c = 0; c < 2; ++c, column += Vec::W, part += Vec::W) {
            const int count = static_cast<int>(to.columns - column < Vec::W ? to.columns - column : Vec::W);
            if (count <= 0) return;
            const Vec bias = to.bias ? Vec::load(to.bias + column, count) : Vec::zero();
            float* out = static_cast<float*>(const_cast<void*>(to.rows.data)) + row * to.rows.stride + column;
            for (int r = 0; r < rows; ++r, out += to.rows.stride)
                (Vec::load(part + r * stride) + bias).store(out, count);
        }
    }
};

struct GatedOutput {
    static constexpr int64_t kColumns = Vec::W;

    static void write(const float* part, int64_t stride, int rows, int64_t row, int64_t column, const GemmOutput& to) {
        gate(part, stride, rows, row, column, to);
    }
};

}  // namespace batchinfer::BATCHINFER_ISA
