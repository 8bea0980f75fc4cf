#include <stdexcept>
#include <vector>

#include "check.h"
#include "engine/prefix_tree.h"

using namespace batchinfer;

namespace {

constexpr int32_t kPageSize = 3;
using Tokens = std::vector<int32_t>;

/// A tree beside an allocator that says who is held; pages 0 .. num_pages - 1 are all taken.
struct Fixture {
    explicit Fixture(int32_t num_pages, int32_t hash_bits) : pages(num_pages), tree(num_pages, kPageSize, hash_bits) {
        for (int32_t i = 0; i < num_pages; ++i)
            CHECK(pages.take() == i);
    }
    void drop(PageId page) {
        if (pages.drop_ref(page)) tree.mark_idle(page);
    }
    void hold(PageId page) {
        if (pages.refs(page) == 0) tree.mark_held(page);
        pages.add_ref(page);
    }
    PageAllocator pages;
    PrefixTree tree;
};

/// With 0 bits all nodes collide; what is found must not depend on it.
void finds_by_tokens_and_parent(int32_t hash_bits) {
    Fixture f(6, hash_bits);
    const Tokens a{1, 2, 3};
    const Tokens b{1, 2, 4};
    CHECK(f.tree.find(PrefixTree::kRoot, a) == kNoPage);
    CHECK(f.tree.insert(PrefixTree::kRoot, a, 0) == 0);
    CHECK(f.tree.insert(PrefixTree::kRoot, b, 1) == 1);
    CHECK(f.tree.insert(0, a, 2) == 2);
    CHECK(f.tree.insert(1, a, 3) == 3);
    CHECK(f.tree.find(PrefixTree::kRoot, a) == 0);
    CHECK(f.tree.find(PrefixTree::kRoot, b) == 1);
    CHECK(f.tree.find(0, a) == 2);
    CHECK(f.tree.find(1, a) == 3);
    CHECK(f.tree.find(0, b) == kNoPage);
    CHECK(f.tree.insert(1, a, 4) == 3);  // there is one already: page 4 stays outside
    CHECK(!f.tree.contains(4) && f.tree.num_nodes() == 4);
    CHECK(f.tree.parent(3) == 1 && f.tree.tokens(3)[2] == 3);
    f.tree.check(f.pages);
}

void evicts_oldest_first_and_leaves_before_parents(int32_t hash_bits) {
    Fixture f(5, hash_bits);
    f.tree.insert(PrefixTree::kRoot, Tokens{1, 1, 1}, 0);
    f.tree.insert(0, Tokens{2, 2, 2}, 1);
    f.tree.insert(1, Tokens{3, 3, 3}, 2);
    f.tree.insert(PrefixTree::kRoot, Tokens{4, 4, 4}, 3);
    CHECK(f.tree.evict() == kNoPage);  // all are held
    for (const PageId page : {2, 1, 0, 3})
        f.drop(page);
    f.tree.check(f.pages);
    CHECK(f.tree.num_idle() == 4);
    f.hold(0);  // used again, with its child: now younger than page 3
    f.hold(1);
    f.drop(1);
    f.drop(0);
    f.tree.check(f.pages);
    CHECK(f.tree.evict() == 2);
    CHECK(f.tree.find(1, Tokens{3, 3, 3}) == kNoPage);
    CHECK(f.tree.evict() == 3);
    CHECK(f.tree.evict() == 1);
    f.tree.check(f.pages);
    CHECK(f.tree.evict() == 0);
    CHECK(f.tree.evict() == kNoPage && f.tree.num_nodes() == 0);
    CHECK(f.tree.insert(PrefixTree::kRoot, Tokens{1, 1, 1}, 4) == 4);
}

void check_notices_a_child_that_outlives_its_parent() {
    Fixture f(2, 64);
    f.tree.insert(PrefixTree::kRoot, Tokens{1, 1, 1}, 0);
    f.tree.insert(0, Tokens{2, 2, 2}, 1);
    f.drop(0);
    CHECK_THROWS(f.tree.check(f.pages), std::runtime_error);
}

}  // namespace

int main() {
    for (const int32_t hash_bits : {0, 1, 64}) {
        finds_by_tokens_and_parent(hash_bits);
        evicts_oldest_first_and_leaves_before_parents(hash_bits);
    }
    check_notices_a_child_that_outlives_its_parent();
}
