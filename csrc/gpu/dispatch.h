// What launchers of every vendor share, on the host: from an element type's number to its C++ type, and which shapes of
// attention there are kernels for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "batchinfer/bf16.h"
#include "gpu/ops.h"

namespace batchinfer::gpu {

struct f16 {  // only storage, as bf16
    uint16_t bits;
};
struct e4m3 {
    uint8_t bits;
};

// Calls f with a value of the element type.
template <class F>
void with_dtype(GpuDtype dtype, F&& f) {
    switch (dtype) {
        case GpuDtype::float32:
            return f(float{});
        case GpuDtype::bfloat16:
            return f(bf16{});
        case GpuDtype::float16:
            return f(f16{});
        case GpuDtype::e4m3:
            break;
    }
    throw std::invalid_argument("unknown dtype number " + std::to_string(static_cast<int>(dtype)));
}

inline size_t size_of(GpuDtype dtype) {
    return dtype == GpuDtype::float32 ? 4 : 2;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline void check_shape(const AttentionPlan& p) {
    if (p.page_size < 16 || (p.page_size & (p.page_size - 1)) || p.heads % p.kv_heads || p.head_width % 16 ||
        p.head_width > 256) {
        throw std::invalid_argument("attention: pages of " + std::to_string(p.page_size) + " tokens, " +
                                    std::to_string(p.heads) + " heads on " + std::to_string(p.kv_heads) +
                                    " kv heads of width " + std::to_string(p.head_width) +
                                    "; wanted: pages of a power of two from 16, heads a multiple of kv heads, width a "
                                    "multiple of 16 up to 256");
    }
}

}  // namespace batchinfer::gpu
