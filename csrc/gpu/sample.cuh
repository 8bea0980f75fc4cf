// What the sampling kernels share: the arithmetic of the sampler's specification, bit for bit, and a search for a
// threshold by histograms instead of a sort.
//
// The specification is batchinfer/ops/reference_sampler.py: float32, every product and sum rounded by itself. Compilers
// contract a * b + c into one rounding, hence exact:: (vendor.h). Probabilities are integers in units of 2**-34, so
// that sums (in shared memory, by atomics) do not depend on an order.
//
// Each kernel takes one block of 1,024 threads per row of logits; a row of 128 K floats does not fit on chip, so cost
// is counted in passes over it: 1 greedy, 2 sampled, and 2 to 4 more for each of top-k and top-p.
#pragma once

#include "gpu/device.cuh"

namespace batchinfer::gpu {

inline constexpr int kSampleThreads = 1024;
inline constexpr int kBins = 2 * kSampleThreads;

namespace exact {

// e**x for x <= 0; 0 below -87.
__device__ __forceinline__ float exp(float x) {
    const float inside = fmaxf(x, -88.f);
    const float n = sub(add(mul(inside, 1.44269504f), 12582912.f), 12582912.f);
    const float r = add(mul(n, 2.12194440e-4f), add(mul(n, -0.693359375f), inside));
    float p = 0.00138144672f;
    p = add(mul(p, r), 0.00836878084f);
    p = add(mul(p, r), 0.0416683927f);
    p = add(mul(p, r), 0.166665196f);
    p = add(mul(p, r), 0.49999994f);
    const float y = add(add(mul(p, mul(r, r)), r), 1.f);
    return x < -87.f ? 0.f : mul(y, __int_as_float((static_cast<int>(n) + 127) << 23));
}

// Natural logarithm of a positive normal float.
__device__ __forceinline__ float log(float x) {
    const int bits = __float_as_int(x), k = (bits - 0x3F3504F3) >> 23;
    const float f = sub(__int_as_float(bits - k * (1 << 23)), 1.f);
    const float s = div(f, add(2.f, f)), z = mul(s, s);
    const float p = add(mul(add(mul(0.298851877f, z), 0.399770796f), z), 0.666667819f);
    const float n = static_cast<float>(k);
    return add(mul(n, 0.693359375f), add(add(s, s), add(mul(s, mul(z, p)), mul(n, -2.12194440e-4f))));
}

// e**x in units of 2**-34, x <= 0.
__device__ __forceinline__ uint64_t mass(float x) {
    const float grid = 4.8828125e-4f;
    return __float2ull_rz(mul(sub(add(exp(x), grid), grid), 17179869184.f));
}

// v = 1 - u of a random word, and the Gumbel noise -log(-log(u)).
__device__ __forceinline__ float uniform(uint32_t word) {
    return fminf(mul(add(__uint2float_rn(word), 0.5f), 2.3283064365386963e-10f), 1.f - 5.9604644775390625e-8f);
}
__device__ __forceinline__ float gumbel(float v) {
    const float rest = sub(1.f, v), lost = sub(sub(1.f, rest), v);
    return sub(0.f, log(sub(0.f, add(log(rest), div(lost, rest)))));
}

}  // namespace exact

// Philox4x32-10 (Salmon et al. 2011). The four words of counter (block, position, 0, 0).
__device__ __forceinline__ uint4 philox(uint32_t block, uint32_t position, uint64_t seed) {
    uint32_t c0 = block, c1 = position, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// Larger is more likely; among equals the smaller id. NaN counts as -inf.
__device__ __forceinline__ uint64_t ranked(float x, int id) {
    x = isnan(x) ? -INFINITY : x + 0.f;  // -0 equals +0
    const uint32_t bits = __float_as_uint(x);
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ int id_of(uint64_t rank) {
    return ~static_cast<uint32_t>(rank);
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

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
