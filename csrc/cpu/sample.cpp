// Sampling: which tokens a row may choose, and which it chooses. Vector passes over the vocabulary are kernels; what is
// here works on the few tokens that matter. batchinfer/ops/reference_sampler.py is the specification.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/backend.h"
#include "cpu/candidates.h"

namespace batchinfer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One thread's sampler.
class RowSampler {
  public:
    RowSampler(const KernelTable& kernels, const SampleArgs& args)
        : kernels_(kernels), a_(args), candidates_(kernels, args.vocab) {}

    void sample(int64_t row) {
        float* logits = a_.logits + row * a_.vocab;
        const double log_sum = a_.num_logprobs ? report_alternatives(row, logits) : 0.0;
        const bool wants_logprob = a_.num_logprobs && a_.num_logprobs[row] >= 0;
        float* changed = logits;
        if (wants_logprob && (a_.bias_ids || a_.repetition || a_.banned_ids ||
                              a_.allowed)) {  // the chosen token's raw logit is read at the end
            copy_.assign(logits, logits + a_.vocab);
            changed = copy_.data();
        }
        if (a_.bias_ids) {
            for (int32_t i = a_.bias_start[row]; i < a_.bias_start[row + 1]; ++i) {
                changed[a_.bias_ids[i]] += a_.bias_values[i];
            }
        }
        if (a_.repetition) penalise(row, changed);
        if (a_.banned_ids) {
            for (int32_t i = a_.banned_start[row]; i < a_.banned_start[row + 1]; ++i) {
                changed[a_.banned_ids[i]] = -kInfinity;
            }
        }
        if (a_.allowed) forbid(a_.allowed + row * ((a_.vocab + 31) / 32), changed);
        const int32_t token = choose(row, changed);
        a_.tokens[row] = token;
        if (wants_logprob) {
            const float raw = std::isnan(logits[token]) ? -kInfinity : logits[token];
            a_.chosen[row] = static_cast<float>(raw - log_sum);
        }
    }

  private:
    // Writes the most likely tokens, if wanted; returns the logarithm of the sum of exponentials.
    double report_alternatives(int64_t row, const float* logits) {
        float* top = a_.top + row * a_.top_width;
        int32_t* top_ids = a_.top_ids + row * a_.top_width;
        std::fill_n(top, a_.top_width, -kInfinity);
        std::fill_n(top_ids, a_.top_width, -1);
        a_.chosen[row] = std::numeric_limits<float>::quiet_NaN();
        const int64_t count = std::min<int64_t>(a_.num_logprobs[row], a_.top_width);
        if (count < 0) return 0.0;

        const float highest = candidates_.scan(logits);
        const double log_sum = highest + std::log(kernels_.probability_mass({logits, a_.vocab, highest, 1.0f}));
        if (count == 0) return log_sum;
        candidates_.collect_most_likely({logits, a_.vocab, 0.0f, 1.0f}, count);
        for (const auto [x, id] : candidates_.best(count)) {
            *top_ids++ = id;
            *top++ = static_cast<float>(x - log_sum);
        }
        return log_sum;
    }

    void penalise(int64_t row, float* logits) {
        constexpr int32_t kInPrompt = 1 << 30;
        counts_.resize(a_.vocab);  // all zero between rows
        const int32_t begin = a_.history_start[row], end = a_.history_start[row + 1];
        for (int32_t i = begin; i < end; ++i) {
            int32_t& count = counts_[a_.history_ids[i]];
            if (i < begin + a_.history_prompt[row]) {
                count |= kInPrompt;
            } else {
                ++count;
            }
        }
        for (int32_t i = begin; i < end; ++i) {
            const int32_t id = a_.history_ids[i];
            if (counts_[id] == 0) continue;  // done at its first place in the history
            const int32_t generated = counts_[id] & ~kInPrompt;
            counts_[id] = 0;
            float x = logits[id];
            x = x > 0 ? x / a_.repetition[row] : x * a_.repetition[row];
            if (generated > 0) {
                x -= a_.presence[row];
                x -= a_.frequency[row] * static_cast<float>(generated);
            }
            logits[id] = x;
        }
    }

    void forbid(const uint32_t* allowed, float* logits) {
        for (int64_t begin = 0; begin < a_.vocab; begin += 32) {
            const uint32_t word = *allowed++;
            if (word == ~0u) continue;
            const int64_t count = std::min<int64_t>(32, a_.vocab - begin);
            for (int64_t i = 0; i < count; ++i) {
                if (!(word >> i & 1)) logits[begin + i] = -kInfinity;
            }
        }
    }

    int32_t choose(int64_t row, const float* logits) {
        const float highest = candidates_.scan(logits);
        const int32_t likely = candidates_.first_of(logits, highest);
        if (a_.temperature[row] == 0.0f || !std::isfinite(highest)) return likely;

        const float inverse = std::min(1.0f / a_.temperature[row], std::numeric_limits<float>::max());
        const TemperedRow tempered{logits, a_.vocab, highest, inverse};
        const NoiseKey key{static_cast<uint64_t>(a_.seed[row]), static_cast<uint32_t>(a_.position[row])};
        const int32_t top_k = a_.top_k[row] < a_.vocab ? a_.top_k[row] : 0;
        const float top_p = a_.top_p[row], min_p = a_.min_p[row];
        if (top_k > 0) {
            candidates_.collect_most_likely(tempered, top_k);
            candidates_.keep_top_k(top_k);
            if (top_p < 1.0f) candidates_.keep_mass(static_cast<double>(top_p) * candidates_.mass());
        } else if (top_p < 1.0f) {
            keep_top_p(tempered, top_p);
        } else if (min_p > 0.0f) {
            candidates_.collect(tempered, std::log(min_p) - 0.01f);  // a little more than min_p will keep
        } else {
            return static_cast<int32_t>(
                kernels_.gumbel_max(tempered, key, candidates_.maxima(), likely / kSampleBlock));
        }
        if (min_p > 0.0f) candidates_.keep_min_p(min_p);
        return candidates_.winner(key);
    }

    // top-p over the whole vocabulary. Usually a few tokens hold the mass that is wanted.
    void keep_top_p(const TemperedRow& row, float top_p) {
        const double share = static_cast<double>(top_p), total = kernels_.probability_mass(row);
        candidates_.collect_most_likely(row, std::min<int64_t>(32, row.vocab));
        if (candidates_.mass() < share * total) {
            // All tokens below this bound together hold less than the share 1 - top_p.
            const double bound = std::log((1.0 - share) * total / static_cast<double>(row.vocab));
            candidates_.collect(row, static_cast<float>(bound) - 0.01f);
            candidates_.mass();
        }
        candidates_.keep_mass(share * total);
    }

    const KernelTable& kernels_;
    const SampleArgs& a_;
    Candidates candidates_;
    std::vector<float> copy_;
    std::vector<int32_t> counts_;
};

void check_segments(const char* name, const int32_t* ids, const int32_t* start, int64_t rows, int64_t size,
                    int64_t vocab) {
    for (int64_t row = 0; row <= rows; ++row) {
        if (start[row] < (row ? start[row - 1] : 0) || start[row] > size) {
            throw std::invalid_argument(std::string("sample: ") + name + "_start[" + std::to_string(row) + "]=" +
                                        std::to_string(start[row]) + " must rise from 0 to " + std::to_string(size));
        }
    }
    for (int64_t i = 0; i < size; ++i) {
        if (ids[i] < 0 || ids[i] >= vocab) {
            throw std::invalid_argument(std::string("sample: ") + name + "_ids[" + std::to_string(i) + "]=" +
                                        std::to_string(ids[i]) + " is not in [0, " + std::to_string(vocab) + ")");
        }
    }
}

}  // namespace

void sample(Cpu& cpu, const SampleArgs& a) {
    if (a.history_ids) check_segments("history", a.history_ids, a.history_start, a.rows, a.history_size, a.vocab);
    if (a.bias_ids) check_segments("bias", a.bias_ids, a.bias_start, a.rows, a.bias_size, a.vocab);
    if (a.banned_ids) check_segments("banned", a.banned_ids, a.banned_start, a.rows, a.banned_size, a.vocab);
    cpu.pool.parallel_for(a.rows, [&](int64_t begin, int64_t end, int) {
        RowSampler sampler(cpu.kernels, a);
        for (int64_t row = begin; row < end; ++row)
            sampler.sample(row);
    });
}

}  // namespace batchinfer
