#include "engine/admission.h"

#include <algorithm>
#include <bit>

namespace batchinfer {

PageForecast::PageForecast(int32_t num_pages, int32_t page_size, int64_t horizon)
    : page_size_(page_size),
      mask_(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(horizon, 1)))) - 1),
      use_(mask_ + 1, 0),
      counted_until_(num_pages, -1) {}

void PageForecast::advance() {
    use_[now_ & mask_] = 0;  // becomes the farthest step
    ++now_;
}

int64_t PageForecast::needed_from(int32_t index, const Lifetime& life) const {
    if (index < life.min_pages) return now_;
    return std::max(now_, life.origin + static_cast<int64_t>(index) * page_size_ + 1);
}

bool PageForecast::fits(std::span<const PageId> held, const Lifetime& life, int32_t limit) {
    rises_.clear();
    collect_held(held, life.last);
    collect_growth(static_cast<int32_t>(held.size()), life);
    sort_rises();
    int32_t pages = 0;
    for (size_t i = 0; i < rises_.size(); ++i) {
        pages += rises_[i].pages;
        const int64_t end = i + 1 < rises_.size() ? std::min(rises_[i + 1].step, life.last + 1) : life.last + 1;
        for (int64_t step = rises_[i].step; step < end; ++step) {
            if (use(step) + pages > limit) return false;
        }
    }
    return true;
}

void PageForecast::add(std::span<const PageId> held, const Lifetime& life) {
    rises_.clear();
    collect_held(held, life.last);
    collect_growth(static_cast<int32_t>(held.size()), life);
    apply(life.last, +1);
    for (const PageId page : held)
        counted_until_[page] = std::max(counted_until_[page], life.last);
}

void PageForecast::hold(PageId page, const Lifetime& life) {
    add_range(std::max(now_, counted_until_[page] + 1), life.last, 1);
    counted_until_[page] = std::max(counted_until_[page], life.last);
}

void PageForecast::cancel_growth(int32_t num_held, const Lifetime& life) {
    rises_.clear();
    collect_growth(num_held, life);
    apply(life.last, -1);
}

void PageForecast::release(std::span<const PageId> pages) {
    int64_t until = -1;  // neighbours mostly share it: one pass over the steps for all of them
    int32_t count = 0;
    for (const PageId page : pages) {
        if (counted_until_[page] != until) {
            add_range(now_, until, -count);
            until = counted_until_[page];
            count = 0;
        }
        ++count;
        counted_until_[page] = -1;
    }
    add_range(now_, until, -count);
}

void PageForecast::collect_held(std::span<const PageId> held, int64_t last) {
    for (const PageId page : held) {
        if (counted_until_[page] < last) collect(std::max(now_, counted_until_[page] + 1), 1);
    }
}

void PageForecast::collect_growth(int32_t num_held, const Lifetime& life) {
    for (int32_t index = num_held; index < life.max_pages; ++index)
        collect(needed_from(index, life), 1);
}

void PageForecast::collect(int64_t step, int32_t pages) {
    if (!rises_.empty() && rises_.back().step == step) {
        rises_.back().pages += pages;
    } else {
        rises_.push_back({step, pages});
    }
}

void PageForecast::sort_rises() {
    if (!std::ranges::is_sorted(rises_, {}, &Rise::step)) std::ranges::sort(rises_, {}, &Rise::step);
}

void PageForecast::apply(int64_t last, int32_t sign) {
    sort_rises();
    int32_t pages = 0;
    for (size_t i = 0; i < rises_.size(); ++i) {
        pages += rises_[i].pages;
        const int64_t end = i + 1 < rises_.size() ? std::min(rises_[i + 1].step - 1, last) : last;
        add_range(rises_[i].step, end, sign * pages);
    }
}

void PageForecast::add_range(int64_t first, int64_t last, int32_t pages) {
    while (first <= last) {  // at most twice: the ring may wrap
        const int64_t begin = first & mask_;
        const int64_t count = std::min(last - first + 1, mask_ + 1 - begin);
        for (int32_t& use : std::span(use_).subspan(begin, count))
            use += pages;
        first += count;
    }
}

}  // namespace batchinfer
