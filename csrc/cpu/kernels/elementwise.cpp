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

template <class T>
void silu_mul_as(const SiluMulArgs& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const float* gate = a.gate_up + t * 2 * a.width;
        const float* up = gate + a.width;
        T* out = static_cast<T*>(a.out) + t * a.width;
        for_vectors(a.width, [&](int64_t i, auto count) {
            (silu(Vec::load(gate + i, count)) * Vec::load(up + i, count)).store(out + i, count);
        });
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
        if (a.out_dtype == Dtype::bfloat16) {
            rms_norm_row(x, a.weight, a.width, a.eps, static_cast<bf16*>(a.out) + t * a.width);
        } else {
            rms_norm_row(x, a.weight, a.width, a.eps, static_cast<float*>(a.out) + t * a.width);
        }
    }
}

void silu_mul(const SiluMulArgs& a, int64_t begin, int64_t end) {
    a.out_dtype == Dtype::bfloat16 ? silu_mul_as<bf16>(a, begin, end) : silu_mul_as<float>(a, begin, end);
}

void gather_rows(const GatherRowsArgs& a, int64_t begin, int64_t end) {
    const int64_t bytes = a.width * (a.dtype == Dtype::bfloat16 ? sizeof(bf16) : sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
        __builtin_memcpy(static_cast<char*>(a.out) + n * bytes, static_cast<const char*>(a.x) + a.index[n] * bytes,
                         bytes);
    }
}

}  // namespace batchinfer::BATCHINFER_ISA
