#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/page_allocator.h"

namespace batchinfer {

/// Which page holds the K/V of which tokens: a tree with one node per full page, so that a path from the root spells
/// the tokens of a prefix. A node is named by its page, hence at most one node per page and no allocation.
///
/// A child is found by a 64-bit hash of (parent, its tokens) and then compared token by token, so a collision of
/// hashes costs time and never mixes up prefixes.
///
/// There is a root for each family of sequences: of different families no pages are alike, whatever their tokens.
///
/// Idle nodes (nobody holds their page) may be evicted, least recently dropped first. Whoever holds a page holds all
/// its ancestors and drops deeper pages first; so a node becomes idle after its descendants, and the oldest idle node
/// is always a leaf. find() costs O(page_size), everything else O(1) on average.
class PrefixTree {
  public:
    static constexpr PageId kRoot = kNoPage;
    /// The root of a family, 0 (kRoot), 1, 2 ...
    static constexpr PageId root(int32_t family) { return kRoot - family; }
    static constexpr bool is_root(PageId parent) { return parent <= kRoot; }

    /// `hash_bits` < 64 keeps only so many bits of the hash: for tests of collisions.
    PrefixTree(int32_t num_pages, int32_t page_size, int32_t hash_bits = 64);

    /// The child of `parent` (a page of the tree, or a root) that holds exactly `tokens` [page_size], or kNoPage.
    PageId find(PageId parent, std::span<const int32_t> tokens) const;
    /// `page`, held and not in the tree, becomes the child of `parent` for `tokens`, unless there is one already.
    /// Returns the child.
    PageId insert(PageId parent, std::span<const int32_t> tokens, PageId page);
    bool contains(PageId page) const { return nodes_[page].in_tree; }

    /// The last holder dropped the page: the newest of the idle nodes.
    void mark_idle(PageId page);
    /// An idle page is held again.
    void mark_held(PageId page);
    /// Takes the oldest idle node out of the tree and returns its page, or kNoPage.
    PageId evict();

    int32_t num_nodes() const { return num_nodes_; }
    int32_t num_idle() const { return num_idle_; }
    PageId parent(PageId page) const { return nodes_[page].parent; }
    std::span<const int32_t> tokens(PageId page) const;

    /// Throws std::runtime_error naming the first broken invariant; `refs` are the pages' reference counts.
    void check(const PageAllocator& pages) const;

  private:
    struct Node {
        uint64_t hash = 0;
        PageId parent = kRoot;
        PageId next_in_bucket = kNoPage;
        PageId older = kNoPage;  // neighbours in the list of idle nodes
        PageId newer = kNoPage;
        int32_t num_children = 0;
        bool in_tree = false;
        bool idle = false;
    };

    uint64_t hash(PageId parent, std::span<const int32_t> tokens) const;
    PageId find(PageId parent, std::span<const int32_t> tokens, uint64_t hash) const;
    PageId& bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
    void remove(PageId page);

    int32_t page_size_;
    uint64_t hash_mask_;
    std::vector<Node> nodes_;      // [num_pages]
    std::vector<int32_t> tokens_;  // [num_pages, page_size]
    std::vector<PageId> buckets_;  // first node of each bucket; a power of two
    PageId oldest_ = kNoPage;
    PageId newest_ = kNoPage;
    int32_t num_nodes_ = 0;
    int32_t num_idle_ = 0;
};

}  // namespace batchinfer
