// Ops whose cost is reading and writing memory: embedding, norms, activations, row gather.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rms_norm_row.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

template <class T>
void embed_as(const EmbedArgs& a, int64_t begin, int64_t end) {
    const Vec scale = Vec::broadcast(a.scale);
    for (int64_t t = begin; t < end; ++t) {
        const T* row = static_cast<const T*>(a.table) + a.ids[t] * a.width;
        float* out = a.out + t * a.width;
        for_vectors(a.width, [&](int64_t i, auto count) { (Vec::load(row + i, count) * scale).store(out + i, count); });
    }
}

// f of the row or rows from element `at` of an op's output on.
template <class F>
void write(void* out, Dtype dtype, int64_t at, F f) {
    dtype == Dtype::bfloat16 ? f(static_cast<bf16*>(out) + at) : f(static_cast<float*>(out) + at);
}

// out = f(x) for the tokens [begin, end).
template <class F>
void map(const ActivateArgs& a, int64_t begin, int64_t end, F f) {
    const float* x = a.x + begin * a.width;
    write(a.out, a.out_dtype, begin * a.width, [&](auto* out) {
        for_vectors((end - begin) * a.width,
                    [&](int64_t i, auto count) { f(Vec::load(x + i, count)).store(out + i, count); });
    });
}

// out = f(gate) * up for the tokens [begin, end).
template <class F>
void gate(const GateArgs& a, int64_t begin, int64_t end, F f) {
    for (int64_t t = begin; t < end; ++t) {
        const float* gate = a.gate_up + t * 2 * a.width;
        const float* up = gate + a.width;
        write(a.out, a.out_dtype, t * a.width, [&](auto* out) {
            for_vectors(a.width, [&](int64_t i, auto count) {
                (f(Vec::load(gate + i, count)) * Vec::load(up + i, count)).store(out + i, count);
            });
        });
    }
}

// residual += x over `width` elements.
void add_row(const float* x, int64_t width, float* residual) {
    for_vectors(width, [&](int64_t i, auto count) {
        (Vec::load(residual + i, count) + Vec::load(x + i, count)).store(residual + i, count);
    });
}

// x / 2 * (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), written as x / (1 + e^-2u): nothing cancels.
Vec gelu_tanh(Vec x) {
    constexpr auto c = Vec::broadcast;
    return x / (c(1.0f) + exp(x * fma(x * x, c(-0.0713548163f), c(-1.59576912f))));
}

// x times the normal distribution at x, which is erfc(-x / sqrt 2) / 2.
//
// erfc(y) = e^-y^2 t p(t) for y >= 0 with t = 1 / (1 + 0.3 y), p minimax of degree 8 (relative error 2e-8), fitted for
// this file; the form is Hastings' (1955, "Approximations for Digital Computers").
Vec gelu(Vec x) {
    constexpr auto c = Vec::broadcast;
    const Vec size = max(x, Vec::zero() - x), y = size * c(0.707106781f);
    const Vec t = c(1.0f) / fma(y, c(0.3f), c(1.0f));
    Vec p = c(-0.129521996f);
    p = fma(p, t, c(0.485558808f));
    p = fma(p, t, c(-0.51226896f));
    p = fma(p, t, c(0.547709465f));
    p = fma(p, t, c(-0.0946432799f));
    p = fma(p, t, c(0.214922801f));
    p = fma(p, t, c(0.148340032f));
    p = fma(p, t, c(0.170715094f));
    p = fma(p, t, c(0.169188008f));
    const Vec tail = c(0.5f) * exp(Vec::zero() - y * y) * t * p;  // of the normal distribution beyond |x|
    return x * select(x.v < 0.0f, tail, c(1.0f) - tail);
}

}  // namespace

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
    a.table_dtype == Dtype::bfloat16 ? embed_as<bf16>(a, begin, end) : embed_as<float>(a, begin, end);
}

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const float* x = a.x + t * a.width;
        if (a.residual) {
            add_row(x, a.width, a.residual + t * a.width);
            x = a.residual + t * a.width;
        }
        write(a.out, a.out_dtype, t * a.width, [&](auto* out) { rms_norm_row(x, a.weight, a.width, a.eps, out); });
    }
}

void layer_norm(const LayerNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const float* x = a.x + t * a.width;
        if (a.residual) {
            add_row(x, a.width, a.residual + t * a.width);
            x = a.residual + t * a.width;
        }
        Vec sum = Vec::zero(), squares = Vec::zero();
        for_vectors(a.width, [&](int64_t i, auto count) { sum = sum + Vec::load(x + i, count); });
        const Vec mean = Vec::broadcast(reduce_sum(sum) / static_cast<float>(a.width));
        for_vectors(a.width, [&](int64_t i, auto count) {
            Vec v = Vec::load(x + i, count) - mean;
            if constexpr (__is_same(decltype(count), int)) v = select(lane_index() < count, v, Vec::zero());
            squares = fma(v, v, squares);
        });
        const float variance = reduce_sum(squares) / static_cast<float>(a.width);
        const Vec inverse = Vec::broadcast(1.0f / __builtin_sqrtf(variance + a.eps));
        write(a.out, a.out_dtype, t * a.width, [&](auto* out) {
            for_vectors(a.width, [&](int64_t i, auto count) {
                const Vec bias = a.bias ? Vec::load(a.bias + i, count) : Vec::zero();
                const Vec v = (Vec::load(x + i, count) - mean) * inverse;
                fma(v, Vec::load(a.weight + i, count), bias).store(out + i, count);
            });
        });
    }
}

void add(const AddArgs& a, int64_t begin, int64_t end) {
    add_row(a.x + begin * a.width, (end - begin) * a.width, a.residual + begin * a.width);
}

void softcap(const SoftcapArgs& a, int64_t begin, int64_t end) {
    const Vec most = Vec::broadcast(a.softcap), inverse = Vec::broadcast(1.0f / a.softcap);
    float* x = a.x + begin * a.width;
    for_vectors((end - begin) * a.width,
                [&](int64_t i, auto count) { (most * tanh(Vec::load(x + i, count) * inverse)).store(x + i, count); });
}

void silu_mul(const GateArgs& a, int64_t begin, int64_t end) {
    gate(a, begin, end, silu);
}

void gelu_mul(const GateArgs& a, int64_t begin, int64_t end) {
    gate(a, begin, end, gelu_tanh);
}

void activate(const ActivateArgs& a, int64_t begin, int64_t end) {
    switch (a.kind) {
        case Activation::gelu:
            return map(a, begin, end, gelu);
        case Activation::gelu_tanh:
            return map(a, begin, end, gelu_tanh);
        case Activation::relu:
            return map(a, begin, end, [](Vec x) { return select(x.v < 0.0f, Vec::zero(), x); });
    }
}

void gather_rows(const GatherRowsArgs& a, int64_t begin, int64_t end) {
    const int64_t bytes = a.width * (a.dtype == Dtype::bfloat16 ? sizeof(bf16) : sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
        __builtin_memcpy(static_cast<char*>(a.out) + n * bytes, static_cast<const char*>(a.x) + a.index[n] * bytes,
                         bytes);
    }
}

}  // namespace batchinfer::BATCHINFER_ISA
