#include "engine/scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace batchinfer {

void SchedulerConfig::check() const {
    const auto require = [](bool ok, const char* name, int64_t value, const std::string& allowed) {
        if (!ok) throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": must be " + allowed);
    };
    require(num_pages >= 1, "num_pages", num_pages, "at least 1");
    require(page_size >= 1, "page_size", page_size, "at least 1");
    require(max_slots >= 1, "max_slots", max_slots, "at least 1");
    require(max_seq_len >= 2, "max_seq_len", max_seq_len, "at least 2: one prompt token and one generated");
    require(max_step_tokens >= max_slots, "max_step_tokens", max_step_tokens,
            "at least max_slots=" + std::to_string(max_slots) + ", so that every slot gets its token in every step");
    require(lookup >= 0 && lookup <= 64, "lookup", lookup, "from 0 to 64");
    require(hash_bits >= 0 && hash_bits <= 64, "hash_bits", hash_bits, "from 0 to 64");
}

namespace {

/// Room for so many generated tokens is made at once; longer answers grow by doubling.
constexpr int32_t kReservedTokens = 512;

/// How many sequences ahead of its use one is fetched into the cache.
constexpr size_t kPrefetch = 8;

SchedulerConfig checked(const SchedulerConfig& config) {
    config.check();
    return config;
}

/// How many tokens a sequence is taken to generate. One that outlives its expectation is expected to go on for as
/// long again: answer lengths have heavy tails, and assuming max_new_tokens at once would empty the batch.
int32_t predicted_new_tokens(const Sequence& sequence) {
    int64_t predicted = sequence.expected_new_tokens;
    while (predicted <= sequence.sampled())
        predicted *= 2;
    return static_cast<int32_t>(std::min<int64_t>(predicted, sequence.max_new_tokens));
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(checked(config)),
      pool_(config.num_pages, config.page_size, config.hash_bits),
      forecast_(config.num_pages, config.page_size, config.max_seq_len),
      table_(std::make_shared<PageTable>(config.max_slots, pages_for(config.max_seq_len))),
      prompt_limit_(config.max_step_tokens) {
    for (int32_t slot = 0; slot < config_.max_slots; ++slot)
        free_slots_.push(slot);
}

void Scheduler::add(const NewSequence& request) {
    const auto require = [&](bool ok, const std::string& problem) {
        if (!ok) throw std::invalid_argument("sequence " + std::to_string(request.id) + ": " + problem);
    };
    require(!open_.contains(request.id), "this id is open already");
    require(!request.prompt.empty(), "the prompt has no tokens");
    require(request.max_new_tokens >= 1, "max_new_tokens must be at least 1");
    require(request.min_new_tokens >= 0, "min_new_tokens must not be negative");
    require(request.expected_new_tokens >= 0, "expected_new_tokens must not be negative");
    require(request.compute_from >= 0, "compute_from must not be negative");
    require(request.family >= 0, "family must not be negative");
    require(std::ranges::all_of(request.prompt, [](int32_t id) { return id >= 0; }), "the prompt has a negative token");
    require(std::ssize(request.prompt) < config_.max_seq_len,
            "its prompt of " + std::to_string(request.prompt.size()) +
                " tokens and one new token exceed max_seq_len=" + std::to_string(config_.max_seq_len));
    const auto prompt_length = static_cast<int32_t>(request.prompt.size());
    const int32_t max_new = std::min(request.max_new_tokens, config_.max_seq_len - prompt_length);
    require(std::ranges::all_of(request.generated, [](int32_t id) { return id >= 0; }),
            "a generated token is negative");
    require(std::ssize(request.generated) < max_new, "it has " + std::to_string(request.generated.size()) +
                                                         " generated tokens already, and may have " +
                                                         std::to_string(max_new));
    const int32_t pages = pages_for(prompt_length + max_new - 1);  // the last token is never computed
    require(pages <= config_.num_pages, "its prompt of " + std::to_string(prompt_length) + " tokens and " +
                                            std::to_string(max_new) + " new ones need " + std::to_string(pages) +
                                            " pages, and there are " + std::to_string(config_.num_pages));

    auto sequence = std::make_unique<Sequence>();
    sequence->tokens.reserve(prompt_length + std::min(max_new, kReservedTokens));
    sequence->tokens.assign(request.prompt.begin(), request.prompt.end());
    sequence->tokens.insert(sequence->tokens.end(), request.generated.begin(), request.generated.end());
    sequence->last_token = sequence->tokens.back();
    sequence->prompt_length = prompt_length;
    sequence->max_new_tokens = max_new;
    sequence->id = request.id;
    sequence->arrival = num_arrived_++;
    sequence->min_new_tokens = request.min_new_tokens;
    sequence->compute_from = request.compute_from;
    sequence->root = PrefixTree::root(request.family);
    sequence->lookup = request.lookup && config_.lookup > 0;
    sequence->expected_new_tokens =
        request.expected_new_tokens == 0 ? max_new : std::min(request.expected_new_tokens, max_new);
    if (stop_token_ids_ == nullptr || !std::ranges::equal(*stop_token_ids_, request.stop_token_ids)) {
        stop_token_ids_ =
            std::make_shared<const std::vector<int32_t>>(request.stop_token_ids.begin(), request.stop_token_ids.end());
    }
    sequence->stop_token_ids = stop_token_ids_;
    waiting_.emplace(sequence->arrival, sequence.get());
    open_.emplace(request.id, std::move(sequence));
}

void Scheduler::limit_prompts(int32_t step_tokens) {
    if (step_tokens < 0)
        throw std::invalid_argument("step_tokens=" + std::to_string(step_tokens) + ": must be at least 0");
    const int32_t most = config_.max_step_tokens;
    prompt_limit_ = step_tokens == 0 ? most : std::min(step_tokens, most);
}

std::vector<int64_t> Scheduler::tokens_left() const {
    std::vector<int64_t> left;
    left.reserve(open_.size());
    for (const auto& [id, sequence] : open_)
        left.push_back(std::max(1, predicted_new_tokens(*sequence) - sequence->sampled()));
    return left;
}

std::shared_ptr<const Step> Scheduler::schedule() {
    if (num_ahead_ == max_steps_ahead()) {
        throw std::logic_error(config_.lookup > 0 ? "schedule(): a draft waits for its update()"
                                                  : "schedule(): two steps wait for their update()");
    }
    close_gaps();
    if (running_.empty() && waiting_.empty()) return nullptr;
    begin_step();
    schedule_decodes();
    schedule_prompts();
    end_step();
    return steps_[(forecast_.now() - 1) % kMaxStepsAhead];
}

void Scheduler::close_gaps() {
    if (!has_gaps_) return;
    std::erase(running_, nullptr);
    for (size_t i = 0; i < running_.size(); ++i)
        running_[i]->position = i;
    has_gaps_ = false;
}

void Scheduler::begin_step() {
    std::shared_ptr<Step>& step = steps_[forecast_.now() % kMaxStepsAhead];
    if (step.use_count() != 1) {  // none yet, or the caller still reads it
        const int64_t samples = static_cast<int64_t>(config_.max_slots) * (1 + config_.lookup);
        step = std::make_shared<Step>(config_.max_step_tokens, config_.max_slots,
                                      std::min<int64_t>(samples, config_.max_step_tokens), table_);
    }
    step->clear(forecast_.now());
    step_ = step.get();
    sampled_[forecast_.now() % kMaxStepsAhead].clear();
    preempted_ = false;
    twin_ = nullptr;
}

void Scheduler::schedule_decodes() {
    // A sequence without a page left takes one from the end of the list, where nobody has been scheduled yet.
    for (size_t i = 0; i < running_.size() && running_[i]->decoding; ++i) {
        Sequence& sequence = *running_[i];
        if (i + kPrefetch < running_.size()) running_[i + kPrefetch]->prefetch();
        if (forecast_.now() > sequence.life.last) extend(sequence);
        publish(sequence, /*adopt=*/true);
        if (sequence.computed == sequence.num_pages * config_.page_size && !take_page(sequence)) break;
        if (sequence.lookup) draft(sequence);
        if (sequence.drafted > 0) {
            chunk_.assign(1, sequence.last_token);
            chunk_.insert(chunk_.end(), sequence.draft.begin(), sequence.draft.end());
            step_->add_tokens(sequence.id, sequence.slot, sequence.computed, chunk_, table_->row(sequence.slot),
                              config_.page_size);
        } else {
            const int32_t token = sequence.in_flight > 0 ? Step::kUnknownToken : sequence.last_token;
            const int32_t offset = sequence.computed - (sequence.num_pages - 1) * config_.page_size;
            step_->add_token(sequence.id, sequence.slot, sequence.computed, token,
                             static_cast<int64_t>(sequence.last_page) * config_.page_size + offset);
        }
        sequence.computed += 1 + sequence.drafted;
        sample(sequence);
    }
    step_->num_decode = step_->num_seqs;
}

void Scheduler::schedule_prompts() {
    if (!running_.empty() && !running_.back()->decoding) prefill(*running_.back());
    while (!preempted_ && !waiting_.empty() && !free_slots_.empty() && step_->num_tokens < prompt_limit_ &&
           (running_.empty() || running_.back()->decoding)) {
        if (!admit(*waiting_.begin()->second)) break;
        prefill(*running_.back());
    }
}

void Scheduler::end_step() {
    for (Sequence* sequence : draining_) {
        release(*sequence);
        sequence->state = SequenceState::kDraining;
    }
    draining_.clear();
    forecast_.advance();
    ++num_ahead_;
}

bool Scheduler::admit(Sequence& sequence) {
    if (forecast_.now() < retry_at_) return false;
    match_prefix(sequence);
    const auto matched = static_cast<int32_t>(prefix_.size());
    const int32_t to_compute = sequence.known() - matched * config_.page_size;
    const int32_t budget_now = prompt_limit_ - step_->num_tokens;
    const int32_t budget_later = std::max(1, prompt_limit_ - static_cast<int32_t>(running_.size()));
    const int32_t prefill_steps = (std::max(to_compute - budget_now, 0) + budget_later - 1) / budget_later;
    const Lifetime life = predict(sequence, prefill_steps);
    if (!running_.empty() && !forecast_.fits(prefix_, life, config_.num_pages)) {
        retry_at_ = forecast_.now() + config_.page_size;
        return false;
    }
    waiting_.erase(sequence.arrival);
    sequence.state = SequenceState::kRunning;
    sequence.slot = free_slots_.top();
    free_slots_.pop();
    sequence.position = running_.size();
    running_.push_back(&sequence);
    step_->new_slots.push_back(sequence.slot);
    step_->new_seqs.push_back(sequence.id);

    forecast_.add(prefix_, life);
    sequence.life = life;
    sequence.num_pages = sequence.published = matched;
    sequence.computed = matched * config_.page_size;
    sequence.decoding = false;
    for (int32_t column = 0; column < matched; ++column) {
        pool_.hold(prefix_[column]);
        table_->row(sequence.slot)[column] = prefix_[column];
        step_->add_page_update(sequence.slot, column, prefix_[column]);
    }
    if (!sequence.counted) cached_prompt_tokens_ += sequence.computed;
    sequence.counted = true;
    return true;
}

void Scheduler::match_prefix(const Sequence& sequence) {
    prefix_.clear();
    if (!config_.prefix_cache) return;
    // The last token gives the logits: compute it.
    const int32_t limit = std::min(sequence.known() - 1, sequence.compute_from) / config_.page_size;
    // Neighbours in the queue mostly begin alike, and what the last one holds of the tree needs no hashing.
    const Sequence* last = running_.empty() ? nullptr : running_.back();
    const int32_t held = last != nullptr && last->root == sequence.root ? std::min(limit, last->published) : 0;
    for (int32_t i = 0; i < held && std::ranges::equal(page_tokens(sequence, i), page_tokens(*last, i)); ++i)
        prefix_.push_back(table_->row(last->slot)[i]);
    PageId page = prefix_.empty() ? sequence.root : prefix_.back();
    while (static_cast<int32_t>(prefix_.size()) < limit) {
        page = pool_.find(page, page_tokens(sequence, static_cast<int32_t>(prefix_.size())));
        if (page == kNoPage) break;
        prefix_.push_back(page);
    }
}

void Scheduler::prefill(Sequence& sequence) {
    const int32_t found = sequence.computed;
    if (config_.prefix_cache && !copy_twin(sequence)) return;
    const int32_t first = sequence.computed;
    int32_t end = std::min(sequence.known(), first + prompt_limit_ - step_->num_tokens);
    if (end <= first) return;
    while (sequence.num_pages < pages_for(end)) {
        // It is the last admitted: as long as there is something it can compute, nobody need be preempted.
        if (pool_.num_used() == config_.num_pages && sequence.num_pages * config_.page_size > first) {
            end = sequence.num_pages * config_.page_size;
        } else if (!take_page(sequence)) {
            return;
        }
    }
    step_->add_tokens(sequence.id, sequence.slot, first, std::span(sequence.tokens).subspan(first, end - first),
                      table_->row(sequence.slot), config_.page_size);
    sequence.computed = end;
    publish(sequence, /*adopt=*/false);
    if (end < sequence.known()) return;
    if (first == found) {
        twin_ = &sequence;
        twin_first_page_ = found / config_.page_size;
    }
    sequence.decoding = true;
    forecast_.cancel_growth(sequence.num_pages, sequence.life);  // the steps that the prompt took are known now
    sequence.life = predict(sequence, 0);
    forecast_.add(pages(sequence), sequence.life);
    sample(sequence);
}

void Scheduler::sample(Sequence& sequence) {
    for (int32_t i = 0; i <= sequence.drafted; ++i)
        step_->add_sample(sequence.id, sequence.slot, sequence.sampled() + i, sequence.drafted - i);
    sampled_[forecast_.now() % kMaxStepsAhead].push_back(&sequence);
    sequence.in_flight += 1 + sequence.drafted;
    if (sequence.drafted == 0 && sequence.sampled() == sequence.max_new_tokens) draining_.push_back(&sequence);
}

bool Scheduler::take_page(Sequence& sequence) {
    PageId page = pool_.take();
    while (page == kNoPage) {
        Sequence& victim = *running_.back();
        preempt(victim);
        if (&victim == &sequence) return false;
        page = pool_.take();
    }
    forecast_.take(page, sequence.life);
    table_->row(sequence.slot)[sequence.num_pages] = page;
    step_->add_page_update(sequence.slot, sequence.num_pages, page);
    ++sequence.num_pages;
    sequence.last_page = page;
    return true;
}

void Scheduler::preempt(Sequence& sequence) {
    release(sequence);
    running_.pop_back();
    sequence.state = SequenceState::kWaiting;
    waiting_.emplace(sequence.arrival, &sequence);
    preempted_ = true;
    ++preemptions_;
}

/// Puts the sequence's full pages of known tokens into the tree. Where another page is there for the same tokens,
/// stops, or, with `adopt`, holds that one in place of its own. To adopt is right only where no step under
/// construction writes to the own page, because it becomes free.
void Scheduler::publish(Sequence& sequence, bool adopt) {
    if (!config_.prefix_cache) return;
    const int32_t ready = std::min(sequence.computed, sequence.known());
    while ((sequence.published + 1) * config_.page_size <= ready) {
        const int32_t column = sequence.published;
        PageId* row = table_->row(sequence.slot);
        const PageId own = row[column];
        const PageId parent = column == 0 ? sequence.root : row[column - 1];
        const PageId page = pool_.publish(parent, page_tokens(sequence, column), own);
        if (page != own) {
            if (!adopt) return;
            pool_.hold(page);
            row[column] = page;
            step_->add_page_update(sequence.slot, column, page);
            pool_.drop(own);
            forecast_.release({&own, 1});
            forecast_.hold(page, sequence.life);
            sequence.last_page = row[sequence.num_pages - 1];
        }
        ++sequence.published;
    }
}

Lifetime Scheduler::predict(const Sequence& sequence, int64_t prefill_steps) const {
    const int32_t length = sequence.length();
    const int32_t computed_at_end = sequence.prompt_length + predicted_new_tokens(sequence) - 1;
    const int64_t origin = forecast_.now() - length;
    return {
        .origin = origin,
        .last = std::min(origin + computed_at_end + prefill_steps, forecast_.farthest()),
        .min_pages = pages_for(length),
        .max_pages = pages_for(computed_at_end),
    };
}

void Scheduler::extend(Sequence& sequence) {
    forecast_.cancel_growth(sequence.num_pages, sequence.life);
    sequence.life = predict(sequence, 0);
    forecast_.add(pages(sequence), sequence.life);
}

void Scheduler::release(Sequence& sequence) {
    publish(sequence, /*adopt=*/false);
    const std::span<const PageId> held = pages(sequence);
    dropped_.clear();
    for (auto page = held.rbegin(); page != held.rend(); ++page) {  // deepest first, as PrefixTree wants it
        if (pool_.drop(*page)) dropped_.push_back(*page);
    }
    forecast_.release(dropped_);
    forecast_.cancel_growth(sequence.num_pages, sequence.life);
    free_slots_.push(sequence.slot);
    running_[sequence.position] = nullptr;
    has_gaps_ = true;
    sequence.slot = -1;
    sequence.computed = sequence.num_pages = sequence.published = 0;
    retry_at_ = 0;
}

std::vector<Finished> Scheduler::update(std::span<const int32_t> tokens) {
    if (num_ahead_ == 0) throw std::logic_error("update(): every step has been updated");
    const int64_t step = (forecast_.now() - num_ahead_) % kMaxStepsAhead;
    const auto& sequences = sampled_[step];
    if (std::ssize(tokens) != steps_[step]->num_samples) {
        throw std::invalid_argument("update(): " + std::to_string(tokens.size()) + " tokens for a step that samples " +
                                    std::to_string(steps_[step]->num_samples));
    }
    if (!std::ranges::all_of(tokens, [](int32_t id) { return id >= 0; })) {
        throw std::invalid_argument("update(): a token is negative");
    }
    --num_ahead_;
    std::vector<Finished> finished;
    const int32_t* sampled = tokens.data();
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence& sequence = *sequences[i];
        if (i + kPrefetch < sequences.size()) sequences[i + kPrefetch]->prefetch();
        const int32_t* token = sampled;
        sampled += 1 + sequence.drafted;
        sequence.in_flight -= 1 + sequence.drafted;
        if (sequence.state == SequenceState::kFinished) {
            if (sequence.in_flight == 0) leaving_.erase(&sequence);
            continue;
        }
        bool stops = append(sequence, *token);
        if (sequence.drafted > 0) {
            drafted_tokens_ += sequence.drafted;
            for (int32_t j = 0; j < sequence.drafted && !stops && token[j] == sequence.draft[j]; ++j) {
                stops = append(sequence, token[j + 1]);
                ++accepted_tokens_;
            }
            settle_draft(sequence);
        }
        if (!stops && sequence.generated() < sequence.max_new_tokens) continue;
        // A step ahead that knows the stop token computes nothing behind it: its K/V are not for others to find.
        if (stops) sequence.computed = std::min(sequence.computed, sequence.known() - 1);
        finished.push_back({
            .seq_id = sequence.id,
            .reason = stops ? FinishReason::kStop : FinishReason::kLength,
            .tokens = {sequence.tokens.begin() + sequence.prompt_length, sequence.tokens.end()},
        });
        close(sequence);
    }
    return finished;
}

/// Whether the sampled token stops the sequence.
bool Scheduler::append(Sequence& sequence, int32_t token) {
    const bool may_stop = sequence.generated() >= sequence.min_new_tokens;
    sequence.tokens.push_back(token);
    sequence.last_token = token;
    const auto& stop_ids = *sequence.stop_token_ids;
    return may_stop && std::ranges::find(stop_ids, token) != stop_ids.end();
}

bool Scheduler::finish(int64_t seq_id) {
    const auto found = open_.find(seq_id);
    if (found == open_.end()) return false;
    close(*found->second);
    return true;
}

void Scheduler::close(Sequence& sequence) {
    if (sequence.state == SequenceState::kRunning) release(sequence);
    if (sequence.state == SequenceState::kWaiting) {
        waiting_.erase(sequence.arrival);
        retry_at_ = 0;
    }
    sequence.state = SequenceState::kFinished;
    auto node = open_.extract(sequence.id);
    if (sequence.in_flight > 0) leaving_.emplace(&sequence, std::move(node.mapped()));
}

std::span<const int32_t> Scheduler::tokens(int64_t seq_id) const {
    const Sequence& sequence = *open_.at(seq_id);
    return std::span(sequence.tokens).subspan(sequence.prompt_length);
}

std::span<const PageId> Scheduler::pages(const Sequence& sequence) const {
    return {table_->row(sequence.slot), static_cast<size_t>(sequence.num_pages)};
}

std::span<const int32_t> Scheduler::page_tokens(const Sequence& sequence, int32_t index) const {
    return std::span(sequence.tokens).subspan(static_cast<size_t>(index) * config_.page_size, config_.page_size);
}

}  // namespace batchinfer
