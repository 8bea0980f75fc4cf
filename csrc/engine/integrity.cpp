#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/scheduler.h"

// Scheduler::check_integrity(): every invariant that scheduler.h states, checked from scratch.

namespace batchinfer {

namespace {

void require(bool ok, const Sequence& sequence, const char* what) {
    if (!ok) throw std::runtime_error("sequence " + std::to_string(sequence.id) + ": " + what);
}

void require(bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("scheduler: ") + what);
}

}  // namespace

void Scheduler::check_integrity() const {
    std::vector<const Sequence*> running;
    for (const Sequence* sequence : running_) {
        if (sequence != nullptr) running.push_back(sequence);
    }

    // Lists, states, slots.
    require(static_cast<int32_t>(running.size()) == num_running(), "slots in use differ from running sequences");
    require(std::ranges::is_sorted(running, {}, &Sequence::arrival), "running sequences out of order of arrival");
    require(running.empty() || waiting_.empty() || running.back()->arrival < waiting_.begin()->first,
            "a waiting sequence arrived before a running one");
    std::set<int32_t> slots;
    for (auto free = free_slots_; !free.empty(); free.pop()) {
        require(slots.insert(free.top()).second, "a slot is free twice");
    }
    for (size_t i = 0; i < running_.size(); ++i) {
        if (running_[i] == nullptr) continue;
        require(running_[i]->position == i, *running_[i], "wrong position in the list of running sequences");
        require(slots.insert(running_[i]->slot).second, *running_[i], "its slot is free or has two owners");
    }
    require(static_cast<int32_t>(slots.size()) == config_.max_slots && *slots.begin() == 0 &&
                *slots.rbegin() == config_.max_slots - 1,
            "a slot is lost");
    for (const auto& [arrival, sequence] : waiting_) {
        require(sequence->arrival == arrival && sequence->state == SequenceState::kWaiting, *sequence, "not waiting");
        require(sequence->slot == -1 && sequence->num_pages == 0 && sequence->computed == 0, *sequence,
                "waiting with a slot or pages");
    }
    size_t draining = 0;
    for (const auto& [id, sequence] : open_) {
        require(sequence->id == id && sequence->state != SequenceState::kFinished, *sequence, "finished, but open");
        draining += sequence->state == SequenceState::kDraining;
    }
    require(running.size() + waiting_.size() + draining == open_.size(), "an open sequence is nowhere");

    // Tokens that are sampled and not known.
    std::vector<const Sequence*> pending;
    for (int32_t ahead = 1; ahead <= num_ahead_; ++ahead) {
        const auto& sampled = sampled_[(forecast_.now() - ahead) % kMaxStepsAhead];
        pending.insert(pending.end(), sampled.begin(), sampled.end());
    }
    size_t in_flight = 0;
    const auto check_pending = [&](const Sequence& sequence) {
        const auto steps = std::ranges::count(pending, &sequence);
        require(steps * (1 + sequence.drafted) == sequence.in_flight, sequence, "wrong count in flight");
        in_flight += steps;
    };
    for (const auto& [id, sequence] : open_)
        check_pending(*sequence);
    for (const auto& [key, sequence] : leaving_) {
        require(key == sequence.get() && sequence->state == SequenceState::kFinished && sequence->in_flight > 0,
                *sequence, "kept without reason");
        check_pending(*sequence);
    }
    require(in_flight == pending.size(), "a step samples a sequence that is gone");

    // Pages: who holds them, what is in the tree, what is being written.
    std::vector<int32_t> holders(config_.num_pages, 0);
    for (const Sequence* sequence : running) {
        for (const PageId page : pages(*sequence)) {
            require(page >= 0 && page < config_.num_pages, *sequence, "holds a page that does not exist");
            ++holders[page];
        }
    }
    pool_.check(holders);
    for (const Sequence* sequence : running) {
        const int32_t full = std::min(sequence->computed, sequence->known()) / config_.page_size;
        require(sequence->state == SequenceState::kRunning, *sequence, "has a slot without running");
        require(sequence->computed < sequence->length(), *sequence, "running with nothing to compute");
        require(sequence->num_pages == pages_for(sequence->computed), *sequence, "wrong number of pages");
        require(sequence->sampled() - sequence->drafted < sequence->max_new_tokens, *sequence,
                "running beyond max_new_tokens");
        require(sequence->decoding == (sequence->computed == sequence->length() - 1 && sequence->decoding), *sequence,
                "decoding with more than one token to compute");
        require(sequence->decoding || sequence == running.back(), *sequence,
                "in its prompt, and not the last admitted");
        require(sequence->published <= (config_.prefix_cache ? full : 0), *sequence, "published a page not yet full");
        for (int32_t i = 0; i < sequence->num_pages; ++i) {
            const PageId page = pages(*sequence)[i];
            const bool in_tree = pool_.tree().contains(page);
            if (i < sequence->published) {
                require(in_tree, *sequence, "a published page is not in the tree");
                require(pool_.tree().parent(page) == (i == 0 ? sequence->root : pages(*sequence)[i - 1]), *sequence,
                        "a published page has another parent");
                require(std::ranges::equal(pool_.tree().tokens(page), page_tokens(*sequence, i)), *sequence,
                        "a published page has other tokens");
            } else {
                require(!in_tree && holders[page] == 1, *sequence, "a page that may be written is shared");
            }
        }
    }

    // The forecast, counted from scratch.
    for (int64_t step = forecast_.now(); step <= forecast_.farthest(); ++step) {
        int32_t use = 0;
        for (PageId page = 0; page < config_.num_pages; ++page) {
            if (holders[page] > 0) use += step <= forecast_.counted_until(page);
        }
        for (const Sequence* sequence : running) {
            for (int32_t i = sequence->num_pages; i < sequence->life.max_pages && step <= sequence->life.last; ++i) {
                use += step >= forecast_.needed_from(i, sequence->life);
            }
        }
        require(use == forecast_.use(step), "the forecast differs from a recount");
    }
    for (PageId page = 0; page < config_.num_pages; ++page) {
        require(holders[page] > 0 || forecast_.counted_until(page) == -1, "the forecast counts a page nobody holds");
    }
}

}  // namespace batchinfer
