#include <algorithm>

#include "engine/scheduler.h"

// Sequences of a step with the same prompt, as the samples of one request are: what one of them computes is written to
// the pages of all. Full pages they share anyway (PrefixTree); this is about the page that each will go on in.

namespace batchinfer {

/// Takes over the last page's tokens from the sequence that computes them in this step, all but the last token, which
/// gives the logits. A step has no more of these than it may have tokens, as they take memory. False if there was no
/// page, and the sequence has left.
bool Scheduler::copy_twin(Sequence& sequence) {
    const int32_t first = sequence.computed;
    const int32_t end = std::min(sequence.known() - 1, sequence.compute_from);
    if (twin_ == nullptr || first < twin_first_ || first >= end || sequence.root != twin_->root ||
        sequence.tokens != twin_->tokens || std::ssize(step_->copied_row) + end - first > config_.max_step_tokens) {
        return true;
    }
    while (sequence.num_pages < pages_for(end)) {
        if (!take_page(sequence)) return false;
    }
    const PageId* row = table_->row(sequence.slot);
    for (int32_t position = first; position < end; ++position) {
        const int64_t page = row[position / config_.page_size];
        step_->add_copy(twin_row_ + position - twin_first_, page * config_.page_size + position % config_.page_size);
    }
    sequence.computed = end;
    return true;
}

/// The sequence has computed all its tokens from position `first` on in this step.
void Scheduler::note_twin(const Sequence& sequence, int32_t first) {
    twin_ = &sequence;
    twin_first_ = first;
    twin_row_ = step_->num_tokens - (sequence.computed - first);
}

}  // namespace batchinfer
