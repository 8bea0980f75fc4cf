// penalise: repetition, presence and frequency penalties and banned tokens, on the logits in place.
//
// How often a token occurs in the history is counted in shared memory, for 8,192 token ids at a time: no sort, no
// [rows, vocab] table, exact and independent of order. A history of 8,000 tokens and 128 K ids is 16 x 8 reads a
// thread.
#include "gpu/sample.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kIds = 8192;
constexpr uint32_t kInPrompt = 0x80000000u;  // the other bits count occurrences in the output

__device__ __forceinline__ int2 segment(const int32_t* start, int64_t r, int64_t size) {
    const int begin = min(max(int64_t{start[r]}, int64_t{0}), size);
    return {begin, static_cast<int>(min(max(int64_t{start[r + 1]}, int64_t{begin}), size))};
}

__global__ void __launch_bounds__(kSampleThreads) penalise_kernel(SampleArgs a) {
    __shared__ uint32_t seen[kIds];
    const int64_t r = blockIdx.x;
    float* logits = a.logits + r * a.vocab;
    if (a.repetition) {
        const int2 history = segment(a.history_start, r, a.history_size);
        const int output = history.x + a.history_prompt[r];
        const float repetition = a.repetition[r], presence = a.presence[r], frequency = a.frequency[r];
        for (int base = 0; base < a.vocab && history.x < history.y; base += kIds) {
            for (int i = threadIdx.x; i < kIds; i += kSampleThreads) {
                seen[i] = 0;
            }
            __syncthreads();
            for (int i = history.x + threadIdx.x; i < history.y; i += kSampleThreads) {
                const uint32_t id = static_cast<uint32_t>(a.history_ids[i] - base);
                if (id >= kIds) continue;
                if (i < output) {
                    atomicOr(&seen[id], kInPrompt);
                } else {
                    atomicAdd(&seen[id], 1u);
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < kIds && base + i < a.vocab; i += kSampleThreads) {
                if (seen[i] == 0) continue;
                const uint32_t count = seen[i] & ~kInPrompt;
                float x = logits[base + i];
                if (isnan(x)) x = -INFINITY;
                x = x > 0 ? exact::div(x, repetition) : exact::mul(x, repetition);
                if (count) {
                    x = exact::sub(exact::sub(x, presence), exact::mul(frequency, static_cast<float>(count)));
                }
                logits[base + i] = x;
            }
            __syncthreads();
        }
    }
    if (a.banned_ids) {
        const int2 banned = segment(a.banned_start, r, a.banned_size);
        for (int i = banned.x + threadIdx.x; i < banned.y; i += kSampleThreads) {
            const int id = a.banned_ids[i];
            if (id >= 0 && id < a.vocab) logits[id] = -INFINITY;
        }
    }
}

}  // namespace

void penalise(const SampleArgs& a, Stream stream) {
    if (a.rows == 0 || (!a.repetition && !a.banned_ids)) return;
    gpuLaunch(penalise_kernel, a.rows, kSampleThreads, 0, native(stream), a);
    check_launch("sample (penalties)");
}

}  // namespace batchinfer::gpu
