// The kernels that go through rows of numbers, on every instruction set, against float64.
#include "kernel_test.h"

using namespace batchinfer;
using namespace batchinfer::test;

namespace {

constexpr double kUnit = 0x1p-23;  // of float32
constexpr double kTiny = 1e-30;

void embed(const KernelTable& kernels, Random& random) {
    const int64_t tokens = random.integer(1, 9), width = random.integer(1, 100), vocab = 11;
    const Dtype dtype = random.dtype();
    Numbers table = random.numbers(vocab * width, 1, dtype), out(Dtype::float32, tokens * width);
    const std::vector<int32_t> ids = random.integers(tokens, 0, vocab - 1);
    const EmbedArgs args = {ids.data(), table.data(), dtype, out.floats(), tokens, width, vocab, 1.7f};
    run_in_two(kernels.embed, args, tokens, random);
    out.check_near([&](int64_t i) { return table[ids[i / width] * width + i % width] * 1.7f; }, 0, 0);
}

// Both norms: of x, or of residual + x, which then stands in `residual`.
void norms(const KernelTable& kernels, Random& random) {
    const int64_t tokens = random.integer(1, 6), width = random.integer(1, 300), size = tokens * width;
    const float eps = 1e-5f;
    const bool with_residual = random.coin(), centred = random.coin(), with_bias = random.coin();
    Numbers x = random.numbers(size, 3), weight = random.numbers(width), bias = random.numbers(width);
    Numbers residual = random.numbers(size), out(random.dtype(), size);
    std::vector<double> seen(size), want(size);
    for (int64_t i = 0; i < size; ++i)
        seen[i] = with_residual ? residual[i] + x[i] : x[i];  // a float
    for (int64_t t = 0; t < tokens; ++t) {
        const double* row = seen.data() + t * width;
        double mean = 0, squares = 0;
        for (int64_t i = 0; i < width && centred; ++i)
            mean += row[i] / width;
        for (int64_t i = 0; i < width; ++i)
            squares += (row[i] - mean) * (row[i] - mean) / width;
        for (int64_t i = 0; i < width; ++i) {
            want[t * width + i] = (row[i] - mean) / std::sqrt(squares + eps) * weight[i];
            if (centred && with_bias) want[t * width + i] += bias[i];
        }
    }
    float* const added = with_residual ? residual.floats() : nullptr;
    if (centred) {
        run_in_two(kernels.layer_norm,
                   LayerNormArgs{x.floats(), weight.floats(), with_bias ? bias.floats() : nullptr, added, out.data(),
                                 out.dtype(), tokens, width, eps},
                   tokens, random);
    } else {
        run_in_two(kernels.rms_norm,
                   RmsNormArgs{x.floats(), weight.floats(), added, out.data(), out.dtype(), tokens, width, eps}, tokens,
                   random);
    }
    out.check_near([&](int64_t i) { return want[i]; }, 32 * kUnit, 2e-5);
    if (with_residual) residual.check_near([&](int64_t i) { return seen[i]; }, 0, 0);
}

void add(const KernelTable& kernels, Random& random) {
    const int64_t tokens = random.integer(1, 9), width = random.integer(1, 100);
    Numbers x = random.numbers(tokens * width), residual = random.numbers(tokens * width);
    const Numbers before = residual;
    run_in_two(kernels.add, AddArgs{x.floats(), residual.floats(), tokens, width}, tokens, random);
    residual.check_near([&](int64_t i) { return before[i] + x[i]; }, 0, 0);
}

void softcap(const KernelTable& kernels, Random& random) {
    const int64_t rows = random.integer(1, 5), width = random.integer(1, 100);
    Numbers x = random.numbers(rows * width, 60);
    const Numbers before = x;
    run_in_two(kernels.softcap, SoftcapArgs{x.floats(), rows, width, 30.0f}, rows, random);
    x.check_near([&](int64_t i) { return 30 * std::tanh(before[i] / 30.0); }, 8 * kUnit, kTiny);
}

double silu(double x) {
    return x / (1 + std::exp(-x));
}
double gelu(double x) {
    return x * std::erfc(-x * std::sqrt(0.5)) / 2;
}
double gelu_tanh(double x) {
    return x / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

// An exponential of |y| <= 87 is off by |y| units, and so is what is made of it.
constexpr double kExpError = 100 * kUnit;

void gates(const KernelTable& kernels, Random& random) {
    const int64_t tokens = random.integer(1, 5), width = random.integer(1, 100);
    Numbers x = random.numbers(tokens * 2 * width, 3), out(random.dtype(), tokens * width);
    const auto check = [&](void (*kernel)(const GateArgs&, int64_t, int64_t), double (*f)(double)) {
        run_in_two(kernel, GateArgs{x.floats(), out.data(), out.dtype(), tokens, width}, tokens, random);
        out.check_near(
            [&](int64_t i) {
                const int64_t at = i / width * 2 * width + i % width;
                return f(x[at]) * x[at + width];
            },
            kExpError, kTiny);
    };
    check(kernels.silu_mul, silu);
    check(kernels.gelu_mul, gelu_tanh);
}

void activations(const KernelTable& kernels, Random& random) {
    const int64_t tokens = random.integer(1, 5), width = random.integer(1, 100);
    Numbers x = random.numbers(tokens * width, 3), out(random.dtype(), tokens * width);
    const auto check = [&](Activation kind, double (*f)(double)) {
        run_in_two(kernels.activate, ActivateArgs{kind, x.floats(), out.data(), out.dtype(), tokens, width}, tokens,
                   random);
        out.check_near([&](int64_t i) { return f(x[i]); }, kExpError, 1e-7);
    };
    check(Activation::gelu, gelu);
    check(Activation::gelu_tanh, gelu_tanh);
    check(Activation::relu, [](double v) { return v < 0 ? 0 : v; });
}

void gather_rows(const KernelTable& kernels, Random& random) {
    const int64_t x_rows = 7, rows = random.integer(1, 9), width = random.integer(1, 100);
    const Dtype dtype = random.dtype();
    Numbers x = random.numbers(x_rows * width, 1, dtype), out(dtype, rows * width);
    const std::vector<int32_t> index = random.integers(rows, 0, x_rows - 1);
    run_in_two(kernels.gather_rows, GatherRowsArgs{x.data(), index.data(), out.data(), dtype, x_rows, rows, width},
               rows, random);
    for (int64_t i = 0; i < rows * width; ++i)
        CHECK(out[i] == x[index[i / width] * width + i % width]);
    CHECK(out.whole());
}

struct Rope {
    bool norm, norm_all, rotate;
    int64_t heads, kv_heads, width, rotary;
    float eps;
};

// `count` heads of a token at `x`, normalised and rotated; the weights of the norm begin anew with each head, or not.
std::vector<double> turned(const Rope& r, const float* x, int64_t count, const Numbers& norm, const float* cos_sin) {
    std::vector<double> y(x, x + count * r.width);
    const int64_t normed = r.norm_all ? count * r.width : r.width;
    for (int64_t start = 0; start < count * r.width && r.norm; start += normed) {
        double squares = 0;
        for (int64_t i = 0; i < normed; ++i)
            squares += y[start + i] * y[start + i] / normed;
        for (int64_t i = 0; i < normed; ++i)
            y[start + i] *= norm[i] / std::sqrt(squares + r.eps);
    }
    const int64_t half = r.rotary / 2;
    for (int64_t h = 0; h < count && r.rotate; ++h) {
        double* head = y.data() + h * r.width;
        for (int64_t i = 0; i < half; ++i) {
            const double a = head[i], b = head[half + i], cosine = cos_sin[i], sine = cos_sin[half + i];
            head[i] = a * cosine - b * sine;
            head[half + i] = b * cosine + a * sine;
        }
    }
    return y;
}

void rope_and_cache(const KernelTable& kernels, Random& random) {
    Rope r = {random.coin(), false, random.coin(), 0, random.integer(1, 3), 2 * random.integer(1, 40), 0, 1e-6f};
    r.norm_all = r.norm && random.coin();
    r.heads = r.kv_heads * random.integer(1, 3);
    r.rotary = 2 * random.integer(1, r.width / 2);
    const int64_t tokens = random.integer(1, 6), page_size = 4, pages = 3, positions = 50;
    const int64_t fused = (r.heads + 2 * r.kv_heads) * r.width;
    Numbers qkv = random.numbers(tokens * fused), cos_sin = random.numbers(positions * r.rotary);
    Numbers q_norm = random.numbers(r.heads * r.width), k_norm = random.numbers(r.kv_heads * r.width);
    Numbers q_out(Dtype::float32, tokens * r.heads * r.width);
    const Dtype cache = random.dtype();
    Numbers k(cache, pages * r.kv_heads * page_size * r.width), v = k;
    const std::vector<int32_t> position = random.integers(tokens, 0, positions - 1);
    std::vector<int64_t> place(pages * page_size);
    for (size_t i = 0; i < place.size(); ++i)
        place[i] = static_cast<int64_t>(i * 5 % place.size());  // 5 and 12 have no common divisor
    const RopeAndCacheArgs args = {qkv.floats(),
                                   position.data(),
                                   place.data(),
                                   r.rotate ? cos_sin.floats() : nullptr,
                                   r.norm ? q_norm.floats() : nullptr,
                                   r.norm ? k_norm.floats() : nullptr,
                                   k.data(),
                                   v.data(),
                                   cache,
                                   q_out.floats(),
                                   tokens,
                                   r.heads,
                                   r.kv_heads,
                                   r.width,
                                   positions,
                                   r.rotary,
                                   pages,
                                   page_size,
                                   r.eps,
                                   r.norm_all};
    run_in_two(kernels.rope_and_cache, args, tokens, random);

    std::vector<double> want_q, want_k(k.count(), NAN), want_v(v.count(), NAN);
    for (int64_t t = 0; t < tokens; ++t) {
        const float* q_in = qkv.floats() + t * fused;
        const float* k_in = q_in + r.heads * r.width;
        const float* v_in = k_in + r.kv_heads * r.width;
        const float* turn = cos_sin.floats() + position[t] * r.rotary;
        const std::vector<double> q = turned(r, q_in, r.heads, q_norm, turn);
        const std::vector<double> keys = turned(r, k_in, r.kv_heads, k_norm, turn);
        want_q.insert(want_q.end(), q.begin(), q.end());
        for (int64_t i = 0; i < r.kv_heads * r.width; ++i) {
            const int64_t page = place[t] / page_size, offset = place[t] % page_size;
            const int64_t at = ((page * r.kv_heads + i / r.width) * page_size + offset) * r.width + i % r.width;
            want_k[at] = keys[i];
            want_v[at] = v_in[i];
        }
    }
    q_out.check_near([&](int64_t i) { return want_q[i]; }, 32 * kUnit, 1e-5);
    const auto check_cache = [&](Numbers& got, const std::vector<double>& want) {
        for (int64_t i = 0; i < got.count(); ++i) {
            CHECK(std::isnan(want[i]) == std::isnan(got[i]));  // no other place is written
            const double near = std::isnan(want[i]) ? 0 : std::fabs(got[i] - want[i]);
            CHECK(near <=
                  1e-5 + (std::isnan(want[i]) ? 0 : std::fabs(want[i])) * (cache == Dtype::float32 ? 1e-5 : 0x1p-8));
        }
        CHECK(got.whole());
    };
    check_cache(k, want_k);
    check_cache(v, want_v);
}

// bfloat16 results are the nearest, ties to even; NaN and infinity stay what they are.
void rounding(const KernelTable& kernels, Random& random) {
    const float inf = std::numeric_limits<float>::infinity();
    std::vector<float> x = {0.0f, -0.0f, inf, -inf, 1 + 0x1p-8f, 1 + 0x3p-8f, 3.4028235e38f, std::nanf("")};
    for (int64_t i = 0; i < 500; ++i) {  // any bits
        const uint32_t bits = static_cast<uint32_t>(random.integer(0, 0xffffffff));
        const float value = std::bit_cast<float>(bits);
        if (std::isnormal(value)) x.push_back(std::fabs(value));
    }
    const int64_t width = static_cast<int64_t>(x.size());
    Numbers in(Dtype::float32, x), out(Dtype::bfloat16, width);
    kernels.activate({Activation::relu, in.floats(), out.data(), Dtype::bfloat16, 1, width}, 0, 1);
    for (int64_t i = 0; i < width; ++i) {
        const float want = x[i] < 0 ? 0.0f : rounded(x[i]);
        CHECK(std::isnan(x[i]) ? std::isnan(out[i]) : out[i] == want);
    }
}

}  // namespace

int main() {
    for_every_isa([](const KernelTable& kernels) {
        Random random(1);
        for (int i = 0; i < 60; ++i) {
            for (const auto test : {embed, norms, add, softcap, gates, activations, gather_rows, rope_and_cache})
                test(kernels, random);
        }
        rounding(kernels, random);
    });
}
