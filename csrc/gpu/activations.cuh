// What stands between an MLP's products. Quotients by the special function unit, two units in the last place off.
#pragma once

#include "gpu/device.cuh"

namespace batchinfer::gpu {

struct Silu {
    __device__ __forceinline__ float operator()(float x) const { return __fdividef(x, 1 + __expf(-x)); }
};

// Its tanh form: x / 2 (1 + tanh u) = x / (1 + e**-2u).
struct Gelu {
    __device__ __forceinline__ float operator()(float x) const {
        return __fdividef(x, 1 + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
    }
};

}  // namespace batchinfer::gpu
