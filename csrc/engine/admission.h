#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/page_allocator.h"

namespace batchinfer {

/// The predicted rest of a sequence's life, in steps. Page j (0-based) of the sequence is needed from the first step t
/// with t - origin > j * page_size (at once for j < min_pages), and kept up to and including step `last`; there are
/// never more than max_pages.
struct Lifetime {
    int64_t origin = 0;
    int64_t last = -1;
    int32_t min_pages = 0;
    int32_t max_pages = 0;
};

/// How many pages the running sequences will hold in each coming step, if each lives as predicted.
///
/// While it decodes, a sequence gains one token per step, so that both the steps at which it takes pages and the step
/// after which it returns them are known in advance and do not move. The forecast is therefore a row of numbers, one
/// per step, changed only when a sequence comes, goes or outlives its prediction: amortised over a sequence's life
/// that is one addition per step, contiguous in memory. Admission by such a curve is Tokasaurus' idea (Scaling
/// Intelligence Lab, Stanford 2025), which computes it anew as a walk over finish events.
///
/// A page that several sequences hold is counted once, up to the last step that any of its holders has been predicted
/// to reach since the page was last unheld. That is exact unless the longest holder ends early, and then too high,
/// never too low. Pure data: no clock, no device.
class PageForecast {
  public:
    /// `horizon`: how many steps ahead a Lifetime may end; rounded up to a power of two.
    PageForecast(int32_t num_pages, int32_t page_size, int64_t horizon);

    /// The step being scheduled, or the next one.
    int64_t now() const { return now_; }
    /// The farthest step that `last` may name at present.
    int64_t farthest() const { return now_ + mask_; }
    /// On to the next step.
    void advance();

    /// Would the use stay within `limit` in every step that a sequence lives through which starts with the pages
    /// `held` (some maybe held by others already, some idle) and takes new ones as `life` says?
    bool fits(std::span<const PageId> held, const Lifetime& life, int32_t limit);
    /// Counts that sequence. A held page that is counted for longer already stays so.
    void add(std::span<const PageId> held, const Lifetime& life);
    /// A page announced by `life` was taken: from now on it is counted under its own name.
    void take(PageId page, const Lifetime& life) { counted_until_[page] = life.last; }
    /// A sequence with this Lifetime holds `page` in place of one of its own.
    void hold(PageId page, const Lifetime& life);
    /// The pages after the first `num_held` that `life` announced will not be needed.
    void cancel_growth(int32_t num_held, const Lifetime& life);
    /// Nobody holds these pages any longer.
    void release(std::span<const PageId> pages);

    /// Predicted use in step `step`, now() <= step <= farthest().
    int32_t use(int64_t step) const { return use_[step & mask_]; }
    int64_t counted_until(PageId page) const { return counted_until_[page]; }
    /// First step in which page number `index` of a sequence with this Lifetime is counted.
    int64_t needed_from(int32_t index, const Lifetime& life) const;

  private:
    struct Rise {
        int64_t step;
        int32_t pages;
    };

    void collect_held(std::span<const PageId> held, int64_t last);
    void collect_growth(int32_t num_held, const Lifetime& life);
    void collect(int64_t step, int32_t pages);
    void sort_rises();
    void apply(int64_t last, int32_t sign);
    void add_range(int64_t first, int64_t last, int32_t pages);

    int32_t page_size_;
    int64_t mask_;
    int64_t now_ = 0;
    std::vector<int32_t> use_;            // ring over steps
    std::vector<int64_t> counted_until_;  // [num_pages]; -1: not held
    std::vector<Rise> rises_;             // scratch: a curve under construction
};

}  // namespace batchinfer
