#include <stdexcept>
#include <vector>

#include "check.h"
#include "engine/page_pool.h"

using namespace batchinfer;

namespace {

using Tokens = std::vector<int32_t>;

void check(const PagePool& pool, const std::vector<int32_t>& holders, int32_t used, int32_t cached, int32_t free) {
    pool.check(holders);
    CHECK(pool.num_used() == used && pool.num_cached() == cached && pool.num_free() == free);
}

void pages_go_round() {
    PagePool pool(3, 2, 64);
    check(pool, {0, 0, 0}, 0, 0, 3);
    CHECK(pool.take() == 0 && pool.take() == 1 && pool.take() == 2);
    CHECK(pool.take() == kNoPage);
    check(pool, {1, 1, 1}, 3, 0, 0);
    CHECK(pool.drop(1));
    check(pool, {1, 0, 1}, 2, 0, 1);
    CHECK(pool.take() == 1);
}

void a_published_page_stays_until_it_is_needed() {
    PagePool pool(2, 2, 64);
    const Tokens tokens{5, 6};
    const PageId first = pool.take();
    CHECK(pool.publish(PrefixTree::kRoot, tokens, first) == first);
    pool.hold(first);
    CHECK(!pool.drop(first));
    CHECK(pool.drop(first));
    check(pool, {0, 0}, 0, 1, 1);
    CHECK(pool.find(PrefixTree::kRoot, tokens) == first);
    pool.hold(first);
    check(pool, {1, 0}, 1, 0, 1);

    const PageId second = pool.take();
    CHECK(pool.publish(PrefixTree::kRoot, tokens, second) == first);  // a twin is not published
    CHECK(pool.take() == kNoPage);
    CHECK(pool.drop(second) && pool.drop(first));
    check(pool, {0, 0}, 0, 1, 1);
    CHECK(pool.take() == second);  // the free one first
    CHECK(pool.take() == first);   // then the cached one
    CHECK(pool.find(PrefixTree::kRoot, tokens) == kNoPage);
    check(pool, {1, 1}, 2, 0, 0);
}

void cached_pages_can_be_cleared() {
    PagePool pool(4, 2, 64);
    const Tokens one{1, 2}, two{3, 4}, held{5, 6};
    const PageId a = pool.take(), b = pool.take(), c = pool.take();
    CHECK(pool.publish(PrefixTree::kRoot, one, a) == a && pool.publish(a, two, b) == b);
    CHECK(pool.publish(PrefixTree::kRoot, held, c) == c);
    CHECK(pool.drop(b) && pool.drop(a));
    check(pool, {0, 0, 1, 0}, 1, 2, 1);
    pool.clear_cached();
    check(pool, {0, 0, 1, 0}, 1, 0, 3);
    CHECK(pool.find(PrefixTree::kRoot, one) == kNoPage && pool.find(PrefixTree::kRoot, held) == c);
    CHECK(pool.take() == a);  // its memory is there, unlike that of the page which was never taken
}

void check_notices_a_wrong_count() {
    PagePool pool(2, 2, 64);
    pool.take();
    CHECK_THROWS(pool.check(std::vector<int32_t>{2, 0}), std::runtime_error);
    CHECK_THROWS(pool.check(std::vector<int32_t>{1, 1}), std::runtime_error);
}

}  // namespace

int main() {
    pages_go_round();
    a_published_page_stays_until_it_is_needed();
    cached_pages_can_be_cleared();
    check_notices_a_wrong_count();
}
