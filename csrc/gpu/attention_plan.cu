// plan_attention: the step's work lists, on the device; and the choice of kernel.
#include "gpu/attention.cuh"
#include "gpu/beside.h"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 1024;

// Leading positions, in whole pages, that two sequences have in the same pages. The last position of neither is among
// them: every sequence keeps a part of its own.
__device__ __forceinline__ int common_length(const AttentionPlan& p, const Sequence& a, const Sequence& b) {
    constexpr int kAtOnce = 8;
    const int pages = (min(a.length, b.length) - 1) / p.page_size;
    if (a.page_row == b.page_row) return pages * p.page_size;
    int same = 0;
    for (bool equal = true; same + kAtOnce <= pages; same += kAtOnce) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            equal &= a.page_row[same + i] == b.page_row[same + i];
        }
        if (!equal) break;
    }
    while (same < pages && a.page_row[same] == b.page_row[same]) {
        ++same;
    }
    return same * p.page_size;
}

// Whether sequence t of a round is the first of a group that reads together. `common`: what each has in common with the
// one before it. A group has `most` sequences at most, and ends where neighbours have little in common, or less than
// half of what those beside them have: who shares 3,000 positions with the next is in no group with one who shares 600
// of them.
__device__ __forceinline__ bool starts_group(const int* common, int t, int most) {
    const int beside = max(common[t - 1], common[t + 1]);
    return t % most == 0 || common[t] < max(kLeastSharedByMany, beside / 2);
}

// The parts of positions begin to end, as `like`, and the number of the next one.
__device__ __forceinline__ int write_parts(const AttentionPlan& p, DecodePart* to, DecodePart like, int begin,
                                           int end) {
    for (; begin < end; begin += p.split) {
        like.begin = begin, like.end = min(end, begin + p.split);
        *to++ = like;
        ++like.number;
    }
    return like.number;
}

// Of each list x becomes the running sum over the threads, and `all` the sum. Also a barrier; `scratch` may be used
// again after the next one.
template <int kLists>
__device__ __forceinline__ void running_sums(int (&x)[kLists], int (&all)[kLists],
                                             int (&scratch)[kLists][kThreads / kWarp]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
        for (int reach = 1; reach < kWarp; reach *= 2) {
            const int below = shuffle_up(x[list], reach);
            if (lane >= reach) x[list] += below;
        }
        if (lane == kWarp - 1) scratch[list][warp] = x[list];
    }
    __syncthreads();
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
        all[list] = 0;
#pragma unroll 8
        for (int w = 0; w < kThreads / kWarp; ++w) {
            if (w == warp) x[list] += all[list];
            all[list] += scratch[list][w];
        }
    }
}

// One block; the running sums of 2,000 sequences take two rounds of 1,024.
__global__ void __launch_bounds__(kThreads) plan_kernel(AttentionPlan p) {
    enum { part, short_part, prefill, partial, lists };
    __shared__ int scratch[lists][kThreads / kWarp];
    __shared__ int common_and_edges[kThreads + 2];
    __shared__ int shared_of[kThreads];
    int* const common = common_and_edges + 1;
    int before[lists] = {};  // of this round
    const int group = p.heads / p.kv_heads, each = sequences_per_tile(group), most = each * kDecodeWarps;
    const int t = threadIdx.x;
    if (t == 0) {
        common[-1] = common[kThreads] = 0;
        p.prefill_start[0] = p.partial_start[0] = 0;
    }
    for (int base = 0; base < p.sequences; base += kThreads) {
        const int s = base + t, sequences = min(kThreads, p.sequences - base);
        Sequence q = {};
        common[t] = 0;
        if (s < p.sequences) {
            q = sequence_of(p, s, INT32_MAX);
            if (t > 0 && q.tokens == 1 && p.window == 0) {
                const Sequence neighbour = sequence_of(p, s - 1, INT32_MAX);
                if (neighbour.tokens == 1) common[t] = common_length(p, q, neighbour);
            }
        }
        __syncthreads();
        int first = t, members = 1;  // of the group
        if (s < p.sequences) {
            while (!starts_group(common, first, most)) {
                --first;
            }
            if (first == t) {
                int shared = INT32_MAX;
                for (; t + members < sequences && !starts_group(common, t + members, most); ++members) {
                    shared = min(shared, common[t + members]);
                }
                const int least = members > each ? kLeastSharedByMany : kLeastShared;
                shared_of[t] = members > 1 && shared >= least ? shared : 0;
            }
        }
        __syncthreads();
        int mine[lists] = {}, shared = 0, together = 0, skipped = 0, end = 0;
        if (q.tokens == 1) {
            shared = shared_of[first];
            // With a window nobody reads what is before it. Chunks of 16 positions never cross pages.
            skipped = p.window ? window_start(p, q.length - 1) & ~15 : shared;
            // Only here: a group stays together around one of it that has ended.
            end = q.length = keys_end(q, skipped);
            together = (shared + p.split - 1) / p.split;
            const int own = (q.length - skipped + p.split - 1) / p.split;
            const int last = skipped + (own - 1) * p.split;
            mine[short_part] = q.length - last <= kShortPart;
            if (mine[short_part]) end = last;
            mine[part] = own - mine[short_part] + (first == t ? together : 0);
            mine[partial] = together + own > 1 ? together + own : 0;
            p.shared[s] = skipped;
        } else if (q.tokens > 1) {
            mine[prefill] = (q.tokens * group + kPrefillRows - 1) / kPrefillRows * p.kv_heads;
        }
        int sum[lists], all[lists];
#pragma unroll
        for (int list = 0; list < lists; ++list) {
            sum[list] = mine[list];
        }
        running_sums(sum, all, scratch);
        if (s < p.sequences) {
            p.prefill_start[s + 1] = before[prefill] + sum[prefill];
            p.partial_start[s + 1] = before[partial] + sum[partial];
        }
        if (q.tokens == 1) {
            DecodePart* to = p.parts + before[part] + sum[part] - mine[part];
            DecodePart like = {s, members, 0, 0, 0, q.token, 0, q.length};
            like.slot = clamp_index(p.slot[s], p.slots);
            if (first == t) to += write_parts(p, to, like, 0, shared);
            like.members = 1;
            like.number = mine[partial] ? together : -1;
            like.number = write_parts(p, to, like, skipped, end);
            like.begin = end, like.end = q.length;
            if (mine[short_part]) p.short_parts[before[short_part] + sum[short_part] - 1] = like;
        }
#pragma unroll
        for (int list = 0; list < lists; ++list) {
            before[list] += all[list];
        }
        __syncthreads();
    }
    if (t == 0) p.part_counts[0] = before[part], p.part_counts[1] = before[short_part];
}

#ifdef BATCHINFER_SM90A
constexpr bool kWithSm90a = true;
#else
constexpr bool kWithSm90a = false;
#endif

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
