// Matrix products in every weight format, on every instruction set, against float64.
#include "cpu/gemm.h"
#include "kernel_test.h"

using namespace batchinfer;
using namespace batchinfer::test;

namespace {

// A sum and the sum of its terms' sizes, to which its error is in proportion.
struct Sum {
    double value = 0, size = 0;
    void add(double term) {
        value += term;
        size += std::fabs(term);
    }
};

double from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent > 0 ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

class Weight {
  public:
    Weight(WeightFormat format, int64_t outputs, int64_t depth, Random& random)
        : format_(format),
          depth_(depth),
          values_(random.numbers(is_codes() ? 1 : outputs * depth, 1,
                                 format == WeightFormat::bfloat16 ? Dtype::bfloat16 : Dtype::float32)) {
        for (int64_t i = 0; is_codes() && i < outputs * depth; ++i)
            codes_.push_back(static_cast<uint8_t>(random.integer(0, format == WeightFormat::blocks4 ? 15 : 255)));
        for (int64_t i = 0; i < outputs; ++i)
            row_scale_.push_back(random.values(1)[0]);
        for (int64_t i = 0; block() > 0 && i < outputs * depth / block(); ++i) {
            scale_.push_back(static_cast<uint16_t>(random.integer(0, 0x3fff)));  // from subnormal to nearly 2
            minimum_.push_back(static_cast<uint16_t>(random.integer(0, 0x3fff) | random.integer(0, 1) << 15));
        }
    }

    WeightRow first_row() {
        if (!is_codes()) return {values_.data(), nullptr, nullptr};
        if (format_ == WeightFormat::int8) return {codes_.data(), row_scale_.data(), nullptr};
        return {codes_.data(), scale_.data(), minimum_.data()};
    }

    // Of row x [depth] and an output. `round`: to bfloat16 first.
    Sum dot(const Numbers& x, int64_t row, int64_t output, bool round) const {
        Sum sum;
        const int64_t group = block() > 0 ? block() : depth_;
        for (int64_t k = 0; k < depth_ && !is_codes(); ++k) {
            const float activation = x[row * depth_ + k];
            sum.add(double{values_[output * depth_ + k]} * (round ? rounded(activation) : activation));
        }
        for (int64_t k = 0; k < depth_ && is_codes(); k += group) {
            float largest = 0;
            for (int64_t i = 0; i < group; ++i)
                largest = std::max(largest, std::fabs(x[row * depth_ + k + i]));
            const float x_scale = largest / 127.0f, inverse = 1.0f / x_scale;
            double products = 0, codes = 0;  // exact
            for (int64_t i = 0; i < group; ++i) {
                const double code = std::nearbyint(x[row * depth_ + k + i] * inverse);
                products += code * codes_[output * depth_ + k + i];
                codes += code;
            }
            if (format_ == WeightFormat::int8) {
                sum.add(double{x_scale} * row_scale_[output] * (products - 128 * codes));
            } else {
                const int64_t at = (output * depth_ + k) / group;
                sum.add(x_scale * from_half(scale_[at]) * products);
                sum.add(x_scale * from_half(minimum_[at]) * codes);
            }
        }
        return sum;
    }

    double unit() const { return (is_codes() ? 2 * depth_ / 16 + 8 : depth_ + 2) * 0x1p-24; }

  private:
    bool is_codes() const { return format_ != WeightFormat::float32 && format_ != WeightFormat::bfloat16; }
    int64_t block() const {
        if (format_ == WeightFormat::short_blocks8) return 16;
        return format_ == WeightFormat::blocks8 || format_ == WeightFormat::blocks4 ? 32 : 0;
    }

    WeightFormat format_;
    int64_t depth_;
    Numbers values_;
    std::vector<uint8_t> codes_;
    std::vector<float> row_scale_;
    std::vector<uint16_t> scale_, minimum_;
};

void product(const KernelTable& kernels, WeightFormat format, int64_t rows, int64_t outputs, int64_t depth, bool gated,
             Random& random) {
    ThreadPool pool(2);
    Weight weight(format, outputs, depth, random);
    PackedWeight packed(*kernels.gemm[static_cast<int>(format)], outputs, depth, gated);
    packed.pack(weight.first_row(), pool);
    Numbers x = random.numbers(rows * depth, 1, random.dtype()), bias = random.numbers(outputs);
    const bool with_bias = random.coin();
    const int64_t width = packed.outputs();
    Numbers out(gated ? random.dtype() : Dtype::float32, rows * width);
    const auto multiply = [&](int64_t first, int64_t count, Numbers& to) {
        const size_t size = x.dtype() == Dtype::float32 ? 4 : 2;
        packed.multiply(x.dtype(), static_cast<std::byte*>(x.data()) + first * depth * size, count,
                        with_bias ? bias.floats() : nullptr, to.dtype(), to.data(), pool);
    };
    multiply(0, rows, out);
    CHECK(out.whole());

    const bool round = format == WeightFormat::bfloat16 && kernels.bf16_dot;
    for (int64_t i = 0; i < rows * width; ++i) {
        const auto sum_of = [&](int64_t output) {
            Sum sum = weight.dot(x, i / width, output, round);
            if (with_bias) sum.add(bias[output]);
            return sum;
        };
        Sum want = sum_of(i % width);
        double bound = want.size * weight.unit();
        if (gated) {
            const Sum up = sum_of(width + i % width);
            const double gate = want.value / (1 + std::exp(-want.value));
            bound = 1.1 * bound * std::fabs(up.value) + std::fabs(gate) * up.size * weight.unit();
            want.value = gate * up.value;
            bound += std::fabs(want.value) * (out.dtype() == Dtype::float32 ? 0x1p-16 : 0x1p-8) + 1e-30;
        }
        if (!(std::fabs(out[i] - want.value) <= bound))
            std::fprintf(stderr, "format %d, row %lld of %lld, output %lld of %lld, depth %lld: %g, not %g\n",
                         static_cast<int>(format), static_cast<long long>(i / width), static_cast<long long>(rows),
                         static_cast<long long>(i % width), static_cast<long long>(width),
                         static_cast<long long>(depth), out[i], want.value);
        CHECK(std::fabs(out[i] - want.value) <= bound);
    }

    // A row alone gives the same bits.
    const int64_t row = random.integer(0, rows - 1);
    Numbers alone(out.dtype(), width);
    multiply(row, 1, alone);
    for (int64_t i = 0; i < width; ++i)
        CHECK(alone[i] == out[row * width + i]);
}

// However a product is cut, its bits are the same.
void cut(const KernelTable& kernels, WeightFormat format, bool gated, Random& random) {
    ThreadPool pool(3);
    const int64_t rows = 61, outputs = 300, depth = 96;
    Weight weight(format, outputs, depth, random);
    PackedWeight packed(*kernels.gemm[static_cast<int>(format)], outputs, depth, gated);
    packed.pack(weight.first_row(), pool);
    Numbers x = random.numbers(rows * depth);
    const auto product = [&](const Blocking& blocking) {
        Numbers out(Dtype::float32, rows * packed.outputs());
        packed.multiply(x.dtype(), x.data(), rows, nullptr, out.dtype(), out.data(), pool, blocking);
        return out;
    };
    const Numbers whole = product({rows, int64_t{1} << 30, 1});
    for (const Blocking& blocking : {Blocking{1, 1, 1}, {13, 1, 4}, {20, 8192, 2}, {100, 16384, 100}}) {
        const Numbers out = product(blocking);
        CHECK(out.whole());
        for (int64_t i = 0; i < out.count(); ++i)
            CHECK(out[i] == whole[i]);
    }
}

}  // namespace

int main() {
    for_every_isa([](const KernelTable& kernels) {
        Random random(3);
        for (int f = 0; f < kWeightFormats; ++f) {
            const auto format = static_cast<WeightFormat>(f);
            const int64_t unit = f < 3 ? 1 : format == WeightFormat::short_blocks8 ? 16 : 32;
            for (const bool gated : {false, true}) {
                cut(kernels, format, gated, random);
                for (int i = 0; i < 12; ++i) {
                    const int64_t rows = random.integer(1, i % 3 == 0 ? 40 : 8), outputs = random.integer(1, 40);
                    product(kernels, format, rows, gated ? 2 * outputs : outputs, random.integer(1, 150 / unit) * unit,
                            gated, random);
                }
            }
            product(kernels, format, 130, 6, 64, false, random);             // more than one block of rows
            product(kernels, format, 3, 10, 2048 + 3 * unit, true, random);  // more than one slice of the depth
        }
    });
}
