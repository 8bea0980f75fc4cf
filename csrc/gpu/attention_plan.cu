// plan_attention: the step's work lists, on the device; and the choice of kernel.
#include "gpu/attention.cuh"
#include "gpu/beside.h"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 1024;

// Leading positions, in whole pages, that a sequence has in the same pages as the first of its group. Its last position
// is never among them: every sequence keeps a part of its own.
__device__ __forceinline__ int common_length(const AttentionPlan& p, const Sequence& q, const Sequence& first) {
    constexpr int kAtOnce = 8;
    const int pages = (min(q.length, first.length) - 1) / p.page_size;
    if (q.page_row == first.page_row) return pages * p.page_size;
    int same = 0;
    for (bool equal = true; same + kAtOnce <= pages; same += kAtOnce) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            equal &= q.page_row[same + i] == first.page_row[same + i];
        }
        if (!equal) break;
    }
    while (same < pages && q.page_row[same] == first.page_row[same]) {
        ++same;
    }
    return same * p.page_size;
}

// One block; the running sums of 2,000 sequences take two rounds of 1,024.
__global__ void __launch_bounds__(kThreads) plan_kernel(AttentionPlan p) {
    __shared__ int sums[3][kThreads];
    __shared__ int common[kThreads];
    int carry[3] = {};
    int32_t* lists[3] = {p.decode_start, p.prefill_start, p.partial_start};
    const int group = p.heads / p.kv_heads, tile = sequences_per_tile(group);
    const int t = threadIdx.x;
    for (int base = 0; base < p.sequences; base += kThreads) {
        const int s = base + t, first = t / tile * tile;
        int mine[3] = {};
        Sequence q = {};
        common[t] = 0;
        if (s < p.sequences) {
            q = sequence_of(p, s, INT32_MAX);
            const Sequence lead = sequence_of(p, base + first, INT32_MAX);
            if (q.tokens == 1 && lead.tokens == 1 && p.window == 0) common[t] = common_length(p, q, lead);
        }
        __syncthreads();
        if (s < p.sequences) {
            const int members = min(tile, p.sequences - base - first);
            int shared = members > 1 ? INT32_MAX : 0;
            for (int m = 0; m < members; ++m) {
                shared = min(shared, common[first + m]);
            }
            if (shared < kLeastShared) shared = 0;
            // Chunks of 16 positions never cross pages.
            const int skipped = p.window ? window_start(p, q.length - 1) & ~15 : shared;
            p.shared[s] = skipped;
            if (q.tokens == 1) {
                const int row_tiles = (group + kDecodeRows - 1) / kDecodeRows;
                const int together = (shared + p.split - 1) / p.split;
                const int alone = (q.length - skipped + p.split - 1) / p.split;
                mine[0] = (alone * row_tiles + (t == first ? together : 0)) * p.kv_heads;
                mine[2] = together + alone > 1 ? together + alone : 0;
            } else {
                mine[1] = (q.tokens * group + kPrefillRows - 1) / kPrefillRows * p.kv_heads;
            }
        }
#pragma unroll
        for (int list = 0; list < 3; ++list) {
            sums[list][t] = mine[list];
        }
        __syncthreads();
        for (int reach = 1; reach < kThreads; reach *= 2) {
            int add[3];
#pragma unroll
            for (int list = 0; list < 3; ++list) {
                add[list] = t >= reach ? sums[list][t - reach] : 0;
            }
            __syncthreads();
#pragma unroll
            for (int list = 0; list < 3; ++list) {
                sums[list][t] += add[list];
            }
            __syncthreads();
        }
#pragma unroll
        for (int list = 0; list < 3; ++list) {
            if (s < p.sequences) lists[list][s + 1] = carry[list] + sums[list][t];
            carry[list] += sums[list][kThreads - 1];
        }
        __syncthreads();
    }
    if (t < 3) lists[t][0] = 0;
}

#ifdef BATCHINFER_SM90A
constexpr bool kWithSm90a = true;
#else
constexpr bool kWithSm90a = false;
#endif

MatrixUnit matrix_unit() {
    static const MatrixUnit found = [] {
        int device = 0;
        MatrixUnit unit = MatrixUnit::none;
        check(gpuGetDevice(&device), "attention");
        check(gpuMatrixUnit(&unit, device), "attention");
        return unit;
    }();
    return found;
}

void attention_of_prompts(const AttentionArgs& a, Stream stream) {
    if constexpr (kWithSm90a) {
        const bool codes = a.cache_dtype == GpuDtype::e4m3;
        if (matrix_unit() == MatrixUnit::warpgroup && !codes) return attention_prefill_sm90(a, stream);
    }
    attention_prefill(a, stream);
}

}  // namespace

void plan_attention(const AttentionPlan& p, Stream stream) {
    check_shape(p);
    gpuLaunch(plan_kernel, 1, kThreads, 0, native(stream), p);
    check_launch("plan_attention");
}

void attention(const AttentionArgs& a, Stream stream) {
    if (a.tokens == 0 || a.plan.sequences == 0) return;
    const bool matrix_shape = a.dtype != GpuDtype::float32 && (a.plan.head_width == 64 || a.plan.head_width == 128);
    if (matrix_shape && matrix_unit() != MatrixUnit::none) {
        if (a.plan.decode_only) return attention_decode(a, stream);
        // Both, as mostly only the device knows whether a list is empty. A few prompts leave most of the matrix units
        // idle, and decoding uses hardly more than the memory: 8B of chat-like lengths is 1 % faster so.
        const Beside beside(native(stream));
        attention_of_prompts(a, beside.stream());
        attention_decode(a, stream);
        beside.join();
    } else {
        attention_generic(a, stream);
    }
}

int device_count() {
    int count = 0;
    return gpuGetDeviceCount(&count) == gpuSuccess ? count : 0;
}

}  // namespace batchinfer::gpu
