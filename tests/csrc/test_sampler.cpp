// The sampler's passes over the vocabulary, on every instruction set: bit for bit what plain float32 arithmetic gives
// (batchinfer/ops/reference_sampler.py specifies it), and so the same on every kind of processor.
#include <limits>

#include "kernel_test.h"

using namespace batchinfer;
using namespace batchinfer::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// ln x and e^x with the operations of csrc/cpu/vec.h one after another, each rounded by itself.
float plain_log(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x), k = (bits - 0x3f3504f3) >> 23;
    const float f = std::bit_cast<float>(bits - (k << 23)) - 1.0f;
    const float s = f / (2.0f + f), z = s * s;
    const float p = (0.298851877f * z + 0.399770796f) * z + 0.666667819f;
    const float n = static_cast<float>(k);
    return n * 0.693359375f + ((s + s) + (s * (z * p) + n * -2.12194440e-4f));
}

float plain_exp(float x) {
    if (x < -87.0f) return 0.0f;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = n * 2.12194440e-4f + (n * -0.693359375f + x);
    float p = 0.00138144672f;
    for (const float c : {0.00836878084f, 0.0416683927f, 0.166665196f, 0.49999994f})
        p = p * r + c;
    return (p * (r * r) + r + 1.0f) * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
}

// Word `which` of the Philox4x32-10 block counted (counter, second, 0, 0).
uint32_t philox_word(uint32_t counter, uint32_t second, uint64_t key, int which) {
    uint32_t c[4] = {counter, second, 0, 0}, k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
    }
    return c[which];
}

float plain_noise(NoiseKey key, int64_t id) {
    const uint32_t word =
        philox_word(static_cast<uint32_t>(id / 64 * 16 + id % 16), key.position, key.seed, id / 16 % 4);
    const float v = std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
    const float rest = 1.0f - v, lost = (1.0f - rest) - v;
    return 0.0f - plain_log(0.0f - (plain_log(rest) + lost / rest));
}

bool same(float a, float b) {
    return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

void exponentials(const KernelTable& kernels, Random& random) {
    Numbers x = random.numbers(random.integer(1, 300), 30), out(Dtype::float32, x.count());
    for (int64_t i = 0; i < x.count(); ++i)
        x.floats()[i] = -std::fabs(x[i]);
    x.floats()[0] = -kInf;
    kernels.exp(x.floats(), x.count(), out.floats());
    for (int64_t i = 0; i < x.count(); ++i) {
        CHECK(same(out[i], plain_exp(x[i])));
        if (x[i] > -87) CHECK(std::fabs(out[i] / std::exp(double{x[i]}) - 1) < 0x1p-21 + std::fabs(x[i]) * 0x1p-24);
    }
    CHECK(out.whole());
}

void noise(const KernelTable& kernels, Random& random) {
    const NoiseKey key = {static_cast<uint64_t>(random.integer(0, INT64_MAX)) * 2 + 1,
                          static_cast<uint32_t>(random.integer(0, 1 << 20))};
    const std::vector<int32_t> ids = random.integers(random.integer(1, 200), 0, 150000);
    Numbers out(Dtype::float32, static_cast<int64_t>(ids.size()));
    kernels.gumbel_noise(key, ids.data(), out.count(), out.floats());
    for (int64_t i = 0; i < out.count(); ++i)
        CHECK(same(out[i], plain_noise(key, ids[i])));
    CHECK(out.whole());
}

// Banned tokens and NaN among the logits.
void rows(const KernelTable& kernels, Random& random) {
    const int64_t vocab = random.integer(1, 700), blocks = (vocab + kSampleBlock - 1) / kSampleBlock;
    Numbers logits = random.numbers(vocab, random.coin() ? 1 : 20), maxima(Dtype::float32, blocks);
    for (int64_t i = random.integer(0, 20); i > 0; --i)
        logits.floats()[random.integer(0, vocab - 1)] = random.coin() ? -kInf : std::nanf("");
    logits.floats()[random.integer(0, vocab - 1)] = 0.25f;

    const float highest = kernels.block_maxima(logits.floats(), vocab, maxima.floats());
    float want_highest = -kInf;
    for (int64_t b = 0; b < blocks; ++b) {
        float want = -kInf;
        for (int64_t i = b * kSampleBlock; i < std::min(vocab, (b + 1) * kSampleBlock); ++i)
            want = logits[i] > want ? logits[i] : want;
        CHECK(maxima[b] == want);
        want_highest = std::max(want, want_highest);
    }
    CHECK(highest == want_highest && maxima.whole());

    const TemperedRow row = {logits.floats(), vocab, highest, 1 / 0.7f};
    const NoiseKey key = {static_cast<uint64_t>(random.integer(0, INT64_MAX)), 77};
    double mass = 0;
    float best = -kInf;
    int64_t winner = vocab, likely = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        if (std::isnan(logits[i])) continue;
        const float x = (logits[i] - highest) * row.inverse_temperature, score = x + plain_noise(key, i);
        mass += static_cast<double>((plain_exp(x) + 0x1p-11f) - 0x1p-11f);
        if (score > best) best = score, winner = i;
        if (logits[i] == highest) likely = i / kSampleBlock;
    }
    CHECK(kernels.probability_mass(row) == mass);
    CHECK(kernels.gumbel_max(row, key, maxima.floats(), likely) == winner);
    CHECK(kernels.gumbel_max(row, key, maxima.floats(), random.integer(0, blocks - 1)) == winner);
}

}  // namespace

int main() {
    for_every_isa([](const KernelTable& kernels) {
        Random random(2);
        for (int i = 0; i < 100; ++i) {
            exponentials(kernels, random);
            noise(kernels, random);
            rows(kernels, random);
        }
    });
}
