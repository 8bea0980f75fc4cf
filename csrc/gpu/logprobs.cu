// logprobs: log-probability of the chosen token and of the most likely ones, of the unmodified logits.
//
// One pass for the maximum, one for the sum and a histogram of distances below it; the tokens of the first bins that
// hold enough are collected in a third and ranked by comparing all with all. Where those bins hold too many tokens
// (logits that are nearly equal), the alternatives are found one by one, a pass each.
#include "gpu/sample.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kCandidates = 2048;

__global__ void BATCHINFER_LAUNCH_BOUNDS(kSampleThreads, 2) logprobs_kernel(SampleArgs a, const float* raw) {
    __shared__ Histogram histogram;
    __shared__ uint64_t candidate[kCandidates];
    __shared__ int candidates;
    __shared__ float sums[kWarp];
    const int64_t r = blockIdx.x;
    const int vocab = a.vocab;
    const float* logits = raw + r * a.vocab;
    int32_t* ids = a.top_ids + r * a.top_width;
    float* values = a.top + r * a.top_width;
    const int wanted = a.num_logprobs[r];
    const int n = min(min(max(wanted, 0), static_cast<int>(a.top_width)), vocab);
    for (int i = n + threadIdx.x; i < a.top_width; i += kSampleThreads) {
        ids[i] = -1, values[i] = -INFINITY;
    }
    if (wanted < 0) {
        if (threadIdx.x == 0) a.chosen[r] = NAN;
        return;
    }
    const float highest = logits[id_of(best_of(logits, vocab, histogram.scratch))];
    histogram.clear();
    if (threadIdx.x == 0) candidates = 0;
    const auto distance = [&](int i) { return isnan(logits[i]) ? INFINITY : highest - logits[i]; };
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += kSampleThreads) {
        const float below = distance(i);
        sum += expf(-below);
        if (n) histogram.add_one(linear_bin(below));
    }
    const double log_sum = log(static_cast<double>(block_reduce(sum, sums, [](float x, float y) { return x + y; })));
    const auto logprob = [&](int id) { return static_cast<float>(-static_cast<double>(distance(id)) - log_sum); };
    if (threadIdx.x == 0) a.chosen[r] = logprob(a.tokens[r]);
    if (n == 0) return;

    histogram.find<false>(0, n);
    if (histogram.before + histogram.weight <= kCandidates) {
        for (int i = threadIdx.x; i < vocab; i += kSampleThreads) {
            if (linear_bin(distance(i)) <= histogram.bin) candidate[atomicAdd(&candidates, 1)] = ranked(logits[i], i);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < candidates; i += kSampleThreads) {
            int rank = 0;
            for (int j = 0; j < candidates; ++j) {
                rank += candidate[j] > candidate[i];
            }
            if (rank < n) ids[rank] = id_of(candidate[i]), values[rank] = logprob(id_of(candidate[i]));
        }
        return;
    }
    uint64_t limit = UINT64_MAX;
    for (int rank = 0; rank < n; ++rank) {
        limit = best_below(logits, vocab, limit, histogram.scratch);
        if (threadIdx.x == 0) ids[rank] = id_of(limit), values[rank] = logprob(id_of(limit));
    }
}

}  // namespace

void logprobs(const SampleArgs& a, const float* raw, Stream stream) {
    if (a.rows == 0 || !a.num_logprobs) return;
    gpuLaunch(logprobs_kernel, a.rows, kSampleThreads, 0, native(stream), a, raw);
    check_launch("sample (logprobs)");
}

}  // namespace batchinfer::gpu
