// The softmax of a query row that sees its scores block by block: running maximum, sum and weighted values.
#pragma once

#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

inline constexpr float kNegInf = -__builtin_inff();

// Head width in the buffers: whole tiles of two vectors.
inline int64_t padded_width(int64_t head_width) {
    return (head_width + 2 * Vec::W - 1) / (2 * Vec::W) * (2 * Vec::W);
}

// Running sums of a row: weighted values [padded width], then the maximum of the scores and the sum of exponentials.
struct State {
    float* values;
    int64_t width;

    float& maximum() const { return values[width]; }
    float& sum() const { return values[width + 1]; }

    void clear() const {
        for (int64_t i = 0; i < width; i += Vec::W)
            Vec::zero().store(values + i);
        maximum() = kNegInf;
        sum() = 0.0f;
    }

    void add(State other) const {
        if (other.maximum() == kNegInf) return;  // the row lies before the other split
        const float top = maximum() > other.maximum() ? maximum() : other.maximum();
        const Vec mine = exp(Vec::broadcast(maximum() - top)), theirs = exp(Vec::broadcast(other.maximum() - top));
        for (int64_t i = 0; i < width; i += Vec::W) {
            fma(Vec::load(values + i), mine, Vec::load(other.values + i) * theirs).store(values + i);
        }
        const Vec total = fma(Vec::broadcast(sum()), mine, Vec::broadcast(other.sum()) * theirs);
        maximum() = top;
        sum() = total.v[0];
    }
};

inline int64_t state_floats(int64_t head_width) {
    return padded_width(head_width) + Vec::W;
}

// Turns the scores of a row into exponentials, `out` (float, may be the scores; or bf16), and updates its maximum and
// sum. The row may see the scores [first, seen) of `count` computed. `out`, but not the sum, is multiplied by `scales`
// unless that is null. Returns the factor for what was summed before.
template <class T>
inline float softmax(float* scores, int64_t first, int64_t seen, int64_t count, State state, const float* scales,
                     T* out) {
    if (first >= seen || first >= count) {
        for (int64_t i = 0; i < count; i += Vec::W)
            Vec::zero().store(out + i);
        return 1.0f;
    }
    Vec top = Vec::broadcast(state.maximum());
    for (int64_t i = 0; i < count; i += Vec::W) {
        Vec s = Vec::load(scores + i);
        if (i + Vec::W > seen || i < first) {
            const Ints lane = lane_index() + static_cast<int>(i);
            const Ints visible = (lane < static_cast<int>(seen)) & (lane >= static_cast<int>(first));
            s = select(visible, s, Vec::broadcast(kNegInf));
            s.store(scores + i);
        }
        top = max(s, top);
    }
    const float maximum = reduce_max(top);
    const Vec shift = Vec::broadcast(maximum);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < count; i += Vec::W) {
        const Vec p = exp(Vec::load(scores + i) - shift);
        (scales ? p * Vec::load(scales + i) : p).store(out + i);
        sum = sum + p;
    }
    const float factor = maximum == state.maximum() ? 1.0f : exp(Vec::broadcast(state.maximum() - maximum)).v[0];
    state.maximum() = maximum;
    state.sum() = state.sum() * factor + reduce_sum(sum);
    return factor;
}

}  // namespace batchinfer::BATCHINFER_ISA
