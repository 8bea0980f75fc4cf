#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// out = x / sqrt(mean(x^2) + eps) * weight over `width` elements; out may be x.
template <class T>
inline void rms_norm_row(const float* x, const float* weight, int64_t width, float eps, T* out) {
    Vec sum = Vec::zero();
    for_vectors(width, [&](int64_t i, auto count) {
        const Vec v = Vec::load(x + i, count);
        sum = fma(v, v, sum);
    });
    const float mean = reduce_sum(sum) / static_cast<float>(width);
    const Vec inverse = Vec::broadcast(1.0f / __builtin_sqrtf(mean + eps));
    for_vectors(width, [&](int64_t i, auto count) {
        (Vec::load(x + i, count) * inverse * Vec::load(weight + i, count)).store(out + i, count);
    });
}

}  // namespace batchinfer::BATCHINFER_ISA
