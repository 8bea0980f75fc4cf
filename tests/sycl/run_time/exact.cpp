// What test_exact.py calls.
#include "exact.h"

#include "sycl/launch.h"

using namespace batchinfer::gpu;

extern "C" [[gnu::visibility("default")]] void sycl_divide(const float* a, const float* b, float* out, int64_t count) {
    launch<Divide>(nullptr, 1, ceil_div(count, Divide::kThreads), {a, b, out, count});
}

extern "C" [[gnu::visibility("default")]] void sycl_share(const uint64_t* total, const float* share, uint64_t* out,
                                                          int64_t count) {
    launch<Share>(nullptr, 1, ceil_div(count, Share::kThreads), {total, share, out, count});
}
