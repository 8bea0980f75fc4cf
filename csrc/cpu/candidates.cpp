#include "cpu/candidates.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace batchinfer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float temper(const TemperedRow& row, float logit) {
    return (logit - row.highest) * row.inverse_temperature;
}

// An exponential on the grid of the probability_mass kernel: a multiple of 2^-34.
float on_grid(float exponential) {
    return (exponential + 0x1p-11f) - 0x1p-11f;
}

}  // namespace

Candidates::Candidates(const KernelTable& kernels, int64_t vocab)
    : kernels_(kernels), vocab_(vocab), maxima_((vocab + kSampleBlock - 1) / kSampleBlock) {}

float Candidates::scan(const float* logits) {
    return kernels_.block_maxima(logits, vocab_, maxima_.data());
}

int32_t Candidates::first_of(const float* logits, float x) const {
    if (x == -std::numeric_limits<float>::infinity()) return 0;  // NaN counts as -inf, and may stand before it
    const int64_t block = std::find(maxima_.begin(), maxima_.end(), x) - maxima_.begin();
    const float* begin = logits + std::min(block * kSampleBlock, vocab_);
    const float* end = logits + std::min((block + 1) * kSampleBlock, vocab_);
    return static_cast<int32_t>(std::find(begin, end, x) - logits);
}

void Candidates::collect(const TemperedRow& row, float bound) {
    x_.resize(vocab_);
    id_.resize(vocab_);
    size_t count = 0;
    for (size_t block = 0; block < maxima_.size(); ++block) {
        if (!(temper(row, maxima_[block]) >= bound)) continue;
        const int64_t begin = block * kSampleBlock, end = std::min(begin + kSampleBlock, vocab_);
        for (int64_t id = begin; id < end; ++id) {
            const float x = temper(row, row.logits[id]);
            x_[count] = x;  // written in any case: a branch here would be mispredicted
            id_[count] = static_cast<int32_t>(id);
            count += x >= bound;
        }
    }
    x_.resize(count);
    id_.resize(count);
}

void Candidates::collect_most_likely(const TemperedRow& row, int64_t n) {
    const bool enough_blocks = n <= static_cast<int64_t>(maxima_.size());
    collect(row, enough_blocks ? temper(row, nth_largest(maxima_, n)) : -kInfinity);
}

void Candidates::keep_top_k(int64_t k) {
    if (k >= static_cast<int64_t>(x_.size())) return;
    const float bound = nth_largest(x_, k);
    keep_if([&](size_t i) { return x_[i] >= bound; });
}

// From the most likely token on, adds up mass until it suffices; the last token's x is the bound. Not by sorting: first
// by intervals of x (more than e^-25 below the top there is no mass), then by quickselect within one of them.
void Candidates::keep_mass(double mass) {
    constexpr int kIntervals = 256;
    const auto interval = [](float x) { return static_cast<int>(std::min(-x, 25.0f) * 10.0f); };
    double sums[kIntervals] = {};
    for (size_t i = 0; i < x_.size(); ++i)
        sums[interval(x_[i])] += on_grid(buffer_[i]);
    int last = 0;
    while (last < kIntervals - 1 && sums[last] < mass)
        mass -= sums[last++];

    weighted_.clear();
    for (size_t i = 0; i < x_.size(); ++i) {
        if (interval(x_[i]) == last) weighted_.emplace_back(x_[i], on_grid(buffer_[i]));
    }
    auto begin = weighted_.begin(), end = weighted_.end();
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, std::greater<>());
        double upper = 0.0;
        for (auto w = begin; w != middle; ++w)
            upper += w->second;
        if (upper >= mass) {
            end = middle;
        } else {
            mass -= upper;
            begin = middle;
        }
    }
    const float bound = begin == end ? -kInfinity : begin->first;
    keep_if([&](size_t i) { return x_[i] >= bound; });
}

void Candidates::keep_min_p(float min_p) {
    buffer_.resize(x_.size());
    kernels_.exp(x_.data(), x_.size(), buffer_.data());
    keep_if([&](size_t i) { return buffer_[i] >= min_p; });
}

double Candidates::mass() {
    buffer_.resize(x_.size());
    kernels_.exp(x_.data(), x_.size(), buffer_.data());
    double sum = 0.0;
    for (const float e : buffer_)
        sum += on_grid(e);
    return sum;
}

int32_t Candidates::winner(NoiseKey key) {
    buffer_.resize(x_.size());
    kernels_.gumbel_noise(key, id_.data(), id_.size(), buffer_.data());
    size_t best = 0;
    for (size_t i = 0; i < x_.size(); ++i) {
        buffer_[i] += x_[i];
        if (buffer_[i] > buffer_[best]) best = i;
    }
    return id_[best];
}

std::vector<Candidates::Candidate> Candidates::best(int64_t n) const {
    std::vector<Candidate> all(x_.size());
    for (size_t i = 0; i < all.size(); ++i)
        all[i] = {x_[i], id_[i]};
    const size_t count = std::min<size_t>(n, all.size());
    std::partial_sort(all.begin(), all.begin() + count, all.end(),
                      [](Candidate a, Candidate b) { return a.x != b.x ? a.x > b.x : a.id < b.id; });
    all.resize(count);
    return all;
}

template <class Keep>
void Candidates::keep_if(Keep keep) {
    size_t kept = 0;
    for (size_t i = 0; i < x_.size(); ++i) {
        if (!keep(i)) continue;
        x_[kept] = x_[i];
        id_[kept++] = id_[i];
    }
    x_.resize(kept);
    id_.resize(kept);
}

float Candidates::nth_largest(const std::vector<float>& values, int64_t n) {
    sorted_ = values;
    std::nth_element(sorted_.begin(), sorted_.begin() + (n - 1), sorted_.end(), std::greater<>());
    return sorted_[n - 1];
}

}  // namespace batchinfer
