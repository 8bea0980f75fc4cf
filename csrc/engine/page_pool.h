#pragma once

#include <cstdint>
#include <span>

#include "engine/page_allocator.h"
#include "engine/prefix_tree.h"

namespace batchinfer {

/// The KV pages and what they hold: the allocator and the prefix tree, kept consistent with each other.
///
/// used (held by a sequence) + cached (idle in the tree, evicted when needed) + free = all pages.
class PagePool {
  public:
    PagePool(int32_t num_pages, int32_t page_size, int32_t hash_bits);

    /// A page for new tokens, held once: a free one, else the longest idle cached one; kNoPage if all are held.
    PageId take();
    /// One more holder of a page of the tree.
    void hold(PageId page);
    /// One holder less; true if nobody holds the page any longer. A page of the tree then stays cached.
    bool drop(PageId page);

    /// Frees all cached pages.
    void clear_cached();

    /// See PrefixTree::find.
    PageId find(PageId parent, std::span<const int32_t> tokens) const { return tree_.find(parent, tokens); }
    /// Makes `page` findable: see PrefixTree::insert.
    PageId publish(PageId parent, std::span<const int32_t> tokens, PageId page) {
        return tree_.insert(parent, tokens, page);
    }

    int32_t num_used() const { return allocator_.num_pages() - num_free() - num_cached(); }
    int32_t num_cached() const { return tree_.num_idle(); }
    int32_t num_free() const { return allocator_.num_free(); }
    int32_t refs(PageId page) const { return allocator_.refs(page); }
    const PrefixTree& tree() const { return tree_; }

    /// Throws std::runtime_error naming the first broken invariant. `holders`: how many sequences hold each page.
    void check(std::span<const int32_t> holders) const;

  private:
    PageAllocator allocator_;
    PrefixTree tree_;
};

}  // namespace batchinfer
