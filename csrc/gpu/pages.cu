// copy_pages: whole pages of both caches, 16 bytes a thread. Which ones is read from device memory, and an index
// outside the cache drops its copy, so that a list may be filled up with -1.
#include "gpu/device.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) copy_pages_kernel(CopyPagesArgs a) {
    const int64_t words = a.page_bytes / sizeof(uint4), i = int64_t{blockIdx.y} * kThreads + threadIdx.x;
    const int64_t from = a.source[blockIdx.x], to = a.target[blockIdx.x];
    if (i >= words || from < 0 || from >= a.pages || to < 0 || to >= a.pages) return;
    uint4* cache = static_cast<uint4*>(blockIdx.z ? a.v_cache : a.k_cache);
    cache[to * words + i] = cache[from * words + i];
}

}  // namespace

void copy_pages(const CopyPagesArgs& a, Stream stream) {
    if (a.copies == 0) return;
    const int64_t pieces = ceil_div(a.page_bytes / sizeof(uint4), kThreads);
    gpuLaunch(copy_pages_kernel, dim3(a.copies, pieces, 2), kThreads, 0, native(stream), a);
    check_launch("copy_pages");
}

}  // namespace batchinfer::gpu
