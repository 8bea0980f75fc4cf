// Launch of feed_back.
#include "sycl/feed_back.h"

#include "sycl/launch.h"

namespace batchinfer::gpu {

void feed_back(const FeedBackArgs& a, Stream stream) {
    if (a.rows == 0) return;
    launch<FeedBack>(stream, 1, ceil_div(a.rows, FeedBack::kThreads), a);
}

}  // namespace batchinfer::gpu
