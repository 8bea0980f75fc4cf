// rope_and_cache: split qkv, normalise heads, rotate, write q and the KV pages, in one pass.
//
// A head is held by a group of lanes (head_width / 16, rounded up to a power of two), two pieces of eight elements a
// lane, chosen so that both partners of a rotation are in one lane: rotation needs no exchange, the head norm a few
// shuffles within the group, and q, k and v are each read and written once in 16-byte accesses. No k or v tensor exists
// between the projection and the pages.
#include "gpu/device.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) rope_and_cache_kernel(RopeAndCacheArgs a, int group) {
    const int64_t all_heads = a.heads + 2 * a.kv_heads;
    const int64_t task = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / group;
    const int lane = threadIdx.x % group;
    const int64_t token = task / all_heads;
    const int head = task % all_heads;
    const bool active = token < a.tokens && lane < a.head_width / 16;
    const bool is_q = head < a.heads, is_v = head >= a.heads + a.kv_heads;

    // Rotary pieces first: piece p turns with piece p + pairs. What is not rotated goes through two by two.
    const int pairs = a.rotary_width / 16;
    const bool rotated = lane < pairs;
    const int first = 8 * (rotated ? lane : 2 * lane), second = rotated ? first + 8 * pairs : first + 8;
    float x[8] = {}, y[8] = {};
    if (active) {
        const T* from = static_cast<const T*>(a.qkv) + task * a.head_width;
        load<8>(from + first, x);
        load<8>(from + second, y);
    }
    if (a.q_norm) {  // uniform; the shuffles below need every lane of the warp
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum += x[i] * x[i] + y[i] * y[i];
        }
        for (int mask = group / 2; mask > 0; mask /= 2) {
            sum += shuffle_xor(sum, mask);
        }
        if (active && !is_v) {
            const float inverse = rsqrtf(sum / a.head_width + a.norm_eps);
            const float* weight = is_q ? a.q_norm : a.k_norm;
            float wx[8], wy[8];
            load<8>(weight + first, wx);
            load<8>(weight + second, wy);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[i] *= inverse * wx[i];
                y[i] *= inverse * wy[i];
            }
        }
    }
    if (!active) return;
    if (a.cos_sin && rotated && !is_v) {
        const float* table = a.cos_sin + clamp_index(a.positions[token], a.max_positions) * a.rotary_width;
        float cosine[8], sine[8];
        load<8>(table + first, cosine);
        load<8>(table + second, sine);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float turned = x[i] * cosine[i] - y[i] * sine[i];
            y[i] = y[i] * cosine[i] + x[i] * sine[i];
            x[i] = turned;
        }
    }
    void* to = a.q_out;
    int64_t row = token * a.heads + head;
    if (!is_q) {
        const int64_t index = a.kv_index[token];
        if (index < 0 || index >= a.pages * a.page_size) return;
        const int64_t kv_head = head - a.heads - (is_v ? a.kv_heads : 0);
        to = is_v ? a.v_cache : a.k_cache;
        row = (index / a.page_size * a.kv_heads + kv_head) * a.page_size + index % a.page_size;
    }
    if (!is_q && a.cache_dtype == GpuDtype::e4m3) {
        e4m3* codes = static_cast<e4m3*>(to) + row * a.head_width;
        store<8>(codes + first, x);
        store<8>(codes + second, y);
    } else {
        T* numbers = static_cast<T*>(to) + row * a.head_width;
        store<8>(numbers + first, x);
        store<8>(numbers + second, y);
    }
}

}  // namespace

void rope_and_cache(const RopeAndCacheArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    if (a.head_width % 16 || a.head_width > 512 || a.rotary_width % 16 || a.rotary_width > a.head_width) {
        throw std::invalid_argument("rope_and_cache: head width " + std::to_string(a.head_width) +
                                    " and rotary width " + std::to_string(a.rotary_width) +
                                    " must be multiples of 16, at most 512");
    }
    int group = 1;
    while (group * 16 < a.head_width) {
        group *= 2;
    }
    const int64_t blocks = ceil_div(a.tokens * (a.heads + 2 * a.kv_heads) * group, kThreads);
    with_dtype(a.dtype, [&](auto t) {
        gpuLaunch(rope_and_cache_kernel<decltype(t)>, blocks, kThreads, 0, native(stream), a, group);
    });
    check_launch("rope_and_cache");
}

}  // namespace batchinfer::gpu
