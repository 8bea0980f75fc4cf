#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <queue>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/admission.h"
#include "engine/page_pool.h"
#include "engine/sequence.h"
#include "engine/step.h"

namespace batchinfer {

struct SchedulerConfig {
    int32_t num_pages = 0;
    int32_t page_size = 0;
    int32_t max_slots = 0;
    int32_t max_step_tokens = 0;  // at least max_slots, so that every running sequence decodes in every step
    int32_t max_seq_len = 0;      // prompt and generated tokens of one sequence
    bool prefix_cache = true;
    int32_t lookup = 0;      // most draft tokens of a sequence in a step; 0: no drafts
    int32_t hash_bits = 64;  // fewer only in tests: see PrefixTree

    /// Throws std::invalid_argument naming the field and what it may be.
    void check() const;
};

inline constexpr int32_t kComputeLast = std::numeric_limits<int32_t>::max();

struct NewSequence {
    int64_t id = 0;
    std::span<const int32_t> prompt;
    int32_t max_new_tokens = 0;
    int32_t min_new_tokens = 0;           // stop tokens before so many generated ones do not stop
    int32_t expected_new_tokens = 0;      // 0: max_new_tokens
    int32_t compute_from = kComputeLast;  // prompt positions from here on are computed, whatever the cache has
    int32_t family = 0;                   // the cache's pages are shared within one family only: 0, 1, 2 ...
    bool lookup = true;                   // it may get drafts
    std::span<const int32_t> stop_token_ids = {};
    std::span<const int32_t> generated = {};  // of an earlier life: it goes on from there, and they count as its own
};

enum class FinishReason : uint8_t { kStop, kLength };

struct Finished {
    int64_t seq_id;
    FinishReason reason;
    std::vector<int32_t> tokens;  // generated; a stop token that ended the sequence is the last one
};

/// Decides what each step computes: continuous batching over paged K/V with prefix reuse.
///
/// A step holds first one token of every sequence that decodes, then as many prompt tokens as the budget allows: the
/// rest of a prompt begun earlier, then new sequences in order of arrival. Properties that hold between calls:
///
/// - Running sequences have arrived before waiting ones: admission takes the first of the queue, preemption returns
///   the last admitted. So nobody starves, and a preempted sequence is the next to be admitted.
/// - At most one running sequence, the last, is in the middle of its prompt.
/// - A running sequence always has a token to compute. One whose last token (by max_new_tokens) is scheduled returns
///   its slot and pages at once and only waits for its tokens (draining).
/// - Pages freed while or after step k is built are written to by step k + 1 at the earliest: with a device that runs
///   steps in order, what step k reads is still there. The exception is a preempted sequence, which is not in the step.
/// - Full pages whose tokens are known are found by later sequences as soon as their computation is scheduled, even in
///   the same step (see Step). A page that is still being written is held by one sequence only; what sequences of one
///   step with the same prompt have in it is computed once and copied to each one's (Step::copy_source).
///
/// One step ahead: schedule() may be called with one step's tokens not yet reported. A token unknown to the host is
/// Step::kUnknownToken. A sequence that then turns out to have met a stop token has one superfluous token in the later
/// step, which update() ignores, and which a device that sees the stop token need not compute. A sequence preempted
/// with a token unknown keeps that token: update() appends it before the sequence can be admitted again, as no step
/// that preempts admits.
///
/// Drafts (`lookup`): behind its newest token a decoding sequence computes some that are guessed (lookup.h), and
/// samples after each of them. update() takes the sampled tokens for as long as they are the guessed ones, and one
/// more: what the sequence would have got token by token, as long as what is sampled depends on the tokens before
/// alone. The rest is taken back, pages included. A draft takes room and pages that nobody else needs in the step, and
/// no step is ahead.
///
/// Deterministic: the same calls give the same steps. Not thread-safe.
class Scheduler {
  public:
    static constexpr int32_t kMaxStepsAhead = 2;

    /// Throws std::invalid_argument.
    explicit Scheduler(const SchedulerConfig& config);

    /// Queues a sequence. max_new_tokens is clipped to max_seq_len - prompt length. Throws std::invalid_argument if
    /// the id is open already, an argument is out of range, or the sequence could not run even alone.
    void add(const NewSequence& request);
    /// From now on a step takes prompt tokens only up to `step_tokens` tokens in all (0: max_step_tokens again); its
    /// decodes go on, however many they are. Throws std::invalid_argument for a negative number.
    void limit_prompts(int32_t step_tokens);
    /// Frees the pages that the prefix tree keeps of closed sequences.
    void forget_prefixes() { pool_.clear_cached(); }
    /// The next step, or nullptr if nothing can run now. The Step stays unchanged while the caller keeps the pointer.
    /// Throws std::logic_error if two steps wait for their update(); with drafts, one.
    std::shared_ptr<const Step> schedule();
    /// The tokens sampled by the oldest step without update, in the order of its sample_* arrays (also if there are
    /// none). Returns the sequences that this finishes, in the same order. Throws std::invalid_argument, changing
    /// nothing, if the number of tokens is wrong or one is negative; std::logic_error without such a step.
    std::vector<Finished> update(std::span<const int32_t> tokens);
    /// Ends an open sequence now; tokens still to come are ignored. False if there is no such sequence.
    bool finish(int64_t seq_id);
    bool is_open(int64_t seq_id) const { return open_.contains(seq_id); }
    /// Generated tokens known so far (a view, valid until the next call); throws std::out_of_range for an unknown id.
    std::span<const int32_t> tokens(int64_t seq_id) const;

    /// How many more tokens each open sequence is taken to generate, in no order: what admission reckons with.
    std::vector<int64_t> tokens_left() const;
    int32_t num_open() const { return static_cast<int32_t>(open_.size()); }
    int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }
    int32_t num_running() const { return config_.max_slots - static_cast<int32_t>(free_slots_.size()); }
    int32_t num_steps_ahead() const { return num_ahead_; }
    /// How many steps may wait for their update(): with drafts one, as they begin behind the newest token.
    int32_t max_steps_ahead() const { return config_.lookup > 0 ? 1 : kMaxStepsAhead; }
    int64_t preemptions() const { return preemptions_; }
    /// Prompt tokens of admitted sequences that were found in the cache; a preempted sequence counts once.
    int64_t cached_prompt_tokens() const { return cached_prompt_tokens_; }
    /// Draft tokens computed, and those of them that were right.
    int64_t drafted_tokens() const { return drafted_tokens_; }
    int64_t accepted_tokens() const { return accepted_tokens_; }
    const PagePool& pool() const { return pool_; }
    const SchedulerConfig& config() const { return config_; }

    /// Throws std::runtime_error naming the first broken invariant. O(everything): for tests.
    void check_integrity() const;

  private:
    // schedule(), in this order
    void close_gaps();
    void begin_step();
    void schedule_decodes();
    void schedule_prompts();
    void end_step();

    bool admit(Sequence& sequence);
    void prefill(Sequence& sequence);
    void sample(Sequence& sequence);
    bool take_page(Sequence& sequence);
    void preempt(Sequence& sequence);
    void publish(Sequence& sequence, bool adopt);
    void match_prefix(const Sequence& sequence);
    Lifetime predict(const Sequence& sequence, int64_t prefill_steps) const;
    void extend(Sequence& sequence);
    void draft(Sequence& sequence);
    void settle_draft(Sequence& sequence);
    bool copy_twin(Sequence& sequence);

    bool append(Sequence& sequence, int32_t token);
    void release(Sequence& sequence);
    void close(Sequence& sequence);
    int32_t pages_for(int32_t tokens) const { return (tokens + config_.page_size - 1) / config_.page_size; }
    std::span<const PageId> pages(const Sequence& sequence) const;
    std::span<const int32_t> page_tokens(const Sequence& sequence, int32_t index) const;

    SchedulerConfig config_;
    PagePool pool_;
    PageForecast forecast_;
    std::shared_ptr<PageTable> table_;
    int32_t prompt_limit_;  // tokens that prompts may bring a step to

    std::unordered_map<int64_t, std::unique_ptr<Sequence>> open_;
    std::unordered_map<const Sequence*, std::unique_ptr<Sequence>> leaving_;  // finished with tokens in flight
    std::map<int64_t, Sequence*> waiting_;                                    // by arrival
    std::vector<Sequence*> running_;                                          // by arrival; nullptr: has left
    bool has_gaps_ = false;
    std::shared_ptr<const std::vector<int32_t>> stop_token_ids_;                     // of the last sequence added
    std::priority_queue<int32_t, std::vector<int32_t>, std::greater<>> free_slots_;  // lowest first
    int64_t num_arrived_ = 0;

    std::array<std::shared_ptr<Step>, kMaxStepsAhead> steps_;
    // Both by step index modulo 2. The sequences are those that the step samples, in order.
    std::array<std::vector<Sequence*>, kMaxStepsAhead> sampled_;
    int32_t num_ahead_ = 0;

    Step* step_ = nullptr;  // under construction
    bool preempted_ = false;
    const Sequence* twin_ = nullptr;  // the last that computed its prompt's end in this step, and did not copy it,
    int32_t twin_first_page_ = 0;     // from this page on
    int64_t retry_at_ = 0;  // the first in the queue did not fit: not asked again before that step or a release
    std::vector<PageId> prefix_;
    std::vector<int32_t> chunk_;
    std::vector<PageId> dropped_;
    std::vector<Sequence*> draining_;

    int64_t preemptions_ = 0;
    int64_t cached_prompt_tokens_ = 0;
    int64_t drafted_tokens_ = 0;
    int64_t accepted_tokens_ = 0;
};

}  // namespace batchinfer
