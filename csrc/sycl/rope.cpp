// Launch of rope_and_cache.
#include "sycl/rope.h"

#include "sycl/launch.h"

namespace batchinfer::gpu {

void rope_and_cache(const RopeAndCacheArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    with_dtype(a.dtype, [&](auto t) {
        using Kernel = RopeAndCache<decltype(t)>;
        launch<Kernel>(stream, 1, ceil_div(a.tokens * (a.heads + 2 * a.kv_heads), Kernel::kHeads), a);
    });
}

}  // namespace batchinfer::gpu
