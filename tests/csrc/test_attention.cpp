// Paged attention on every instruction set, against float64.
#include "cpu/attention.h"
#include "kernel_test.h"

using namespace batchinfer;
using namespace batchinfer::test;

namespace {

struct Sequence {
    int64_t tokens, length;  // in this step, and with what was there before
};

struct Shape {
    int64_t kv_heads, group, width, page_size, window;
    float softcap;
    int64_t heads() const { return kv_heads * group; }
};

// Keys or values of a cache. In int8 a row is its codes, then their scale.
class Cache {
  public:
    Cache(Dtype dtype, int64_t rows, int64_t width, Random& random) : dtype_(dtype), numbers_(Dtype::float32, 0) {
        if (dtype != Dtype::int8) {
            numbers_ = random.numbers(rows * width, 1, dtype);
            return;
        }
        std::vector<float> values;
        for (int64_t row = 0; row < rows; ++row) {
            const float scale = std::fabs(random.values(1, 0x1p-6f)[0]);
            for (const int32_t code : random.integers(width, -127, 127)) {
                codes_.push_back(static_cast<int8_t>(code));
                values.push_back(static_cast<float>(code) * scale);
            }
            const auto* bytes = reinterpret_cast<const int8_t*>(&scale);
            codes_.insert(codes_.end(), bytes, bytes + sizeof(scale));
        }
        numbers_ = {Dtype::float32, values};
    }

    void* data() { return dtype_ == Dtype::int8 ? codes_.data() : numbers_.data(); }
    float operator[](int64_t i) const { return numbers_[i]; }

  private:
    Dtype dtype_;
    Numbers numbers_;
    std::vector<int8_t> codes_;
};

class Problem {
  public:
    Problem(const Shape& shape, const std::vector<Sequence>& sequences, int64_t shared_pages, Dtype dtype,
            Random& random)
        : shape_(shape),
          dtype_(dtype),
          q_(Dtype::float32, 0),
          k_(Dtype::float32, 0, 0, random),
          v_(Dtype::float32, 0, 0, random) {
        int64_t longest = 0;
        for (const Sequence& s : sequences) {
            start_.push_back(start_.back() + static_cast<int32_t>(s.tokens));
            length_.push_back(static_cast<int32_t>(s.length));
            slot_.push_back(static_cast<int32_t>(slot_.size()));
            longest = std::max(longest, s.length);
        }
        // Page j of sequence s, the first ones being the same for all.
        slot_pages_ = (longest + shape.page_size - 1) / shape.page_size;
        for (size_t s = 0; s < sequences.size(); ++s) {
            for (int64_t j = 0; j < slot_pages_; ++j)
                table_.push_back(static_cast<int32_t>(j < shared_pages ? j : j + s * slot_pages_));
        }
        pages_ = slot_pages_ * static_cast<int64_t>(sequences.size());
        const int64_t rows = pages_ * shape.kv_heads * shape.page_size;
        q_ = random.numbers(start_.back() * shape.heads() * shape.width);
        k_ = Cache(dtype, rows, shape.width, random);
        v_ = Cache(dtype, rows, shape.width, random);
    }

    void check(const KernelTable& kernels, int threads) {
        const int64_t rows = start_.back() * shape_.heads();
        ThreadPool pool(threads);
        Numbers out(Dtype::float32, rows * shape_.width), lse(Dtype::float32, rows);
        const AttentionPlanArgs plan_args = {start_.data(),
                                             length_.data(),
                                             slot_.data(),
                                             table_.data(),
                                             static_cast<int64_t>(slot_.size()),
                                             static_cast<int64_t>(slot_.size()),
                                             slot_pages_,
                                             shape_.heads(),
                                             shape_.kv_heads,
                                             shape_.width,
                                             pages_,
                                             shape_.page_size,
                                             shape_.window};
        AttentionPlan plan(plan_args, *kernels.attention, threads);
        const AttentionArgs args = {q_.floats(),      k_.data(),     v_.data(),      dtype_,          out.data(),
                                    out.dtype(),      lse.floats(),  shape_.heads(), shape_.kv_heads, shape_.width,
                                    shape_.page_size, shape_.window, scale(),        shape_.softcap};
        plan.run(args, *kernels.attention, pool);
        CHECK(out.whole() && lse.whole());
        const bool rounds = dtype_ != Dtype::float32 && kernels.bf16_dot;
        for (size_t s = 0; s < slot_.size(); ++s) {
            for (int64_t t = start_[s]; t < start_[s + 1]; ++t) {
                for (int64_t h = 0; h < shape_.heads(); ++h)
                    check_row(s, t, h, out, lse[t * shape_.heads() + h], rounds);
            }
        }
    }

  private:
    float scale() const { return 2 / std::sqrt(static_cast<float>(shape_.width)); }

    // Where head `head` of position p of sequence s begins in a cache.
    int64_t place(size_t s, int64_t head, int64_t p) const {
        const int64_t page = table_[s * slot_pages_ + p / shape_.page_size];
        return ((page * shape_.kv_heads + head) * shape_.page_size + p % shape_.page_size) * shape_.width;
    }

    // `rounds`: queries are bfloat16, and each probability is off by half a unit of its 8 bits.
    void check_row(size_t s, int64_t token, int64_t head, const Numbers& out, float lse, bool rounds) const {
        const int64_t width = shape_.width, position = length_[s] - (start_[s + 1] - token);
        const int64_t first = window_start(position, shape_.window), row = (token * shape_.heads() + head) * width;
        std::vector<double> score;
        for (int64_t p = first; p <= position; ++p) {
            double sum = 0;
            for (int64_t e = 0; e < width; ++e) {
                const float q = rounds ? rounded(q_[row + e]) : q_[row + e];
                sum += double{q} * k_[place(s, head / shape_.group, p) + e];
            }
            sum *= scale();
            score.push_back(shape_.softcap > 0 ? shape_.softcap * std::tanh(sum / shape_.softcap) : sum);
        }
        const double highest = *std::max_element(score.begin(), score.end());
        double mass = 0;
        for (double& x : score)
            mass += x = std::exp(x - highest);
        CHECK(std::fabs(lse - (highest + std::log(mass))) < 2e-5 + std::fabs(highest) * 1e-6);
        for (int64_t e = 0; e < width; ++e) {
            double want = 0, size = 0;
            for (int64_t p = first; p <= position; ++p) {
                const double term = score[p - first] / mass * v_[place(s, head / shape_.group, p) + e];
                want += term;
                size += std::fabs(term);
            }
            CHECK(std::fabs(out[row + e] - want) <= 2e-5 + (rounds ? size * 0x1p-8 : 0));
        }
    }

    Shape shape_;
    Dtype dtype_;
    std::vector<int32_t> start_ = {0}, length_, slot_, table_;
    int64_t slot_pages_ = 0, pages_ = 0;
    Numbers q_;
    Cache k_, v_;
};

void random_step(const KernelTable& kernels, Dtype dtype, Random& random) {
    const Shape shape = {random.integer(1, 3),
                         random.integer(1, 4),
                         dtype == Dtype::int8 ? 8 * random.integer(1, 12) : 2 * random.integer(1, 50),
                         random.coin() ? 16 : 5,
                         random.coin() ? 0 : random.integer(1, 90),
                         random.coin() ? 0.0f : 5.0f};
    const int64_t shared = random.integer(0, 4);
    std::vector<Sequence> sequences(random.integer(1, 4));
    for (Sequence& s : sequences) {
        s.length = random.integer(1, 150);
        s.tokens = random.coin() ? 1 : random.integer(1, std::min<int64_t>(s.length, 20));
    }
    Problem(shape, sequences, shared, dtype, random).check(kernels, static_cast<int>(random.integer(1, 3)));
}

}  // namespace

int main() {
    for_every_isa([](const KernelTable& kernels) {
        Random random(4);
        for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
            for (int i = 0; i < 12; ++i)
                random_step(kernels, dtype, random);
            // Splits of 1,024 positions, done apart by two threads and merged.
            Problem({1, 2, 16, 16, 0, 0.0f}, {{1, 2500}}, 0, dtype, random).check(kernels, 2);
        }
    });
}
