// The bfloat16 storage type: the upper half of an IEEE float. Only storage: conversions live with each backend's
// vectors.
#pragma once

#include <cstdint>

namespace batchinfer {

struct bf16 {
    uint16_t bits;
};

}  // namespace batchinfer
