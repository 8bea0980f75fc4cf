// Splits the fused projection of a token, normalises and rotates its heads, and writes keys and values straight to
// their page: no separate k and v tensors exist.
#include "cpu/kernels/codes.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rms_norm_row.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

template <class T>
void copy(const float* x, int64_t n, T* out) {
    for_vectors(n, [&](int64_t i, auto count) { Vec::load(x + i, count).store(out + i, count); });
}

// Rotates the first `rotary` elements, pairing i with rotary/2 + i, and copies the rest. x may be out.
template <class T>
void rotate(const float* x, const float* cos_sin, int64_t rotary, int64_t width, T* out) {
    const int64_t half = rotary / 2;
    for_vectors(half, [&](int64_t i, auto count) {
        const Vec cosine = Vec::load(cos_sin + i, count), sine = Vec::load(cos_sin + half + i, count);
        const Vec a = Vec::load(x + i, count), b = Vec::load(x + half + i, count);
        (a * cosine - b * sine).store(out + i, count);
        (b * cosine + a * sine).store(out + half + i, count);
    });
    copy(x + rotary, width - rotary, out + rotary);
}

// One query or key head: norm, rotation, conversion. `norm` and `cos_sin` may be null.
template <class T>
void write_head(const RopeAndCacheArgs& a, const float* x, const float* norm, const float* cos_sin, float* scratch,
                T* out) {
    if (norm) {
        rms_norm_row(x, norm, a.head_width, a.norm_eps, scratch);
        x = scratch;
    }
    if (cos_sin) {
        rotate(x, cos_sin, a.rotary_width, a.head_width, out);
    } else {
        copy(x, a.head_width, out);
    }
}

template <class T>
constexpr bool kCodes = __is_same(T, int8_t) || __is_same(T, e4m3);

template <class T>
void rope_and_cache_as(const RopeAndCacheArgs& a, int64_t begin, int64_t end) {
    const int64_t width = a.head_width, row = width + kScaleBytes<T>, head_stride = a.page_size * row;
    for (int64_t t = begin; t < end; ++t) {
        const float* q = a.qkv + t * (a.heads + 2 * a.kv_heads) * width;
        const float* k = q + a.heads * width;
        const float* v = k + a.kv_heads * width;
        const float* cos_sin = a.cos_sin ? a.cos_sin + a.positions[t] * a.rotary_width : nullptr;
        float* q_out = a.q_out + t * a.heads * width;
        const int64_t page = a.kv_index[t] / a.page_size, offset = a.kv_index[t] % a.page_size;
        const int64_t slot = page * a.kv_heads * head_stride + offset * row;
        T* k_out = static_cast<T*>(a.k_cache) + slot;
        T* v_out = static_cast<T*>(a.v_cache) + slot;
        // q_out, not yet written, holds the normalised key heads for a moment.
        const float *q_norm = a.q_norm, *k_norm = a.k_norm;
        if (a.norm_all) {
            rms_norm_row(k, k_norm, a.kv_heads * width, a.norm_eps, q_out);
            k = q_out, k_norm = nullptr;
        }
        for (int64_t g = 0; g < a.kv_heads; ++g) {
            if constexpr (kCodes<T>) {
                float* const key = q_out + g * width;  // of k itself, or unused yet
                write_head(a, k + g * width, k_norm, cos_sin, key, key);
                encode_head(key, width, k_out + g * head_stride);
                encode_head(v + g * width, width, v_out + g * head_stride);
            } else {
                write_head(a, k + g * width, k_norm, cos_sin, q_out, k_out + g * head_stride);
                copy(v + g * width, width, v_out + g * head_stride);
            }
        }
        if (a.norm_all) {
            rms_norm_row(q, q_norm, a.heads * width, a.norm_eps, q_out);
            q = q_out, q_norm = nullptr;
        }
        for (int64_t h = 0; h < a.heads; ++h) {
            write_head(a, q + h * width, q_norm, cos_sin, q_out + h * width, q_out + h * width);
        }
    }
}

}  // namespace

void rope_and_cache(const RopeAndCacheArgs& a, int64_t begin, int64_t end) {
    switch (a.cache_dtype) {
        case Dtype::float32:
            return rope_and_cache_as<float>(a, begin, end);
        case Dtype::bfloat16:
            return rope_and_cache_as<bf16>(a, begin, end);
        case Dtype::int8:
            return rope_and_cache_as<int8_t>(a, begin, end);
        case Dtype::e4m3:
            return rope_and_cache_as<e4m3>(a, begin, end);
    }
}

}  // namespace batchinfer::BATCHINFER_ISA
