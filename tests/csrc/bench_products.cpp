// Which blocking of a matrix product is fastest, by shape: one JSON line for each format, shape and number of rows.
//   {"isa": ..., "format": ..., "shape": [outputs, depth], "rows": ..., "gflops": {"104x256x4": ..., ...}, "best": ...,
//    "gain": ...}
// A candidate is named rows x KiB x tasks of its Blocking (csrc/cpu/gemm.h). gflops: by the median of interleaved runs
// on two threads, with weights of 192 MiB taken in turn, as a model's layers come from memory; gain: of the best one
// over what multiply() takes by itself. Arguments, all of which may be left out: threads (0: all), an instruction set
// ("": the best one), a format.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/isa.h"

using namespace batchinfer;

namespace {

struct Format {
    const char* name;
    WeightFormat format;
    int64_t bytes, block;  // of a value before it is packed; values with one scale, 0: none or one a row
};
constexpr Format kFormats[] = {{"float32", WeightFormat::float32, 4, 0},
                               {"bfloat16", WeightFormat::bfloat16, 2, 0},
                               {"int8", WeightFormat::int8, 1, 0},
                               {"blocks8", WeightFormat::blocks8, 1, 32},
                               {"blocks4", WeightFormat::blocks4, 1, 32}};

// Of SmolLM2-135M (qkv, output, gate and up, down, LM head), and of a layer of Llama-3.2-1B.
struct Shape {
    int64_t outputs, depth;
    bool gated;
};
constexpr Shape kShapes[] = {{960, 576, false},   {576, 576, false},   {3072, 576, true},  {576, 1536, false},
                             {49152, 576, false}, {16384, 2048, true}, {2048, 8192, false}};
constexpr int64_t kRows[] = {1, 4, 16, 64, 192, 1024};

constexpr Blocking kCandidates[] = {{104, 64 << 10, 4},  {104, 128 << 10, 4}, {104, 256 << 10, 4}, {104, 512 << 10, 4},
                                    {52, 128 << 10, 4},  {416, 256 << 10, 4}, {208, 128 << 10, 4}, {208, 256 << 10, 4},
                                    {104, 128 << 10, 1}, {104, 128 << 10, 8}};

// Of the layers that are multiplied in turn: beyond any L3, so that weights come from memory as they do in a model.
constexpr size_t kWeightBytes = 192 << 20;

// Multiplications of a product; the LM head never has more rows than a step has sequences.
constexpr int64_t kLargest = 20'000'000'000;

std::string name_of(const Blocking& b) {
    return std::to_string(b.rows) + "x" + std::to_string(b.weight_bytes >> 10) + "x" +
           std::to_string(b.tasks_per_thread);
}

double median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
}

class Layers {
  public:
    Layers(const GemmKernel& kernel, const Format& format, const Shape& shape, ThreadPool& pool) : pool_(pool) {
        const int64_t values = shape.outputs * shape.depth;
        // Small whole numbers, or codes; scales of one, as float or float16.
        std::vector<uint8_t> weight(values * format.bytes, format.block || format.bytes == 1 ? 3 : 0);
        std::vector<float> scales(shape.outputs, 1.0f);
        std::vector<uint16_t> halves(format.block ? values / format.block : 0, 0x3c00);
        const void* scale = format.block ? static_cast<const void*>(halves.data()) : scales.data();
        size_t bytes = 0;
        do {
            layers_.emplace_back(kernel, shape.outputs, shape.depth, shape.gated);
            layers_.back().pack({weight.data(), scale, halves.data()}, pool);
            bytes += layers_.back().bytes();
        } while (bytes < kWeightBytes);
    }

    // Seconds of one product.
    double run(const std::vector<float>& x, int64_t rows, std::vector<float>& out, const Blocking& blocking) {
        const PackedWeight& weight = layers_[next_++ % layers_.size()];
        const auto start = std::chrono::steady_clock::now();
        weight.multiply(Dtype::float32, x.data(), rows, nullptr, Dtype::float32, out.data(), pool_, blocking);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

  private:
    ThreadPool& pool_;
    std::vector<PackedWeight> layers_;
    size_t next_ = 0;
};

void measure(const KernelTable& kernels, const Format& format, const Shape& shape, ThreadPool& pool) {
    Layers layers(*kernels.gemm[static_cast<int>(format.format)], format, shape, pool);
    for (const int64_t rows : kRows) {
        if (rows * shape.outputs * shape.depth > kLargest) break;
        const std::vector<float> x(rows * shape.depth, 1.0f);
        std::vector<float> out(rows * shape.outputs);
        const double flop = 2.0 * static_cast<double>(rows * shape.outputs * shape.depth);
        const int repeats = static_cast<int>(std::clamp(2e9 / flop, 7.0, 51.0));
        std::vector<double> seconds[std::size(kCandidates)];
        for (int i = 0; i < repeats; ++i) {
            for (size_t c = 0; c < std::size(kCandidates); ++c)
                seconds[c].push_back(layers.run(x, rows, out, kCandidates[c]));
        }
        std::string rates, best;
        double most = 0, own = 0;
        for (size_t c = 0; c < std::size(kCandidates); ++c) {
            const std::string name = name_of(kCandidates[c]);
            const double rate = flop / median(seconds[c]) / 1e9;
            char text[64];
            std::snprintf(text, sizeof(text), "%s\"%s\": %.1f", c ? ", " : "", name.c_str(), rate);
            rates += text;
            if (name == name_of(Blocking::of(rows, shape.outputs))) own = rate;
            if (rate > most) most = rate, best = name;
        }
        std::printf(
            "{\"isa\": \"%s\", \"format\": \"%s\", \"shape\": [%lld, %lld], \"rows\": %lld, \"gflops\": {%s}, "
            "\"best\": \"%s\", \"gain\": %.3f}\n",
            kernels.isa, format.name, static_cast<long long>(shape.outputs), static_cast<long long>(shape.depth),
            static_cast<long long>(rows), rates.c_str(), best.c_str(), most / own);
        std::fflush(stdout);
    }
}

// On a busy machine it took half a second until the threads had a core each.
void wait_for_cores(ThreadPool& pool) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    pool.run([&](int, int) {
        while (std::chrono::steady_clock::now() < until) {
        }
    });
}

}  // namespace

int main(int argc, char** argv) {
    ThreadPool pool(argc > 1 ? std::atoi(argv[1]) : 0);
    const KernelTable& kernels = choose_kernels(argc > 2 ? argv[2] : "");
    const std::string wanted = argc > 3 ? argv[3] : "";
    wait_for_cores(pool);
    for (const Format& format : kFormats) {
        if (!wanted.empty() && format.name != wanted) continue;
        for (const Shape& shape : kShapes)
            measure(kernels, format, shape, pool);
    }
}
