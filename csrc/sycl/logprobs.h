// Logprobs: log-probability of the chosen token and of the most likely ones, of the unmodified logits.
//
// As csrc/gpu/logprobs.cu: one pass for the maximum, one for the sum and a histogram of distances below it; the tokens
// of the first bins that hold enough are collected in a third and ranked by comparing all with all. Where those bins
// hold too many tokens (logits that are nearly equal), the alternatives are found one by one, a pass each.
#pragma once

#include "sycl/sample.h"

namespace batchinfer::gpu {

struct LogprobArgs {
    SampleArgs sample;
    const float* raw;  // [rows, vocab]
};

struct Logprobs {
    static constexpr int kCandidates = 2048;

    struct Local {
        Histogram histogram;
        uint64_t candidate[kCandidates];
        uint32_t candidates;
    };
    using Args = LogprobArgs;
    static constexpr int kThreads = kSampleThreads;

    static void run(const Item& item, Local& local, const Args& args) {
        const SampleArgs& a = args.sample;
        const int64_t r = item.get_group(0);
        const int vocab = a.vocab, thread = thread_of(item), wanted = a.num_logprobs[r];
        const float* logits = args.raw + r * a.vocab;
        int32_t* ids = a.top_ids + r * a.top_width;
        float* values = a.top + r * a.top_width;
        const int n = sycl::min(sycl::clamp(wanted, 0, static_cast<int>(a.top_width)), vocab);
        for (int i = n + thread; i < a.top_width; i += kThreads) {
            ids[i] = -1, values[i] = -INFINITY;
        }
        if (wanted < 0) {
            if (thread == 0) a.chosen[r] = NAN;
            return;
        }
        Histogram& histogram = local.histogram;
        const float highest = logits[id_of(best_below(item, logits, vocab, UINT64_MAX))];
        const auto distance = [&](int i) { return logits[i] != logits[i] ? INFINITY : highest - logits[i]; };
        histogram.clear(item);
        float sum = 0;
        for (int i = thread; i < vocab; i += kThreads) {
            const float below = distance(i);
            sum += sycl::exp(-below);
            if (n) histogram.add_one(linear_bin(below));
        }
        const float log_sum = sycl::log(sycl::reduce_over_group(item.get_group(), sum, sycl::plus<float>()));
        const auto logprob = [&](int id) { return -distance(id) - log_sum; };
        if (thread == 0) a.chosen[r] = logprob(a.tokens[r]), local.candidates = 0;
        if (n == 0) return;

        histogram.find<false>(item, 0, n);
        if (histogram.before + histogram.weight > kCandidates) {
            uint64_t limit = UINT64_MAX;
            for (int rank = 0; rank < n; ++rank) {
                limit = best_below(item, logits, vocab, limit);
                if (thread == 0) ids[rank] = id_of(limit), values[rank] = logprob(id_of(limit));
            }
            return;
        }
        for (int i = thread; i < vocab; i += kThreads) {
            if (linear_bin(distance(i)) > histogram.bin) continue;
            local.candidate[LocalCounter(local.candidates).fetch_add(1u)] = ranked(logits[i], i);
        }
        sycl::group_barrier(item.get_group());
        const int candidates = local.candidates;
        for (int i = thread; i < candidates; i += kThreads) {
            int rank = 0;
            for (int j = 0; j < candidates; ++j) {
                rank += local.candidate[j] > local.candidate[i];
            }
            if (rank < n) ids[rank] = id_of(local.candidate[i]), values[rank] = logprob(id_of(local.candidate[i]));
        }
    }
};

}  // namespace batchinfer::gpu
