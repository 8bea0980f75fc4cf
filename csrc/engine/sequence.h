#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/admission.h"

namespace batchinfer {

enum class SequenceState : uint8_t {
    kWaiting,   // no slot, no pages; also after preemption
    kRunning,   // has a slot; every step computes at least one of its tokens
    kDraining,  // its last token is scheduled, not known yet; slot and pages are returned already
    kFinished,  // reported or stopped; kept only until its unknown tokens have come and been ignored
};

/// One continuation of one prompt.
///
/// Three lengths: tokens.size() (known to the host) <= length() (known or sampled by a scheduled step); `computed`
/// (K/V written by a scheduled step) < length(). While decoding, computed == length() - 1.
///
/// What every step touches comes first and fits two cache lines: with thousands of sequences a step's host time is
/// mostly the wait for these lines.
struct alignas(64) Sequence {
    std::vector<int32_t> tokens;  // prompt, then the known generated tokens
    int64_t id = 0;
    int32_t prompt_length = 0;
    int32_t max_new_tokens = 0;
    int32_t min_new_tokens = 0;
    int32_t last_token = 0;  // tokens.back()
    int32_t in_flight = 0;   // sampled by scheduled steps, not known yet; those after a draft among them
    int32_t drafted = 0;     // draft tokens of the step in flight
    int32_t computed = 0;
    int32_t num_pages = 0;       // valid entries in the slot's row of the page table
    PageId last_page = kNoPage;  // the last of them
    int32_t published = 0;       // the first so many of them are in the prefix tree
    int32_t slot = -1;
    SequenceState state = SequenceState::kWaiting;
    bool decoding = false;  // all tokens known when it got its slot are computed
    bool lookup = false;    // it may get drafts
    bool counted = false;   // its prompt has been counted in the statistics of prefix reuse
    std::shared_ptr<const std::vector<int32_t>> stop_token_ids;  // mostly one list for all sequences
    Lifetime life;                                               // as counted in the forecast; only while running

    int64_t arrival = 0;
    int32_t expected_new_tokens = 0;
    int32_t compute_from = 0;
    PageId root = kNoPage;       // of its family in the prefix tree
    std::vector<int32_t> draft;  // of the step in flight, guessed to come after the known tokens
    size_t position = 0;         // in the scheduler's list of running sequences

    /// Asks for the lines that every step touches, some sequences ahead of their use. Without, update() of 2,000
    /// sequences takes a third longer.
    void prefetch() const {
        __builtin_prefetch(this, 1);
        __builtin_prefetch(reinterpret_cast<const char*>(this) + 64, 1);
    }

    int32_t known() const { return static_cast<int32_t>(tokens.size()); }
    int32_t length() const { return known() + in_flight; }
    int32_t generated() const { return known() - prompt_length; }
    int32_t sampled() const { return length() - prompt_length; }
};

}  // namespace batchinfer
