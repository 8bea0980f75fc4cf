// Sampling: which tokens a row may choose, and which it chooses. Vector passes over the vocabulary are kernels; what is
// here works on the few tokens that matter. batchinfer/ops/reference_sampler.py is the specification.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>

#include "cpu/backend.h"

namespace batchinfer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
    float x;  // tempered logit
    int32_t id;
};

// One thread's sampler, with buffers that serve row after row.
class RowSampler {
  public:
    RowSampler(const KernelTable& kernels, const SampleArgs& args)
        : kernels_(kernels), a_(args), maxima_((args.vocab + kSampleBlock - 1) / kSampleBlock) {}

    void sample(int64_t row) {
        float* logits = a_.logits + row * a_.vocab;
        const bool wants_logprobs = a_.num_logprobs && a_.num_logprobs[row] >= 0;
        const double log_sum = a_.num_logprobs ? report_alternatives(row, logits) : 0.0;
        float* changed = logits;
        if (wants_logprobs && (a_.repetition || a_.banned_ids)) {  // the chosen token's raw logit is read at the end
            copy_.assign(logits, logits + a_.vocab);
            changed = copy_.data();
        }
        if (a_.repetition) penalise(row, changed);
        if (a_.banned_ids) {
            for (int32_t i = a_.banned_start[row]; i < a_.banned_start[row + 1]; ++i) {
                changed[a_.banned_ids[i]] = -kInfinity;
            }
        }
        const int32_t token = choose(row, changed);
        a_.tokens[row] = token;
        if (wants_logprobs) a_.chosen[row] = static_cast<float>(logits[token] - log_sum);
    }

  private:
    // Writes the most likely tokens, if wanted; returns the logarithm of the sum of exponentials.
    double report_alternatives(int64_t row, const float* logits) {
        float* top = a_.top + row * a_.top_width;
        int32_t* top_ids = a_.top_ids + row * a_.top_width;
        std::fill_n(top, a_.top_width, -kInfinity);
        std::fill_n(top_ids, a_.top_width, -1);
        a_.chosen[row] = std::numeric_limits<float>::quiet_NaN();
        if (a_.num_logprobs[row] < 0) return 0.0;

        const float highest = kernels_.block_maxima(logits, a_.vocab, maxima_.data());
        const double log_sum = highest + std::log(kernels_.probability_mass({logits, a_.vocab, highest, 1.0f}));
        const TemperedRow raw{logits, a_.vocab, 0.0f, 1.0f};
        int64_t count = std::min<int64_t>(a_.num_logprobs[row], a_.top_width);
        if (count == 0) return log_sum;
        collect(raw, nth_maximum(raw, count));
        count = std::min<int64_t>(count, candidates_.size());
        std::partial_sort(candidates_.begin(), candidates_.begin() + count, candidates_.end(),
                          [](Candidate a, Candidate b) { return a.x != b.x ? a.x > b.x : a.id < b.id; });
        for (int64_t i = 0; i < count; ++i) {
            top_ids[i] = candidates_[i].id;
            top[i] = static_cast<float>(candidates_[i].x - log_sum);
        }
        return log_sum;
    }

    void penalise(int64_t row, float* logits) {
        constexpr int32_t kInPrompt = 1 << 30;
        counts_.resize(a_.vocab);  // all zero between rows
        const int32_t begin = a_.history_start[row], end = a_.history_start[row + 1];
        for (int32_t i = begin; i < end; ++i) {
            int32_t& count = counts_[a_.history_ids[i]];
            i < begin + a_.history_prompt[row] ? count |= kInPrompt : ++count;
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

    int32_t choose(int64_t row, const float* logits) {
        const float highest = kernels_.block_maxima(logits, a_.vocab, maxima_.data());
        const int32_t likely = first_of(logits, highest);
        if (a_.temperature[row] == 0.0f || !std::isfinite(highest)) return likely;

        const float inverse = std::min(1.0f / a_.temperature[row], std::numeric_limits<float>::max());
        const TemperedRow tempered{logits, a_.vocab, highest, inverse};
        const NoiseKey key{static_cast<uint64_t>(a_.seed[row]), static_cast<uint32_t>(a_.position[row])};
        const bool top_k = a_.top_k[row] > 0 && a_.top_k[row] < a_.vocab, top_p = a_.top_p[row] < 1.0f;
        const float min_p = a_.min_p[row];
        if (!top_k && !top_p && !(min_p > 0.0f)) {
            return static_cast<int32_t>(kernels_.gumbel_max(tempered, key, maxima_.data(), likely / kSampleBlock));
        }
        if (top_k) keep_top_k(tempered, a_.top_k[row]);
        if (top_p) keep_top_p(tempered, a_.top_p[row], top_k);
        if (!top_k && !top_p) collect(tempered, std::log(min_p) - 0.01f);  // a little more than min_p will keep
        if (min_p > 0.0f) keep_min_p(min_p);
        return winner(key);
    }

    // The first token whose logit is x, 0 if there is none; maxima_ are the row's.
    int32_t first_of(const float* logits, float x) const {
        const int64_t block = std::find(maxima_.begin(), maxima_.end(), x) - maxima_.begin();
        const float* begin = logits + std::min(block * kSampleBlock, a_.vocab);
        const float* end = logits + std::min((block + 1) * kSampleBlock, a_.vocab);
        const float* found = std::find(begin, end, x);
        return found == end ? 0 : static_cast<int32_t>(found - logits);
    }

    static float temper(const TemperedRow& row, float logit) { return (logit - row.highest) * row.inverse_temperature; }

    // A bound that at least n tokens reach: the n-th largest block maximum.
    float nth_maximum(const TemperedRow& row, int64_t n) {
        if (n > static_cast<int64_t>(maxima_.size())) return -kInfinity;
        sorted_ = maxima_;
        std::nth_element(sorted_.begin(), sorted_.begin() + (n - 1), sorted_.end(), std::greater<>());
        return temper(row, sorted_[n - 1]);
    }

    // candidates_ = all tokens that reach `bound`, by id.
    void collect(const TemperedRow& row, float bound) {
        candidates_.clear();
        for (size_t block = 0; block < maxima_.size(); ++block) {
            if (temper(row, maxima_[block]) < bound) continue;
            const int64_t begin = block * kSampleBlock, end = std::min(begin + kSampleBlock, row.vocab);
            for (int64_t id = begin; id < end; ++id) {
                const float x = temper(row, row.logits[id]);
                if (x >= bound) candidates_.push_back({x, static_cast<int32_t>(id)});
            }
        }
    }

    void keep_from(float bound) {
        std::erase_if(candidates_, [&](Candidate c) { return c.x < bound; });
    }

    void keep_top_k(const TemperedRow& row, int64_t k) {
        collect(row, nth_maximum(row, k));
        if (static_cast<int64_t>(candidates_.size()) <= k) return;
        sorted_.clear();
        for (const Candidate& c : candidates_) sorted_.push_back(c.x);
        std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<>());
        keep_from(sorted_[k - 1]);
    }

    // Keeps the tokens with less than top_p of the probability strictly above them. Without top-k before it, looks at the
    // most likely tokens first and takes more until they hold enough.
    void keep_top_p(const TemperedRow& row, float top_p, bool collected) {
        double target = 0.0, found = 0.0;
        if (collected) {
            found = weigh();
            target = static_cast<double>(top_p) * found;
        } else {
            target = static_cast<double>(top_p) * kernels_.probability_mass(row);
            for (int64_t n = 32; found < target || candidates_.empty(); n *= 8) {
                const float bound = nth_maximum(row, n);
                collect(row, bound);
                found = weigh();
                if (bound == -kInfinity) break;
            }
        }
        keep_from(weighted_threshold(target));
    }

    struct Weighted {
        float x;
        double mass;
    };

    // weighted_ = candidates with their probability mass, not normalised; returns the sum, which is exact.
    double weigh() {
        exponentials();
        weighted_.clear();
        double sum = 0.0;
        for (size_t i = 0; i < candidates_.size(); ++i) {
            const float grid = 0x1p-11f;
            const float mass = (buffer_[i] + grid) - grid;  // as in the probability_mass kernel
            weighted_.push_back({candidates_[i].x, mass});
            sum += mass;
        }
        return sum;
    }

    // The x of the last token that is needed, from the most likely one on, to reach `target`: quickselect by mass.
    float weighted_threshold(double target) {
        auto begin = weighted_.begin(), end = weighted_.end();
        while (end - begin > 1) {
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, [](const Weighted& a, const Weighted& b) { return a.x > b.x; });
            double upper = 0.0;
            for (auto w = begin; w != middle; ++w) upper += w->mass;
            if (upper >= target) {
                end = middle;
            } else {
                target -= upper;
                begin = middle;
            }
        }
        return begin->x;
    }

    void keep_min_p(float min_p) {
        exponentials();
        size_t kept = 0;
        for (size_t i = 0; i < candidates_.size(); ++i) {
            if (buffer_[i] >= min_p) candidates_[kept++] = candidates_[i];
        }
        candidates_.resize(kept);
    }

    // buffer_ = e^x of the candidates.
    void exponentials() {
        sorted_.clear();
        for (const Candidate& c : candidates_) sorted_.push_back(c.x);
        buffer_.resize(candidates_.size());
        kernels_.exp(sorted_.data(), sorted_.size(), buffer_.data());
    }

    // The candidate with the largest sum of tempered logit and noise, the smallest id among equals.
    int32_t winner(NoiseKey key) {
        ids_.clear();
        for (const Candidate& c : candidates_) ids_.push_back(c.id);
        buffer_.resize(ids_.size());
        kernels_.gumbel_noise(key, ids_.data(), ids_.size(), buffer_.data());
        size_t best = 0;
        for (size_t i = 0; i < ids_.size(); ++i) {
            buffer_[i] += candidates_[i].x;
            if (buffer_[i] > buffer_[best]) best = i;
        }
        return ids_[best];
    }

    const KernelTable& kernels_;
    const SampleArgs& a_;
    std::vector<float> maxima_, sorted_, buffer_, copy_;
    std::vector<int32_t> ids_, counts_;
    std::vector<Candidate> candidates_;
    std::vector<Weighted> weighted_;
};

void check_segments(const char* name, const int32_t* ids, const int32_t* start, int64_t rows, int64_t size, int64_t vocab) {
    for (int64_t row = 0; row <= rows; ++row) {
        if (start[row] < (row ? start[row - 1] : 0) || start[row] > size) {
            throw std::invalid_argument(std::string("sample: ") + name + "_start[" + std::to_string(row) + "]=" +
                                        std::to_string(start[row]) + " must rise from 0 to " + std::to_string(size));
        }
    }
    for (int64_t i = 0; i < size; ++i) {
        if (ids[i] < 0 || ids[i] >= vocab) {
            throw std::invalid_argument(std::string("sample: ") + name + "_ids[" + std::to_string(i) +
                                        "]=" + std::to_string(ids[i]) + " is not in [0, " + std::to_string(vocab) + ")");
        }
    }
}

}  // namespace

void sample(Cpu& cpu, const SampleArgs& a) {
    if (a.history_ids) check_segments("history", a.history_ids, a.history_start, a.rows, a.history_size, a.vocab);
    if (a.banned_ids) check_segments("banned", a.banned_ids, a.banned_start, a.rows, a.banned_size, a.vocab);
    cpu.pool.parallel_for(a.rows, [&](int64_t begin, int64_t end, int) {
        RowSampler sampler(cpu.kernels, a);
        for (int64_t row = begin; row < end; ++row) sampler.sample(row);
    });
}

}  // namespace batchinfer
