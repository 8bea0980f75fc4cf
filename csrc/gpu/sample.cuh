// What the sampling kernels share: a search for a threshold by histograms instead of a sort.
//
// Compilers contract a * b + c into one rounding, which the specification (sample_math.h) does not, hence exact::
// (vendor.h).
//
// Each kernel takes one block of 1,024 threads per row of logits; a row of 128 K floats does not fit on chip, so cost
// is counted in passes over it: 1 greedy, 2 sampled, and 2 to 4 more for each of top-k and top-p.
#pragma once

#include "gpu/device.cuh"

namespace batchinfer::gpu {

inline constexpr int kSampleThreads = 1024;
inline constexpr int kBins = 2 * kSampleThreads;

namespace exact {

__device__ __forceinline__ float from_bits(int bits) {
    return __int_as_float(bits);
}
__device__ __forceinline__ int bits_of(float x) {
    return __float_as_int(x);
}
__device__ __forceinline__ uint32_t mul_high(uint32_t a, uint32_t b) {
    return __umulhi(a, b);
}

}  // namespace exact
}  // namespace batchinfer::gpu

#include "gpu/sample_math.h"

namespace batchinfer::gpu {

// The most likely of the logits.
__device__ __forceinline__ uint64_t best_of(const float* logits, int vocab, uint64_t* scratch) {
    float best = -INFINITY;
    int id = threadIdx.x;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocab; i += kSampleThreads) {
        const float x = logits[i];
        if (x > best) best = x, id = i;  // false for NaN
    }
    return block_reduce(id < vocab ? ranked(best, id) : 0, scratch, larger);
}

// The most likely of the logits that rank below `limit`.
__device__ __forceinline__ uint64_t best_below(const float* logits, int vocab, uint64_t limit, uint64_t* scratch) {
    uint64_t best = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += kSampleThreads) {
        const uint64_t rank = ranked(logits[i], i);
        best = larger(best, rank < limit ? rank : 0);
    }
    return block_reduce(best, scratch, larger);
}

// Shared memory of a search. Weights have 64 bits: the low words and their carries are added apart.
struct Histogram {
    uint32_t count[kBins], low[kBins], high[kBins];
    uint64_t scratch[kWarp];
    uint64_t before, weight;  // of the bin found
    int bin;

    __device__ __forceinline__ void clear() {
        for (int b = threadIdx.x; b < kBins; b += kSampleThreads) {
            count[b] = low[b] = high[b] = 0;
        }
        __syncthreads();
    }
    __device__ __forceinline__ void add_one(int b) { atomicAdd(&count[b], 1u); }
    __device__ __forceinline__ void add_mass(int b, uint64_t mass) {
        const uint32_t part = static_cast<uint32_t>(mass);
        const uint32_t carry = static_cast<uint32_t>(mass >> 32) + (atomicAdd(&low[b], part) + part < part);
        if (carry) atomicAdd(&high[b], carry);
    }
    template <bool kMass>
    __device__ __forceinline__ uint64_t weight_of(int b) const {
        return kMass ? uint64_t{high[b]} << 32 | low[b] : count[b];
    }

    // Weight of all bins.
    template <bool kMass>
    __device__ __forceinline__ uint64_t total() {
        __syncthreads();
        const uint64_t mine = weight_of<kMass>(2 * threadIdx.x) + weight_of<kMass>(2 * threadIdx.x + 1);
        return block_reduce(mine, scratch, [](uint64_t a, uint64_t b) { return a + b; });
    }

    // Sets bin, before and weight to the bin where the running sum, which starts at `base`, reaches `target`.
    template <bool kMass>
    __device__ __forceinline__ void find(uint64_t base, double target) {
        __syncthreads();
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        const uint64_t first = weight_of<kMass>(2 * threadIdx.x), second = weight_of<kMass>(2 * threadIdx.x + 1);
        uint64_t sum = first + second;  // becomes the sum up to this thread
        for (int reach = 1; reach < kWarp; reach *= 2) {
            const uint64_t other = shuffle_up(sum, reach);
            if (lane >= reach) sum += other;
        }
        if (lane == kWarp - 1) scratch[warp] = sum;
        __syncthreads();
        uint64_t until = base + sum - first - second;
        for (int w = 0; w < warp; ++w) {
            until += scratch[w];
        }
        const auto reaches = [&](int b, uint64_t from, uint64_t add) {
            if (static_cast<double>(from) < target && target <= static_cast<double>(from + add)) {
                bin = b, before = from, weight = add;
            }
        };
        reaches(2 * threadIdx.x, until, first);
        reaches(2 * threadIdx.x + 1, until + first, second);
        __syncthreads();
    }
};

// Bin of a distance below the highest logit: 64 bins a unit, the last takes the rest.
__device__ __forceinline__ int linear_bin(float distance) {
    return static_cast<int>(fminf(distance * 64.f, kBins - 1));
}

}  // namespace batchinfer::gpu
