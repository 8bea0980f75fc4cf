#include "engine/page_pool.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace batchinfer {

PagePool::PagePool(int32_t num_pages, int32_t page_size, int32_t hash_bits)
    : allocator_(num_pages), tree_(num_pages, page_size, hash_bits) {}

PageId PagePool::take() {
    if (allocator_.num_free() == 0) {
        const PageId evicted = tree_.evict();
        if (evicted == kNoPage) return kNoPage;
        allocator_.free(evicted);
    }
    return allocator_.take();
}

void PagePool::hold(PageId page) {
    if (allocator_.refs(page) == 0) tree_.mark_held(page);
    allocator_.add_ref(page);
}

bool PagePool::drop(PageId page) {
    if (!allocator_.drop_ref(page)) return false;
    if (tree_.contains(page)) {
        tree_.mark_idle(page);
    } else {
        allocator_.free(page);
    }
    return true;
}

void PagePool::clear_cached() {
    for (PageId page = tree_.evict(); page != kNoPage; page = tree_.evict())
        allocator_.free(page);
}

void PagePool::check(std::span<const int32_t> holders) const {
    const auto require = [](bool ok, PageId page, const char* what) {
        if (!ok) throw std::runtime_error("page " + std::to_string(page) + ": " + what);
    };
    std::vector<bool> is_free(allocator_.num_pages(), false);
    for (const PageId page : allocator_.free_pages()) {
        require(page >= 0 && page < allocator_.num_pages(), page, "no such page in the free list");
        require(!is_free[page], page, "twice in the free list");
        is_free[page] = true;
    }
    for (PageId page = 0; page < allocator_.num_pages(); ++page) {
        require(refs(page) == holders[page], page, "reference count differs from the number of holders");
        const int states = (refs(page) > 0) + (refs(page) == 0 && tree_.contains(page)) + is_free[page];
        require(states == 1, page, "not exactly one of held, cached and free");
        require(!is_free[page] || !tree_.contains(page), page, "free, but in the prefix tree");
    }
    tree_.check(allocator_);
}

}  // namespace batchinfer
