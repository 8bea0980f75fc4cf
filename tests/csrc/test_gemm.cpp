// Matrix product with the arithmetic of the AVX512-BF16 dot product emulated, so that packing and loops of those
// kernels are tested on machines without it. tests/ops/test_linear.py tests every instruction set that the machine has.
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"

namespace batchinfer::emulated {
extern const GemmKernel gemm_float32, gemm_bfloat16;  // kernels/gemm.cpp, compiled for this test
}

using namespace batchinfer;

namespace {

float rounded(float x) {  // to bfloat16, nearest even
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

std::vector<float> random_floats(int64_t count, int seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& v : x)
        v = normal(engine);
    return x;
}

struct Problem {
    int64_t outputs, depth;
    std::vector<float> weight;      // values that bfloat16 can hold
    std::vector<uint16_t> packing;  // the same as bfloat16
    std::vector<float> bias;

    Problem(int64_t n, int64_t k) : outputs(n), depth(k), weight(random_floats(n * k, 1)), bias(random_floats(n, 2)) {
        for (float& w : weight) {
            w = rounded(w);
            packing.push_back(std::bit_cast<uint32_t>(w) >> 16);
        }
    }

    const void* data(Dtype dtype) const {
        return dtype == Dtype::float32 ? static_cast<const void*>(weight.data()) : packing.data();
    }

    std::vector<float> multiply(Dtype dtype, const float* x, int64_t rows, ThreadPool& pool) const {
        const GemmKernel& kernel = dtype == Dtype::float32 ? emulated::gemm_float32 : emulated::gemm_bfloat16;
        PackedWeight packed(kernel, outputs, depth, false);
        packed.pack({data(dtype), nullptr, nullptr}, pool);
        std::vector<float> out(rows * outputs, std::nanf(""));
        packed.multiply(Dtype::float32, x, rows, bias.data(), Dtype::float32, out.data(), pool);
        return out;
    }
};

void agrees_with_double(Dtype dtype, int64_t rows, int64_t outputs, int64_t depth) {
    ThreadPool pool(2);
    const Problem problem(outputs, depth);
    const std::vector<float> x = random_floats(rows * depth, 3);
    const std::vector<float> out = problem.multiply(dtype, x.data(), rows, pool);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < outputs; ++n) {
            double sum = problem.bias[n], magnitude = std::fabs(sum);
            for (int64_t k = 0; k < depth; ++k) {
                const float activation = x[r * depth + k];
                const double term = double(problem.weight[n * depth + k]) *
                                    (dtype == Dtype::bfloat16 ? rounded(activation) : activation);
                sum += term;
                magnitude += std::fabs(term);
            }
            CHECK(std::fabs(out[r * outputs + n] - sum) <= magnitude * (depth + 2) * 0x1p-24);
        }
    }
}

void rows_do_not_depend_on_each_other(Dtype dtype) {
    const Problem problem(70, 2500);  // more than one depth slice
    const int64_t rows = 130;
    const std::vector<float> x = random_floats(rows * problem.depth, 4);
    ThreadPool one(1), three(3);
    const std::vector<float> all = problem.multiply(dtype, x.data(), rows, three);
    for (const int64_t r : {0, 1, 5, 64, 129}) {
        const std::vector<float> alone = problem.multiply(dtype, x.data() + r * problem.depth, 1, one);
        for (int64_t n = 0; n < problem.outputs; ++n)
            CHECK(alone[n] == all[r * problem.outputs + n]);
    }
}

}  // namespace

int main() {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
        for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 14, 107, 230}) {
            agrees_with_double(dtype, rows, 37, 129);
        }
        for (const int64_t depth : {1, 2, 63, 64, 65, 2048, 2049}) {
            agrees_with_double(dtype, 9, 50, depth);
        }
        rows_do_not_depend_on_each_other(dtype);
    }
}
