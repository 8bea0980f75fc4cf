// Choose: one token per row. Greedy rows take one pass over their logits, others find the thresholds of top-k and top-p
// and then take the maximum of scaled logit plus Gumbel noise among the tokens above. csrc/gpu/choose.cu explains why
// so little noise is computed: -log(v) is an upper bound of it.
#pragma once

#include "sycl/sample.h"

namespace batchinfer::gpu {

struct Choose {
    using Args = SampleArgs;
    using Local = Histogram;
    static constexpr int kThreads = kSampleThreads;

    static void run(const Item& item, Local& histogram, const Args& a) {
        const int64_t r = item.get_group(0);
        Row row{a.logits + r * a.vocab, static_cast<int>(a.vocab), 0, 0};
        const int best_id = id_of(best_below(item, row.logits, row.vocab, UINT64_MAX));
        row.highest = row.logits[best_id];
        const float temperature = a.temperature[r];
        int token = best_id;
        if (temperature != 0 && sycl::fabs(row.highest) < INFINITY) {  // false for NaN
            row.inverse = sycl::fmin(exact::div(1, temperature), 3.402823466e38f);
            const int top_k = a.top_k[r];
            const float top_p = a.top_p[r];
            uint32_t last = kLastKey;
            if (top_k > 0 && top_k < a.vocab) last = last_kept<false>(item, row, top_k, 1, last, histogram);
            if (top_p < 1) last = last_kept<true>(item, row, 0, top_p, last, histogram);
            token = draw(item, row, a.seed[r], a.position[r], last, a.min_p[r], best_id);
        }
        if (thread_of(item) == 0) a.tokens[r] = token;
    }

    // The largest key whose token is kept: less than a target of weight lies strictly above it. Weight is the number of
    // tokens, and the target `count`; or (kMass) their probability, and the target `share` of that of all tokens with
    // keys up to `last`. Equal keys stay together.
    template <bool kMass>
    static uint32_t last_kept(const Item& item, const Row& row, int count, float share, uint32_t last,
                              Histogram& histogram) {
        const auto fill = [&](auto bin_of) {  // bin_of(x, key) < 0: not in this range
            histogram.clear(item);
            for (int i = thread_of(item); i < row.vocab; i += kSampleThreads) {
                const float x = row.x(i);
                const uint32_t key = Row::key(x);
                const int bin = key <= last ? bin_of(x, key) : -1;
                if (bin < 0) continue;
                histogram.add_one(bin);
                if (kMass && x > kNoMass) histogram.add_mass(bin, exact::mass(x));
            }
        };
        fill([](float x, uint32_t) { return linear_bin(-x); });
        const uint64_t target = kMass ? exact::share_of(histogram.total<kMass>(item), share) : count;
        histogram.find<kMass>(item, 0, target);
        uint32_t low = Row::key(histogram.bin / 64.f), high = kLastKey;
        if (histogram.bin < kBins - 1) high = Row::key((histogram.bin + 1) / 64.f) - 1;
        // Each round splits the range into up to kBins parts, until the part where the sum reaches the target has one
        // token or one key.
        while (low < high && histogram.count[histogram.bin] > 1) {
            const uint64_t base = histogram.before;
            const int shift = sycl::max(0, 21 - static_cast<int>(sycl::clz(high - low)));  // into less than 2**11 bins
            fill([=](float, uint32_t key) {
                return key >= low && key <= high ? static_cast<int>((key - low) >> shift) : -1;
            });
            histogram.find<kMass>(item, base, target);
            low += static_cast<uint32_t>(histogram.bin) << shift;
            high = sycl::min(high, low + ((1u << shift) - 1));
        }
        return sycl::min(high, last);
    }

    // The maximum of x + noise over the kept tokens. `best_id` is the most likely one, which every filter keeps.
    static int draw(const Item& item, const Row& row, uint64_t seed, uint32_t position, uint32_t last, float min_p,
                    int best_id) {
        const Words its_words = philox(best_id / 64 * 16 + best_id % 16, position, seed);
        float best = exact::add(row.x(best_id), exact::gumbel(exact::uniform(its_words.word(best_id / 16 % 4))));
        uint64_t winner = ranked(best, best_id);
        const int counters = (row.vocab + 63) / 64 * 16;  // whole sub-groups
        for (int c = thread_of(item); c < counters; c += kSampleThreads) {
            const Words words = philox(c, position, seed);
            bool found = false;
            for (int w = 0; w < 4; ++w) {
                const int id = c / 16 * 64 + c % 16 + 16 * w;
                const float x = id < row.vocab ? row.x(id) : -INFINITY, v = exact::uniform(words.word(w));
                const float bound = x - 0.69314718f * sycl::log2(v) + 1e-3f;
                if (bound < best || Row::key(x) > last || x == -INFINITY) continue;
                if (min_p > 0 && exact::exp(x) < min_p) continue;
                const float score = exact::add(x, exact::gumbel(v));
                winner = larger(winner, ranked(score, id));
                best = sycl::fmax(best, score);
                found = true;
            }
            if (sycl::any_of_group(item.get_sub_group(), found)) {
                best = sycl::reduce_over_group(item.get_sub_group(), best, sycl::maximum<float>());
            }
        }
        return id_of(best_in_group(item, winner));
    }
};

}  // namespace batchinfer::gpu
