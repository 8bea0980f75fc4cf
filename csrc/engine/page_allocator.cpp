#include "engine/page_allocator.h"

#include <numeric>

namespace batchinfer {

PageAllocator::PageAllocator(int32_t num_pages) : refs_(num_pages, 0), free_(num_pages) {
    std::iota(free_.rbegin(), free_.rend(), 0);  // page 0 is taken first
}

PageId PageAllocator::take() {
    if (free_.empty()) return kNoPage;
    const PageId page = free_.back();
    free_.pop_back();
    refs_[page] = 1;
    return page;
}

}  // namespace batchinfer
