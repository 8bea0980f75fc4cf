// What the tests of the CPU kernels share: random numbers in memory, and every instruction set that this CPU can run.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

#ifdef BATCHINFER_EMULATED
namespace batchinfer::BATCHINFER_EMULATED {
extern const KernelTable table;
}
#endif

namespace batchinfer::test {

/// The nearest bfloat16, ties to even.
inline float rounded(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

/// float32 or bfloat16 numbers. Behind the last stands a fence of NaN: what is read there shows in the results, and
/// what is written there is found by whole().
class Numbers {
  public:
    /// To be written: all NaN.
    Numbers(Dtype dtype, int64_t count) : Numbers(dtype, std::vector<float>(count, std::nanf(""))) {}

    /// These, rounded where `dtype` is bfloat16.
    Numbers(Dtype dtype, std::vector<float> values) : dtype_(dtype), count_(values.size()), floats_(std::move(values)) {
        floats_.resize(count_ + kFence, std::nanf(""));
        for (const float x : floats_)
            halves_.push_back(std::isnan(x) ? 0x7fff : std::bit_cast<uint32_t>(rounded(x)) >> 16);
    }

    Dtype dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    void* data() { return dtype_ == Dtype::float32 ? static_cast<void*>(floats_.data()) : halves_.data(); }
    float* floats() {
        CHECK(dtype_ == Dtype::float32);
        return floats_.data();
    }
    float operator[](int64_t i) const {
        return dtype_ == Dtype::float32 ? floats_[i] : std::bit_cast<float>(uint32_t{halves_[i]} << 16);
    }
    bool whole() const {
        for (int64_t i = count_; i < count_ + kFence; ++i) {
            if (!std::isnan((*this)[i])) return false;
        }
        return true;
    }

    /// Each within `relative` of its size and `absolute` of `want`; of what bfloat16 can hold, too.
    template <class Want>
    void check_near(const Want& want, double relative, double absolute) const {
        CHECK(whole());
        for (int64_t i = 0; i < count_; ++i) {
            const double w = want(i), bound = std::fabs(w) * (relative + rounding()) + absolute;
            if (!(std::fabs((*this)[i] - w) <= bound))
                std::fprintf(stderr, "number %lld is %.9g, not %.9g\n", static_cast<long long>(i), (*this)[i], w);
            CHECK(std::fabs((*this)[i] - w) <= bound);
        }
    }

  private:
    static constexpr int64_t kFence = 64;
    double rounding() const { return dtype_ == Dtype::float32 ? 0 : 0x1p-8; }

    Dtype dtype_;
    int64_t count_;
    std::vector<float> floats_;
    std::vector<uint16_t> halves_;
};

class Random {
  public:
    explicit Random(uint32_t seed) : engine_(seed) {}

    /// In [low, high].
    int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
    bool coin() { return integer(0, 1) == 1; }
    Dtype dtype() { return coin() ? Dtype::float32 : Dtype::bfloat16; }

    std::vector<float> values(int64_t count, float size = 1.0f) {
        std::normal_distribution<float> normal(0.0f, size);
        std::vector<float> x(count);
        for (float& v : x)
            v = normal(engine_);
        return x;
    }
    Numbers numbers(int64_t count, float size = 1.0f, Dtype dtype = Dtype::float32) {
        return {dtype, values(count, size)};
    }
    std::vector<int32_t> integers(int64_t count, int64_t low, int64_t high) {
        std::vector<int32_t> x(count);
        for (int32_t& v : x)
            v = static_cast<int32_t>(integer(low, high));
        return x;
    }

  private:
    std::mt19937 engine_;
};

/// Rows [0, rows) in two calls, as two threads would do them.
template <class Args>
void run_in_two(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, Random& random) {
    const int64_t middle = random.integer(0, rows);
    kernel(args, middle, rows);
    kernel(args, 0, middle);
}

/// Calls f(kernels) for every instruction set that this CPU can run, or for the emulated one that the test was made
/// for; its name is the last one printed if that fails.
template <class F>
void for_every_isa(F f) {
#ifdef BATCHINFER_EMULATED
    f(BATCHINFER_EMULATED::table);
#else
    for (const std::string& isa : usable_isas()) {
        std::fprintf(stderr, "%s\n", isa.c_str());
        f(choose_kernels(isa));
    }
#endif
}

}  // namespace batchinfer::test
