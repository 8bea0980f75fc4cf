// The few tokens of a row that a filter has left, and the filters.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/kernel_table.h"

namespace batchinfer {

// One row of logits at a time; the buffers serve row after row. Collect first, then filter, then take the winner.
class Candidates {
  public:
    Candidates(const KernelTable& kernels, int64_t vocab);

    // Maxima of the blocks of `logits`, which the other calls for this row need; returns the highest logit.
    float scan(const float* logits);

    // The first token with logit `x`, a value that scan() returned; 0 if all are -inf or NaN.
    int32_t first_of(const float* logits, float x) const;

    const float* maxima() const { return maxima_.data(); }

    // All tokens with a tempered logit of at least `bound`.
    void collect(const TemperedRow& row, float bound);

    // The n most likely tokens, ties included, and usually some more.
    void collect_most_likely(const TemperedRow& row, int64_t n);

    // Keeps the k most likely and what ties with the last of them.
    void keep_top_k(int64_t k);

    // Sum of the candidates' probability, in units of KernelTable::probability_mass.
    double mass();

    // Keeps the tokens with less than `mass` of probability strictly above them, the most likely one always. Uses the
    // exponentials that the call of mass() just before it has left.
    void keep_mass(double mass);

    // Keeps the tokens with at least the share `min_p` of the most likely token's probability.
    void keep_min_p(float min_p);

    // The candidate with the largest sum of tempered logit and noise, the smallest id among equals.
    int32_t winner(NoiseKey key);

    struct Candidate {
        float x;  // tempered logit
        int32_t id;
    };

    // The most likely ones, at most n, ties by smaller id.
    std::vector<Candidate> best(int64_t n) const;

  private:
    template <class Keep>
    void keep_if(Keep keep);
    float nth_largest(const std::vector<float>& values, int64_t n);

    const KernelTable& kernels_;
    int64_t vocab_;
    std::vector<float> maxima_;  // of the row's blocks
    std::vector<float> x_;       // candidates: tempered logits,
    std::vector<int32_t> id_;    // and token ids, ascending
    std::vector<float> buffer_;  // one value per candidate
    std::vector<float> sorted_;
    std::vector<std::pair<float, double>> weighted_;  // x and mass of some candidates
};

}  // namespace batchinfer
