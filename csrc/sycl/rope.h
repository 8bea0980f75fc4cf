// rope_and_cache: split qkv, normalise heads, rotate, write q and the KV pages, in one pass.
//
// A sub-group holds a head: lanes take the partners of a rotation together, so rotation needs no exchange, and the head
// norm one sum over the sub-group. No k or v tensor exists between the projection and the pages.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

template <class T>
struct RopeAndCache {
    using Args = RopeAndCacheArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 128;
    static constexpr int kHeads = kThreads / kSubGroup;  // of a group

    static void run(const Item& item, Local&, const Args& a) {
        const auto lanes = item.get_sub_group();
        const int lane = lanes.get_local_linear_id();
        const int64_t all_heads = a.heads + 2 * a.kv_heads;
        const int64_t task = item.get_group(1) * kHeads + lanes.get_group_linear_id();
        if (task >= a.tokens * all_heads) return;  // whole sub-groups
        const int64_t token = task / all_heads, head = task % all_heads;
        const bool is_q = head < a.heads, is_v = head >= a.heads + a.kv_heads;

        void* out = a.q_out;
        int64_t row = token * a.heads + head;
        if (!is_q) {
            const int64_t index = a.kv_index[token];
            if (index < 0 || index >= a.pages * a.page_size) return;
            const int64_t kv_head = head - a.heads - (is_v ? a.kv_heads : 0);
            out = is_v ? a.v_cache : a.k_cache;
            row = (index / a.page_size * a.kv_heads + kv_head) * a.page_size + index % a.page_size;
        }
        const bool codes = !is_q && a.cache_dtype == GpuDtype::e4m3;
        const auto put = [&](int64_t i, float x) {
            const int64_t at = row * a.head_width + i;
            if (codes) {
                static_cast<e4m3*>(out)[at] = from_float<e4m3>(x);
            } else {
                static_cast<T*>(out)[at] = from_float<T>(x);
            }
        };
        const T* from = static_cast<const T*>(a.qkv) + task * a.head_width;
        const float* weight = is_v ? nullptr : is_q ? a.q_norm : a.k_norm;
        float inverse = 1;
        if (weight) {
            float sum = 0;
            for (int64_t i = lane; i < a.head_width; i += kSubGroup) {
                sum += to_float(from[i]) * to_float(from[i]);
            }
            sum = sycl::reduce_over_group(lanes, sum, sycl::plus<float>());
            inverse = sycl::rsqrt(sum / a.head_width + a.norm_eps);
        }
        const auto normal = [&](int64_t i) {
            return weight ? to_float(from[i]) * inverse * weight[i] : to_float(from[i]);
        };
        const int64_t half = a.cos_sin && !is_v ? a.rotary_width / 2 : 0;
        const float* table =
            half ? a.cos_sin + clamp_index(a.positions[token], a.max_positions) * a.rotary_width : nullptr;
        for (int64_t i = lane; i < half; i += kSubGroup) {
            const float x = normal(i), y = normal(i + half), cosine = table[i], sine = table[i + half];
            put(i, x * cosine - y * sine);
            put(i + half, y * cosine + x * sine);
        }
        for (int64_t i = 2 * half + lane; i < a.head_width; i += kSubGroup) {
            put(i, normal(i));
        }
    }
};

}  // namespace batchinfer::gpu
