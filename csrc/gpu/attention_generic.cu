// Attention for what the matrix-unit kernels do not do: float32, head widths other than 64 and 128, NVIDIA's GPUs
// before 8.0, AMD's other than CDNA 2 and 3 and RDNA 3.
//
// A block takes one query head of one token. Eight lanes share a key, two neighbouring elements of it an access, so any
// even number of 16-element pieces fits; 16 keys are in work at once, each group of lanes with its own running maximum,
// added up at the end in a fixed order. Products in float32. Simple rather than fast: every head reads its keys itself.
#include "gpu/attention.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;                   // of a key
constexpr int kGroups = kThreads / kLanes;  // keys at once
constexpr int kMaxWidth = 256;

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
    if constexpr (sizeof(T) == 4) {
        return *reinterpret_cast<const float2*>(p);
    } else if constexpr (sizeof(T) == 1) {
        return {to_float(p[0]), to_float(p[1])};
    } else {
        return unpack2<T>(*reinterpret_cast<const uint32_t*>(p));
    }
}

// C: of the caches. kPairs: element pairs a lane may hold, kLanes * 2 * kPairs >= head width.
template <class T, class C, int kPairs>
__global__ void __launch_bounds__(kThreads) generic_kernel(AttentionArgs a) {
    __shared__ float part_out[kGroups][kMaxWidth];
    __shared__ float part_max[kGroups], part_sum[kGroups];
    const AttentionPlan& p = a.plan;
    const int64_t row = blockIdx.x;
    const int token = row / p.heads, head = row % p.heads;
    if (token < p.q_start[0] || token >= p.q_start[p.sequences]) return;
    const int s = find_sequence(p.q_start, p.sequences, token);
    const Sequence q = sequence_of(p, s, a.tokens);
    if (token < q.token || token >= q.token + q.tokens) return;
    const int length = keys_end(q, 0) - q.tokens + (token - q.token) + 1;
    const Pages pages(p, q.page_row, head / (p.heads / p.kv_heads));
    const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, pairs = p.head_width / (2 * kLanes);
    const float scale = a.scale * kLog2e;

    float2 query[kPairs], out[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        out[i] = {0, 0};
        query[i] =
            i < pairs ? load_pair(static_cast<const T*>(a.q) + row * p.head_width + 2 * (lane + kLanes * i)) : out[i];
    }
    float maximum = -INFINITY, sum = 0;
    for (int base = window_start(p, length - 1); base < length;
         base += kGroups) {  // all groups together: the shuffles need whole warps
        const int position = base + group;
        const int64_t offset = pages.offset(min(position, length - 1));
        float score = 0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (i < pairs) {  // a break in such a loop would keep clang from unrolling it, and `out` from registers
                const float2 key = load_pair(static_cast<const C*>(a.k_cache) + offset + 2 * (lane + kLanes * i));
                score += query[i].x * key.x + query[i].y * key.y;
            }
        }
        for (int mask = kLanes / 2; mask > 0; mask /= 2) {
            score += shuffle_xor(score, mask);
        }
        if (position >= length) continue;
        score = a.softcap > 0 ? a.softcap * kLog2e * tanhf(score * a.scale / a.softcap) : score * scale;
        const float top = fmaxf(maximum, score);
        const float shrink = exp2f(maximum - top), weight = exp2f(score - top);
        maximum = top;
        sum = sum * shrink + weight;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (i < pairs) {
                const float2 value = load_pair(static_cast<const C*>(a.v_cache) + offset + 2 * (lane + kLanes * i));
                out[i].x = out[i].x * shrink + weight * value.x;
                out[i].y = out[i].y * shrink + weight * value.y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        if (i < pairs) *reinterpret_cast<float2*>(&part_out[group][2 * (lane + kLanes * i)]) = out[i];
    }
    if (lane == 0) part_max[group] = maximum, part_sum[group] = sum;
    __syncthreads();
    float top = -INFINITY;
    for (int g = 0; g < kGroups; ++g) {
        top = fmaxf(top, part_max[g]);
    }
    float total = 0;
    for (int g = 0; g < kGroups; ++g) {
        total += part_sum[g] * exp2f(part_max[g] - top);
    }
    for (int e = threadIdx.x; e < p.head_width; e += kThreads) {
        float value = 0;
        for (int g = 0; g < kGroups; ++g) {
            value += part_out[g][e] * exp2f(part_max[g] - top);
        }
        static_cast<T*>(a.out)[row * p.head_width + e] = from_float<T>(value / total);
    }
    if (threadIdx.x == 0) a.lse[row] = (top + log2f(total)) * kLn2;
}

template <class T, class C>
void launch(const AttentionArgs& a, Stream stream) {
    const int64_t blocks = int64_t{a.tokens} * a.plan.heads;
    if (a.plan.head_width <= 64) {
        gpuLaunch(generic_kernel<T, C, 4>, blocks, kThreads, 0, native(stream), a);
    } else if (a.plan.head_width <= 128) {
        gpuLaunch(generic_kernel<T, C, 8>, blocks, kThreads, 0, native(stream), a);
    } else {
        gpuLaunch(generic_kernel<T, C, 16>, blocks, kThreads, 0, native(stream), a);
    }
    check_launch("attention (generic)");
}

}  // namespace

void attention_generic(const AttentionArgs& a, Stream stream) {
    if (a.cache_dtype == GpuDtype::e4m3) return launch<bf16, e4m3>(a, stream);
    with_dtype(a.dtype, [&](auto t) { launch<decltype(t), decltype(t)>(a, stream); });
}

}  // namespace batchinfer::gpu
