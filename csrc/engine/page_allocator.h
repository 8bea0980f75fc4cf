#pragma once

#include <cstdint>
#include <vector>

namespace batchinfer {

/// Index of a KV page: `page_size` consecutive tokens of one sequence, in every layer.
using PageId = int32_t;
inline constexpr PageId kNoPage = -1;

/// Reference counts and the free list of the KV pages. All operations are O(1).
///
/// A page is free, held (one or more references) or idle (no reference, not free): an idle page was just dropped by
/// its last holder, who decides whether it stays for its content (the prefix tree) or is given to free().
class PageAllocator {
  public:
    explicit PageAllocator(int32_t num_pages);

    /// A free page with one reference, or kNoPage. Last freed, first taken: its memory is the likeliest to be cached.
    PageId take();
    /// One more reference to a held or idle page.
    void add_ref(PageId page) { ++refs_[page]; }
    /// One reference less; true if that was the last one and the page is now idle.
    bool drop_ref(PageId page) { return --refs_[page] == 0; }
    /// Idle page to the free list.
    void free(PageId page) { free_.push_back(page); }

    int32_t refs(PageId page) const { return refs_[page]; }
    int32_t num_pages() const { return static_cast<int32_t>(refs_.size()); }
    int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
    const std::vector<PageId>& free_pages() const { return free_; }

  private:
    std::vector<int32_t> refs_;
    std::vector<PageId> free_;
};

}  // namespace batchinfer
