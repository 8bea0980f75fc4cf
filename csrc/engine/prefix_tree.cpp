#include "engine/prefix_tree.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace batchinfer {

PrefixTree::PrefixTree(int32_t num_pages, int32_t page_size, int32_t hash_bits)
    : page_size_(page_size),
      hash_mask_(hash_bits >= 64 ? ~0ull : (1ull << hash_bits) - 1),
      nodes_(num_pages),
      tokens_(static_cast<size_t>(num_pages) * page_size),
      buckets_(std::bit_ceil(static_cast<size_t>(std::max(num_pages, 1))), kNoPage) {}

std::span<const int32_t> PrefixTree::tokens(PageId page) const {
    return {tokens_.data() + static_cast<size_t>(page) * page_size_, static_cast<size_t>(page_size_)};
}

uint64_t PrefixTree::hash(PageId parent, std::span<const int32_t> tokens) const {
    // Multiply and fold, two tokens at a time; the constants are odd and have no pattern.
    uint64_t h = static_cast<uint32_t>(parent) + 0x9E3779B97F4A7C15ull;
    const auto mix = [&h](uint64_t word) {
        h = (h ^ word) * 0xBF58476D1CE4E5B9ull;
        h ^= h >> 32;
    };
    size_t i = 0;
    for (; i + 1 < tokens.size(); i += 2) {
        mix(static_cast<uint32_t>(tokens[i]) | static_cast<uint64_t>(static_cast<uint32_t>(tokens[i + 1])) << 32);
    }
    if (i < tokens.size()) mix(static_cast<uint32_t>(tokens[i]));
    mix(tokens.size());
    return h & hash_mask_;
}

PageId PrefixTree::find(PageId parent, std::span<const int32_t> tokens) const {
    return find(parent, tokens, hash(parent, tokens));
}

PageId PrefixTree::find(PageId parent, std::span<const int32_t> wanted, uint64_t h) const {
    for (PageId page = buckets_[h & (buckets_.size() - 1)]; page != kNoPage; page = nodes_[page].next_in_bucket) {
        const Node& node = nodes_[page];
        if (node.hash == h && node.parent == parent && std::ranges::equal(tokens(page), wanted)) return page;
    }
    return kNoPage;
}

PageId PrefixTree::insert(PageId parent, std::span<const int32_t> tokens, PageId page) {
    const uint64_t h = hash(parent, tokens);
    const PageId present = find(parent, tokens, h);
    if (present != kNoPage) return present;
    std::ranges::copy(tokens, tokens_.begin() + static_cast<ptrdiff_t>(page) * page_size_);
    Node& node = nodes_[page];
    node = Node{.hash = h, .parent = parent, .in_tree = true};
    PageId& first = bucket(h);
    node.next_in_bucket = first;
    first = page;
    if (!is_root(parent)) ++nodes_[parent].num_children;
    ++num_nodes_;
    return page;
}

void PrefixTree::remove(PageId page) {
    Node& node = nodes_[page];
    PageId* link = &bucket(node.hash);
    while (*link != page)
        link = &nodes_[*link].next_in_bucket;
    *link = node.next_in_bucket;
    if (!is_root(node.parent)) --nodes_[node.parent].num_children;
    node = Node{};
    --num_nodes_;
}

void PrefixTree::mark_idle(PageId page) {
    Node& node = nodes_[page];
    node.idle = true;
    node.older = newest_;
    node.newer = kNoPage;
    (newest_ == kNoPage ? oldest_ : nodes_[newest_].newer) = page;
    newest_ = page;
    ++num_idle_;
}

void PrefixTree::mark_held(PageId page) {
    Node& node = nodes_[page];
    (node.older == kNoPage ? oldest_ : nodes_[node.older].newer) = node.newer;
    (node.newer == kNoPage ? newest_ : nodes_[node.newer].older) = node.older;
    node.older = node.newer = kNoPage;
    node.idle = false;
    --num_idle_;
}

PageId PrefixTree::evict() {
    const PageId page = oldest_;
    if (page == kNoPage) return kNoPage;
    mark_held(page);
    remove(page);
    return page;
}

void PrefixTree::check(const PageAllocator& pages) const {
    const auto require = [](bool ok, PageId page, const char* what) {
        if (!ok) throw std::runtime_error("prefix tree, page " + std::to_string(page) + ": " + what);
    };
    std::vector<int32_t> children(nodes_.size(), 0);
    std::vector<bool> passed(nodes_.size(), false);
    int32_t num_nodes = 0;
    int32_t num_idle = 0;
    for (PageId page = 0; page < static_cast<PageId>(nodes_.size()); ++page) {
        const Node& node = nodes_[page];
        require(node.in_tree || !node.idle, page, "idle without being in the tree");
        if (!node.in_tree) continue;
        ++num_nodes;
        require(find(node.parent, tokens(page)) == page, page, "not found by its own tokens");
        require(node.idle == (pages.refs(page) == 0), page, "idle and reference count disagree");
        if (is_root(node.parent)) continue;
        ++children[node.parent];
        require(nodes_[node.parent].in_tree, page, "its parent is not in the tree");
        require(pages.refs(node.parent) >= pages.refs(page), page, "has more holders than its parent");
    }
    for (PageId page = oldest_; page != kNoPage; page = nodes_[page].newer) {
        const Node& node = nodes_[page];
        require(node.in_tree && node.idle, page, "in the idle list without being idle");
        require(!passed[page] && num_idle++ < num_idle_, page, "the idle list runs in a circle");
        require(is_root(node.parent) || !passed[node.parent], page, "would be evicted after its parent");
        passed[page] = true;
    }
    for (PageId page = 0; page < static_cast<PageId>(nodes_.size()); ++page) {
        require(nodes_[page].num_children == children[page], page, "wrong number of children");
        require(nodes_[page].idle == passed[page], page, "idle but not in the idle list");
    }
    require(num_nodes == num_nodes_ && num_idle == num_idle_, kNoPage, "wrong counts");
}

}  // namespace batchinfer
