// choose: one token per row. Greedy rows take one pass over their logits, others find the thresholds of top-k and top-p
// and then take the maximum of scaled logit plus Gumbel noise among the tokens above.
//
// Noise costs 150 instructions a token if computed for all. But -log(v) is an upper bound of it (v = 1 - u), good to
// many digits for the noise that wins; so only tokens whose bound reaches the best score so far, which starts at that
// of the most likely token, are computed: a few dozen per warp instead of 4,096.
#include "gpu/sample.cuh"

namespace batchinfer::gpu {
namespace {

// The largest key whose token is kept: less than `target` weight lies strictly above it. Weight is the number of
// tokens, or their probability; then `target` is a share of that of all tokens with keys up to `last`. Equal keys stay
// together.
template <bool kMass>
__device__ uint32_t last_kept(const Row& row, double target, uint32_t last, Histogram& histogram) {
    uint32_t low = 0, high = kLastKey;
    uint64_t base = 0;
    const auto fill = [&](auto bin_of) {  // bin_of(x, key) < 0: not in this range
        histogram.clear();
#pragma unroll 4
        for (int i = threadIdx.x; i < row.vocab; i += kSampleThreads) {
            const float x = row.x(i);
            const uint32_t key = Row::key(x);
            const int bin = key <= last ? bin_of(x, key) : -1;
            if (bin < 0) continue;
            histogram.add_one(bin);
            if (kMass && x > kNoMass) histogram.add_mass(bin, exact::mass(x));
        }
    };
    fill([](float x, uint32_t) { return linear_bin(-x); });
    if (kMass) target *= static_cast<double>(histogram.total<kMass>());
    histogram.find<kMass>(base, target);
    low = Row::key(histogram.bin / 64.f);
    if (histogram.bin < kBins - 1) high = Row::key((histogram.bin + 1) / 64.f) - 1;
    // Each round splits the range into up to kBins parts, until the part where the sum reaches the target has one token
    // or one key.
    while (low < high && histogram.count[histogram.bin] > 1) {
        base = histogram.before;
        const int shift = max(0, 21 - __clz(high - low));  // (high - low) >> shift < 2**11 = kBins
        __syncthreads();                                   // all have read the histogram
        fill([=](float, uint32_t key) {
            return key >= low && key <= high ? static_cast<int>((key - low) >> shift) : -1;
        });
        histogram.find<kMass>(base, target);
        low += static_cast<uint32_t>(histogram.bin) << shift;
        high = min(high, low + ((1u << shift) - 1));
    }
    __syncthreads();
    return min(high, last);
}

// The maximum of x + noise over the kept tokens. `best_id` is the most likely one, which every filter keeps.
__device__ int draw(const Row& row, uint64_t seed, uint32_t position, uint32_t last, float min_p, int best_id,
                    uint64_t* scratch) {
    const Words its_words = philox(best_id / 64 * 16 + best_id % 16, position, seed);
    float best = exact::add(row.x(best_id), exact::gumbel(exact::uniform(its_words.word(best_id / 16 % 4))));
    uint64_t winner = ranked(best, best_id);
    const int counters = (row.vocab + 63) / 64 * 16;
    for (int c = threadIdx.x; c < (counters + kWarp - 1) / kWarp * kWarp; c += kSampleThreads) {  // whole warps
        const int first = c / 16 * 64 + c % 16;
        float x[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int id = first + 16 * w;
            x[w] = id < row.vocab ? row.x(id) : -INFINITY;
        }
        const Words words = philox(c, position, seed);
        bool found = false;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float v = exact::uniform(words.word(w));
            const float bound = x[w] - 0.69314718f * __log2f(v) + 1e-3f;
            if (bound < best || Row::key(x[w]) > last || x[w] == -INFINITY) continue;
            if (min_p > 0 && exact::exp(x[w]) < min_p) continue;
            const float score = exact::add(x[w], exact::gumbel(v));
            winner = larger(winner, ranked(score, first + 16 * w));
            best = fmaxf(best, score);
            found = true;
        }
        if (any_lane(found)) {
            for (int mask = kWarp / 2; mask > 0; mask /= 2) {
                best = fmaxf(best, shuffle_xor(best, mask));
            }
        }
    }
    return id_of(block_reduce(winner, scratch, larger));
}

__global__ void BATCHINFER_LAUNCH_BOUNDS(kSampleThreads, 2) choose_kernel(SampleArgs a) {
    __shared__ Histogram histogram;
    const int64_t r = blockIdx.x;
    Row row{a.logits + r * a.vocab, static_cast<int>(a.vocab), 0, 0};
    const uint64_t top = best_of(row.logits, row.vocab, histogram.scratch);
    const int best_id = id_of(top);
    row.highest = row.logits[best_id];
    const float temperature = a.temperature[r];
    int token = best_id;
    if (temperature != 0 && isfinite(row.highest)) {
        row.inverse = fminf(exact::div(1, temperature), 3.402823466e38f);
        const int top_k = a.top_k[r];
        const float top_p = a.top_p[r];
        uint32_t last = kLastKey;
        if (top_k > 0 && top_k < a.vocab) last = last_kept<false>(row, top_k, last, histogram);
        if (top_p < 1) last = last_kept<true>(row, top_p, last, histogram);
        token = draw(row, a.seed[r], a.position[r], last, a.min_p[r], best_id, histogram.scratch);
    }
    if (threadIdx.x == 0) a.tokens[r] = token;
}

}  // namespace

void choose(const SampleArgs& a, Stream stream) {
    if (a.rows == 0) return;
    gpuLaunch(choose_kernel, a.rows, kSampleThreads, 0, native(stream), a);
    check_launch("sample");
}

}  // namespace batchinfer::gpu
