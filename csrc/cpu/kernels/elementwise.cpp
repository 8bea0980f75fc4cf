// Ops whose cost is reading and writing memory: embedding, norm, gated activation, row gather.
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

}  // namespace

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
    a.table_dtype == Dtype::bfloat16 ? embed_as<bf16>(a, begin, end) : embed_as<float>(a, begin, end);
}

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const float* x = a.x + t * a.width;
        if (a.residual) {
            float* residual = a.residual + t * a.width;
            for_vectors(a.width, [&](int64_t i, auto count) {
                (Vec::load(residual + i, count) + Vec::load(x + i, count)).store(residual + i, count);
            });
            x = residual;
        }
        rms_norm_row(x, a.weight, a.width, a.eps, a.out + t * a.width);
    }
}

void silu_mul(const SiluMulArgs& a, int64_t begin, int64_t end) {
    const Vec one = Vec::broadcast(1.0f);
    for (int64_t t = begin; t < end; ++t) {
        const float* gate = a.gate_up + t * 2 * a.width;
        const float* up = gate + a.width;
        float* out = a.out + t * a.width;
        for_vectors(a.width, [&](int64_t i, auto count) {
            const Vec g = Vec::load(gate + i, count);
            (g / (one + exp(Vec::zero() - g)) * Vec::load(up + i, count)).store(out + i, count);
        });
    }
}

void gather_rows(const GatherRowsArgs& a, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        __builtin_memcpy(a.out + n * a.width, a.x + a.index[n] * a.width, a.width * sizeof(float));
    }
}

}  // namespace batchinfer::BATCHINFER_ISA
