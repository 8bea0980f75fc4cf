#include <algorithm>

#include "engine/scheduler.h"

// Sequences of a step with the same prompt, as the samples of one request are: what one of them computes is copied to
// the pages of all. Full pages they share anyway (PrefixTree); this is about the page that each will go on in.

namespace batchinfer {

/// Takes over the last page from the sequence that computes the same prompt in this step, up to the last token, which
/// gives the logits. The page is copied as a whole: its other tokens are the same, whoever computes them. A step has no
/// more copies than there are slots. False if there was no page, and the sequence has left.
bool Scheduler::copy_twin(Sequence& sequence) {
    const int32_t end = std::min(sequence.known() - 1, sequence.compute_from);
    const int32_t first_page = sequence.num_pages, end_page = pages_for(end);
    const auto room = config_.max_slots - std::ssize(step_->copy_source);
    if (twin_ == nullptr || sequence.computed >= end) return true;
    if (first_page < twin_first_page_ || end_page - first_page > room) return true;
    if (sequence.root != twin_->root || sequence.tokens != twin_->tokens) return true;
    while (sequence.num_pages < end_page) {
        if (!take_page(sequence)) return false;
    }
    for (int32_t column = first_page; column < end_page; ++column)
        step_->add_copy(table_->row(twin_->slot)[column], table_->row(sequence.slot)[column]);
    sequence.computed = end;
    return true;
}

}  // namespace batchinfer
