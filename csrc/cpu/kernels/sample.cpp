// The sampler's passes over the vocabulary.
//
// The arithmetic is specified by batchinfer/ops/reference_sampler.py down to the rounding: float32, products and
// sums rounded separately, so that every instruction set and the reference choose the same tokens.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/philox.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

const float kMinusInfinity = -__builtin_inff();

// The largest possible noise is -ln(2^-33) = 22.87: a token this far below the best score so far cannot win.
constexpr float kNoiseBound = 23.0f;

// How the tokens of a block of 64 share Philox blocks: token t has word t / 16 % 4 of the block counted t / 64 * 16 + t
// % 16.
constexpr int kCounters = 16;
static_assert(kSampleBlock == 4 * kCounters && kCounters % Vec::W == 0);

// Uniform in (0, 1].
Vec uniform(Words random) {
    return (Vec{__builtin_convertvector(random, Floats)} + Vec::broadcast(0.5f)) * Vec::broadcast(0x1p-32f);
}

// Standard Gumbel noise -ln(-ln(1 - v)), v uniform in (0, 1) from 32 random bits.
Vec gumbel(Words random) {
    constexpr auto c = Vec::broadcast;
    const Vec scaled = uniform(random);
    const Vec v = select(scaled.v < 1.0f - 0x1p-24f, scaled, c(1.0f - 0x1p-24f));
    const Vec rest = c(1.0f) - v;
    const Vec lost = (c(1.0f) - rest) - v;  // what rounding took from 1 - v: -ln is accurate for small v, too
    const Vec exponential = Vec::zero() - (log(rest) + lost / rest);
    return Vec::zero() - log(exponential);
}

// x[i..i + W), -inf from n on.
Vec load_padded(const float* x, int64_t i, int64_t n) {
    const int64_t left = n - i;
    if (left >= Vec::W) return Vec::load(x + i);
    return Vec::load(x + i, left > 0 ? static_cast<int>(left) : 0, kMinusInfinity);
}

// Whether all tokens of a block stay below `best`, seen from their random words alone, without a logarithm: as
// -ln(1 - v) >= v, the noise is at most -ln v. The margin of 0.1 % is far above the rounding of a score.
bool cannot_win(Words least, float highest_x, float best) {
    const float least_v = -reduce_max(Vec::zero() - uniform(least));
    const Vec limit = exp(Vec::broadcast(highest_x - best)) * Vec::broadcast(1.001f);
    return least_v > limit.v[0];
}

struct Tempered {
    explicit Tempered(const TemperedRow& r)
        : row(r), highest(Vec::broadcast(r.highest)), inverse(Vec::broadcast(r.inverse_temperature)) {}

    Vec load(int64_t i) const { return (load_padded(row.logits, i, row.vocab) - highest) * inverse; }

    const TemperedRow& row;
    Vec highest, inverse;
};

int64_t blocks_of(int64_t n) {
    return (n + kSampleBlock - 1) / kSampleBlock;
}

}  // namespace

float block_maxima(const float* x, int64_t n, float* maxima) {
    float highest = kMinusInfinity;
    for (int64_t block = 0; block < blocks_of(n); ++block) {
        Vec m = Vec::broadcast(kMinusInfinity);
        for (int64_t i = 0; i < kSampleBlock; i += Vec::W)
            m = max(load_padded(x, block * kSampleBlock + i, n), m);
        maxima[block] = reduce_max(m);
        highest = maxima[block] > highest ? maxima[block] : highest;
    }
    return highest;
}

double probability_mass(const TemperedRow& row) {
    typedef double Doubles __attribute__((vector_size(8 * Vec::W)));
    const Tempered x(row);
    const Vec grid = Vec::broadcast(0x1p-11f);  // from here on, floats are multiples of 2^-34
    Doubles sum{};
    for (int64_t i = 0; i < row.vocab; i += Vec::W) {
        const Vec p = exp<Separate>(max(x.load(i), Vec::broadcast(kMinusInfinity)));
        sum += __builtin_convertvector(((p + grid) - grid).v, Doubles);
    }
    double total = 0.0;
    for (int lane = 0; lane < Vec::W; ++lane)
        total += sum[lane];
    return total;
}

int64_t gumbel_max(const TemperedRow& row, NoiseKey key, const float* maxima, int64_t likely) {
    const Tempered x(row);
    const Words lanes = bits_as<Words>(lane_index());
    float best = kMinusInfinity;
    int64_t best_id = row.vocab;
    const auto visit = [&](int64_t block) {
        const float highest_x = (maxima[block] - row.highest) * row.inverse_temperature;
        if (highest_x + kNoiseBound < best) return;
        PhiloxBlocks random[kCounters / Vec::W];
        Words least = ~Words{};
        for (int i = 0; i < kCounters / Vec::W; ++i) {
            const uint32_t counter = static_cast<uint32_t>(block * kCounters + i * Vec::W);
            random[i] = philox(lanes + counter, key.position, key.seed);
            for (const Words word : random[i].word)
                least = word < least ? word : least;
        }
        if (cannot_win(least, highest_x, best)) return;

        const int64_t begin = block * kSampleBlock;
        float scores[kSampleBlock];
        Vec highest = Vec::broadcast(kMinusInfinity);
        for (int i = 0; i < kCounters / Vec::W; ++i) {
            for (int word = 0; word < 4; ++word) {
                const int offset = word * kCounters + i * Vec::W;
                const Vec score = x.load(begin + offset) + gumbel(random[i].word[word]);
                score.store(scores + offset);
                highest = max(score, highest);
            }
        }
        const float score = reduce_max(highest);
        if (score < best || score == kMinusInfinity) return;
        int64_t id = 0;
        while (scores[id] != score)
            ++id;
        if (score > best || begin + id < best_id) best_id = begin + id;
        best = score;
    };
    visit(likely);
    for (int64_t block = 0; block < blocks_of(row.vocab); ++block) {
        if (block != likely) visit(block);
    }
    return best_id;
}

void gumbel_noise(NoiseKey key, const int32_t* ids, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += Vec::W) {
        const int count = n - i < Vec::W ? static_cast<int>(n - i) : Vec::W;
        Words id{};
        for (int lane = 0; lane < count; ++lane)
            id[lane] = static_cast<uint32_t>(ids[i + lane]);
        const PhiloxBlocks random = philox((id / 64) * kCounters + id % kCounters, key.position, key.seed);
        const Words which = id / kCounters % 4;
        Words word = random.word[0];
        for (uint32_t w = 1; w < 4; ++w)
            word = which == w ? random.word[w] : word;
        gumbel(word).store(out + i, count);
    }
}

void exp_of(const float* x, int64_t n, float* out) {
    for_vectors(n, [&](int64_t i, auto count) { exp<Separate>(Vec::load(x + i, count)).store(out + i, count); });
}

}  // namespace batchinfer::BATCHINFER_ISA
