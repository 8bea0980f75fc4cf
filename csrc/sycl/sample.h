// What the sampling kernels share: exact arithmetic, and a search for a threshold by histograms instead of a sort.
//
// The kernels are those of csrc/gpu: one group per row of logits, cost counted in passes over it. No doubles, as Arc
// has none; and no division of the device's, which OpenCL allows to be 2.5 units off: exact::div divides whole numbers.
// Compiled with -ffp-contract=off, so that mul and add are rounded one by one.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

inline constexpr int kSampleThreads = 512;
inline constexpr int kBins = 4 * kSampleThreads;

namespace exact {

inline float mul(float a, float b) {
    return a * b;
}
inline float add(float a, float b) {
    return a + b;
}
inline float sub(float a, float b) {
    return a - b;
}
inline float from_bits(int bits) {
    return sycl::bit_cast<float>(bits);
}
inline int bits_of(float x) {
    return sycl::bit_cast<int>(x);
}
inline uint32_t mul_high(uint32_t a, uint32_t b) {
    return sycl::mul_hi(a, b);
}

// x >> count, to nearest, ties to even; 0 <= count.
inline uint64_t rounded_shift(uint64_t x, int count) {
    if (count == 0 || count > 63) return count ? 0 : x;
    const uint64_t whole = x >> count, rest = x - (whole << count), half = uint64_t{1} << (count - 1);
    return whole + (rest > half || (rest == half && (whole & 1)));
}

inline float div(float a, float b) {
    const int sign = (bits_of(a) ^ bits_of(b)) & INT32_MIN;
    const uint32_t x = bits_of(a) & INT32_MAX, y = bits_of(b) & INT32_MAX;
    constexpr uint32_t kInfinity = 0x7f800000;
    if (x == 0 || y == 0 || x >= kInfinity || y >= kInfinity) return a / b;  // 0, infinity or NaN on every device
    // Mantissas of 24 bits, the exponents of their last bits.
    const auto split = [](uint32_t bits, uint64_t& mantissa) {
        const int exponent = bits >> 23, shift = exponent ? 0 : static_cast<int>(sycl::clz(bits)) - 8;
        mantissa = exponent ? (bits & 0x7fffff) | 0x800000 : uint64_t{bits} << shift;
        return exponent ? exponent - 150 : -149 - shift;
    };
    uint64_t m, n;
    const int exponent = split(x, m) - split(y, n) - 26;
    const uint64_t quotient = (m << 26) / n | ((m << 26) % n != 0);  // 26 or 27 bits, the last one for all that follow
    const int excess = (quotient >> 26 ? 27 : 26) - 24;
    const int shift = exponent + excess < -149 ? -149 - exponent : excess;  // a result below 2**-126 has fewer bits
    const uint64_t mantissa = rounded_shift(quotient, shift);
    const int biased = exponent + shift + 149;  // 0 where the mantissa's leading bit stands in the exponent's place
    if (biased > 253) return from_bits(sign | kInfinity);
    return from_bits(sign | ((biased << 23) + static_cast<int>(mantissa)));
}

// The smallest whole number that is no less than total * share, rounded to a double; 0 < share < 1, total <= 2**53.
inline uint64_t share_of(uint64_t total, float share) {
    const int bits = bits_of(share);
    const uint64_t mantissa = bits >> 23 ? (bits & 0x7fffff) | 0x800000 : bits;
    const uint64_t high = sycl::mul_hi(mantissa, total), low = mantissa * total;  // 77 bits
    // 53 of them stay. The last dropped ones only say whether there is something below the first.
    const int dropped =
        high ? 75 - static_cast<int>(sycl::clz(high)) : sycl::max(11 - static_cast<int>(sycl::clz(low)), 0);
    const int tail = sycl::max(dropped - 2, 0);
    const uint64_t shortened = tail ? high << (64 - tail) | low >> tail | ((low << (64 - tail)) != 0) : low;
    const uint64_t rounded = rounded_shift(shortened, dropped - tail);
    const int shift = 150 - (bits >> 23 ? bits >> 23 : 1) - dropped;  // of the binary point
    return shift > 62 ? rounded != 0 : (rounded + (uint64_t{1} << shift) - 1) >> shift;
}

}  // namespace exact
}  // namespace batchinfer::gpu

#include "gpu/sample_math.h"

namespace batchinfer::gpu {

using LocalCounter = sycl::atomic_ref<uint32_t, sycl::memory_order::relaxed, sycl::memory_scope::work_group,
                                      sycl::access::address_space::local_space>;

inline uint64_t best_in_group(const Item& item, uint64_t rank) {
    return sycl::reduce_over_group(item.get_group(), rank, sycl::maximum<uint64_t>());
}

// The most likely of the logits that rank below `limit`.
inline uint64_t best_below(const Item& item, const float* logits, int vocab, uint64_t limit) {
    uint64_t best = 0;
    for (int i = thread_of(item); i < vocab; i += kSampleThreads) {
        const uint64_t rank = ranked(logits[i], i);
        best = larger(best, rank < limit ? rank : 0);
    }
    return best_in_group(item, best);
}

// Shared memory of a search. Weights have 64 bits: the low words and their carries are added apart.
struct Histogram {
    uint32_t count[kBins], low[kBins], high[kBins];
    uint64_t before, weight;  // of the bin found
    int bin;

    void clear(const Item& item) {
        sycl::group_barrier(item.get_group());  // all have read the last search
        for (int b = thread_of(item); b < kBins; b += kSampleThreads) {
            count[b] = low[b] = high[b] = 0;
        }
        sycl::group_barrier(item.get_group());
    }
    void add_one(int b) { LocalCounter(count[b]).fetch_add(1u); }
    void add_mass(int b, uint64_t mass) {
        const uint32_t part = static_cast<uint32_t>(mass);
        const uint32_t carry = static_cast<uint32_t>(mass >> 32) + (LocalCounter(low[b]).fetch_add(part) + part < part);
        if (carry) LocalCounter(high[b]).fetch_add(carry);
    }
    template <bool kMass>
    uint64_t weight_of(int b) const {
        return kMass ? uint64_t{high[b]} << 32 | low[b] : count[b];
    }

    // Of this work-item's bins, which stand together.
    template <bool kMass>
    uint64_t own_weight(const Item& item) const {
        constexpr int kOwn = kBins / kSampleThreads;
        uint64_t sum = 0;
        for (int i = 0; i < kOwn; ++i) {
            sum += weight_of<kMass>(kOwn * thread_of(item) + i);
        }
        return sum;
    }
    template <bool kMass>
    uint64_t total(const Item& item) {
        sycl::group_barrier(item.get_group());
        return sycl::reduce_over_group(item.get_group(), own_weight<kMass>(item), sycl::plus<uint64_t>());
    }

    // Sets bin, before and weight to the bin where the running sum, which starts at `base`, reaches `target`.
    template <bool kMass>
    void find(const Item& item, uint64_t base, uint64_t target) {
        constexpr int kOwn = kBins / kSampleThreads;
        sycl::group_barrier(item.get_group());
        uint64_t sum =
            base + sycl::exclusive_scan_over_group(item.get_group(), own_weight<kMass>(item), sycl::plus<uint64_t>());
        for (int b = kOwn * thread_of(item); b < kOwn * (thread_of(item) + 1); ++b) {
            const uint64_t next = sum + weight_of<kMass>(b);
            if (sum < target && target <= next) bin = b, before = sum, weight = next - sum;
            sum = next;
        }
        sycl::group_barrier(item.get_group());
    }
};

// Bin of a distance below the highest logit: 64 bins a unit, the last takes the rest, NaN too.
inline int linear_bin(float distance) {
    return static_cast<int>(sycl::fmin(distance * 64.f, static_cast<float>(kBins - 1)));
}

}  // namespace batchinfer::gpu
