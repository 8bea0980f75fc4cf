// Row-wise kernels: table lookup, RMSNorm with residual, SiLU or GELU times up. Neighbours take neighbouring elements.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

// One element a work-item.
template <class T>
struct Lookup {
    using Args = LookupArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 256;

    static void run(const Item& item, Local&, const Args& a) {
        const int64_t row = item.get_group(0), column = item.get_global_id(1);
        if (column >= a.width) return;
        const int64_t from = clamp_index(a.ids[row], a.table_rows);
        const T value = static_cast<const T*>(a.table)[from * a.width + column];
        static_cast<T*>(a.out)[row * a.width + column] = from_float<T>(to_float(value) * a.scale);
    }
};

// One group a row. The second pass finds the row in the caches.
template <class T>
struct RmsNorm {
    using Args = RmsNormArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 256;

    static void run(const Item& item, Local&, const Args& a) {
        const int64_t row = item.get_group(0) * a.width;
        const T* x = static_cast<const T*>(a.x) + row;
        T* residual = a.residual ? static_cast<T*>(a.residual) + row : nullptr;
        T* out = static_cast<T*>(a.out) + row;
        float sum = 0;
        for (int64_t i = thread_of(item); i < a.width; i += kThreads) {
            float value = to_float(x[i]);
            if (residual) {  // rounded as it is stored, so that the norm sees what the next layer sees
                residual[i] = from_float<T>(value + to_float(residual[i]));
                value = to_float(residual[i]);
            }
            sum += value * value;
        }
        sum = sycl::reduce_over_group(item.get_group(), sum, sycl::plus<float>());
        const float inverse = sycl::rsqrt(sum / a.width + a.eps);
        for (int64_t i = thread_of(item); i < a.width; i += kThreads) {
            out[i] = from_float<T>(to_float(residual ? residual[i] : x[i]) * inverse * a.weight[i]);
        }
    }
};

struct Silu {
    static float of(float x) { return x / (1 + sycl::exp(-x)); }
};

// Its tanh form: x / 2 (1 + tanh u) = x / (1 + e**-2u).
struct Gelu {
    static float of(float x) { return x / (1 + sycl::exp(-1.5957691216f * (x + 0.044715f * x * x * x))); }
};

// One element a work-item.
template <class T, class Activation>
struct Gate {
    using Args = GateArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 256;

    static void run(const Item& item, Local&, const Args& a) {
        const int64_t row = item.get_group(0), column = item.get_global_id(1);
        if (column >= a.width) return;
        const T* gate_up = static_cast<const T*>(a.gate_up) + 2 * row * a.width + column;
        static_cast<T*>(a.out)[row * a.width + column] =
            from_float<T>(Activation::of(to_float(gate_up[0])) * to_float(gate_up[a.width]));
    }
};

}  // namespace batchinfer::gpu
