#include <algorithm>

#include "engine/lookup.h"
#include "engine/scheduler.h"

// Drafts of the scheduler: what a decoding sequence computes beyond its newest token, and how that is taken back.

namespace batchinfer {

/// Fills the draft of a sequence that is about to decode, and takes the pages that it needs. It never makes another
/// sequence wait or leave: each that comes later in the step has a token and, if it may need one, a page left.
void Scheduler::draft(Sequence& sequence) {
    const auto later = static_cast<int32_t>(running_.size() - sequence.position) - 1;
    const int32_t pages_left = std::max(config_.num_pages - pool_.num_used() - later, 0);
    const int64_t room_in_pages = static_cast<int64_t>(sequence.num_pages + pages_left) * config_.page_size;
    const int64_t room = std::min<int64_t>({
        config_.lookup,
        sequence.max_new_tokens - sequence.sampled() - 1,  // the step samples one token more than the draft has
        config_.max_step_tokens - step_->num_tokens - later - 1,
        room_in_pages - sequence.computed - 1,
    });
    sequence.draft.clear();
    if (room > 0) look_up(sequence.tokens, static_cast<int32_t>(room), sequence.draft);
    const auto& stop_ids = *sequence.stop_token_ids;
    const auto stop = std::ranges::find_first_of(sequence.draft, stop_ids);  // nothing comes after it
    sequence.draft.erase(stop, sequence.draft.end());
    sequence.drafted = static_cast<int32_t>(sequence.draft.size());
    if (pages_for(sequence.computed + 1 + sequence.drafted) == sequence.num_pages) return;

    forecast_.cancel_growth(sequence.num_pages, sequence.life);
    while (sequence.num_pages < pages_for(sequence.computed + 1 + sequence.drafted)) {
        const PageId page = pool_.take();
        table_->row(sequence.slot)[sequence.num_pages] = page;
        step_->add_page_update(sequence.slot, sequence.num_pages, page);
        ++sequence.num_pages;
        sequence.last_page = page;
    }
    sequence.life = predict(sequence, 0);
    forecast_.add(pages(sequence), sequence.life);
}

/// After the tokens of a step with a draft have come: the rest of the draft was never computed, as it were.
void Scheduler::settle_draft(Sequence& sequence) {
    forecast_.cancel_growth(sequence.num_pages, sequence.life);
    sequence.drafted = 0;
    sequence.computed = sequence.known() - 1;
    dropped_.clear();
    while (sequence.num_pages > pages_for(sequence.computed)) {
        const PageId page = table_->row(sequence.slot)[--sequence.num_pages];  // not full, hence nobody else's
        pool_.drop(page);
        dropped_.push_back(page);
    }
    forecast_.release(dropped_);
    sequence.last_page = table_->row(sequence.slot)[sequence.num_pages - 1];
    sequence.life = predict(sequence, 0);  // it is further than foretold
    forecast_.add(pages(sequence), sequence.life);
}

}  // namespace batchinfer
