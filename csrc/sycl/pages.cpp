// Launch of copy_pages.
#include "sycl/pages.h"

#include "sycl/launch.h"

namespace batchinfer::gpu {

void copy_pages(const CopyPagesArgs& a, Stream stream) {
    if (a.copies == 0) return;
    const int64_t words = a.page_bytes / sizeof(CopyPages::Word);
    launch<CopyPages>(stream, 2 * a.copies, ceil_div(words, CopyPages::kThreads), a);
}

}  // namespace batchinfer::gpu
