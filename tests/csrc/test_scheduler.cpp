// Random jobs on tiny page pools. The device is a table that remembers, for each token of the KV cache, a hash of the
// sequence's tokens up to there; every step checks that each sequence attends to exactly its own history.

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "engine/scheduler.h"

using namespace batchinfer;

namespace {

constexpr int32_t kVocabulary = 3;  // few tokens, so that sequences often agree
constexpr int32_t kStop = 0;

uint64_t extend(uint64_t history, int32_t token) {
    const uint64_t h = (history ^ static_cast<uint64_t>(token + 1)) * 0x9E3779B97F4A7C15ull;
    return h ^ h >> 29;
}

struct Job {
    std::vector<int32_t> tokens;  // prompt and all it should generate
    int32_t prompt_length = 0;
    bool stops = false;
};

Job make_job(std::vector<int32_t> prompt, int32_t max_new, int32_t min_new, bool has_stop) {
    Job job{.tokens = std::move(prompt)};
    job.prompt_length = static_cast<int32_t>(job.tokens.size());
    uint64_t history = 0;
    for (const int32_t token : job.tokens)
        history = extend(history, token);
    for (int32_t i = 0; i < max_new && !job.stops; ++i) {
        const auto token = static_cast<int32_t>(history % kVocabulary);
        job.tokens.push_back(token);
        history = extend(history, token);
        job.stops = has_stop && token == kStop && i >= min_new;
    }
    return job;
}

class Device {
  public:
    explicit Device(const SchedulerConfig& config)
        : page_size_(config.page_size),
          kv_(static_cast<size_t>(config.num_pages) * config.page_size),
          last_token_(config.max_slots) {}

    std::vector<int32_t> run(const Step& step) {
        std::vector<uint64_t> history_at(step.num_tokens);
        for (int32_t i = 0; i < step.num_seqs; ++i) {  // a step's K/V is written before anyone attends
            const int32_t first = step.q_start[i];
            uint64_t history = step.positions[first] == 0 ? 0 : history_before(step, i);
            for (int32_t t = first; t < step.q_start[i + 1]; ++t) {
                const int32_t id =
                    step.token_ids[t] == Step::kUnknownToken ? last_token_[step.seq_slot[i]] : step.token_ids[t];
                CHECK(step.kv_index[t] == kv_index(step, i, step.positions[t]));
                history = extend(history, id);
                kv_[step.kv_index[t]] = history_at[t] = history;
            }
            copy_pages(step);  // those of what comes later in the step are copied before it is looked at
            CHECK(step.positions[step.q_start[i + 1] - 1] + 1 == step.kv_len[i]);
        }
        std::vector<int32_t> sampled;
        for (int32_t n = 0; n < step.num_samples; ++n) {
            sampled.push_back(static_cast<int32_t>(history_at[step.sample_row[n]] % kVocabulary));
            last_token_[step.sample_slot[n]] = sampled.back();
        }
        return sampled;
    }

    /// Sequence i of the step, up to its draft, attends to the first tokens of `expected`, and to nothing else.
    void check_context(const Step& step, int32_t i, const std::vector<int32_t>& expected) const {
        uint64_t history = 0;
        for (int32_t position = 0; position < step.kv_len[i] - drafted(step, i); ++position) {
            history = extend(history, expected[position]);
            CHECK(kv_[kv_index(step, i, position)] == history);
        }
    }

    static int32_t drafted(const Step& step, int32_t i) {
        return i < step.num_decode ? step.q_start[i + 1] - step.q_start[i] - 1 : 0;
    }

  private:
    void copy_pages(const Step& step) {
        for (size_t c = 0; c < step.copy_source.size(); ++c) {
            std::copy_n(kv_.begin() + int64_t{step.copy_source[c]} * page_size_, page_size_,
                        kv_.begin() + int64_t{step.copy_target[c]} * page_size_);
        }
    }
    int64_t kv_index(const Step& step, int32_t i, int32_t position) const {
        const PageId page = step.page_table->row(step.seq_slot[i])[position / page_size_];
        return static_cast<int64_t>(page) * page_size_ + position % page_size_;
    }
    uint64_t history_before(const Step& step, int32_t i) const {
        return kv_[kv_index(step, i, step.positions[step.q_start[i]] - 1)];
    }

    int32_t page_size_;
    std::vector<uint64_t> kv_;
    std::vector<int32_t> last_token_;
};

struct Outcome {
    int64_t preemptions = 0;
    int64_t accepted = 0;
    size_t copied = 0;
};

Outcome random_jobs(uint32_t seed, int32_t steps_ahead, int32_t lookup) {
    std::mt19937 random(seed);
    const auto in = [&](int32_t low, int32_t high) { return low + static_cast<int32_t>(random() % (high - low + 1)); };
    SchedulerConfig config{.page_size = in(1, 5), .max_slots = in(1, 8), .max_seq_len = in(8, 40)};
    config.num_pages = (config.max_seq_len + config.page_size - 1) / config.page_size + in(0, 10);
    config.max_step_tokens = config.max_slots + in(0, 20);
    config.prefix_cache = in(0, 3) != 0;
    config.hash_bits = std::vector{0, 2, 64}[in(0, 2)];
    config.lookup = lookup;
    Scheduler scheduler(config);
    Device device(config);

    std::map<int64_t, Job> jobs;
    const int32_t stop = kStop;
    std::vector<int32_t> prompt;
    for (int64_t id = 0; id < 25; ++id) {
        if (id % 3 != 2) prompt.resize(in(1, config.max_seq_len - 1));  // every third is asked for twice
        for (size_t i = 0; i < prompt.size() && id % 3 != 2; ++i)
            prompt[i] = i < 12 ? id % 2 : in(0, kVocabulary - 1);
        const int32_t max_new = in(1, 20);
        const int32_t min_new = in(0, 3);
        const bool has_stop = in(0, 1) == 1;
        scheduler.add({.id = id,
                       .prompt = prompt,
                       .max_new_tokens = max_new,
                       .min_new_tokens = min_new,
                       .expected_new_tokens = in(0, 4),
                       .stop_token_ids = {&stop, has_stop ? 1u : 0u}});
        const int32_t clipped = std::min<int32_t>(max_new, config.max_seq_len - static_cast<int32_t>(prompt.size()));
        jobs[id] = make_job(prompt, clipped, min_new, has_stop);
    }

    std::deque<std::vector<int32_t>> sampled;
    size_t finished = 0, copied = 0;
    for (int steps = 0; scheduler.num_open() > 0 || !sampled.empty(); ++steps) {
        CHECK(steps < 10'000);
        const auto step = scheduler.schedule();
        scheduler.check_integrity();
        if (step != nullptr) {
            CHECK(step->num_tokens > 0 && step->num_tokens <= config.max_step_tokens);
            sampled.push_back(device.run(*step));
            copied += step->copy_source.size();
            for (int32_t i = 0; i < step->num_seqs; ++i) {
                const auto& expected = jobs.at(step->seq_ids[i]).tokens;
                // One token past a stop token may be computed when running ahead; nobody reads it.
                if (step->kv_len[i] - Device::drafted(*step, i) <= std::ssize(expected))
                    device.check_context(*step, i, expected);
            }
        }
        if (std::ssize(sampled) > (step == nullptr ? 0 : steps_ahead)) {
            for (const Finished& f : scheduler.update(sampled.front())) {
                const Job& job = jobs.at(f.seq_id);
                CHECK(std::ranges::equal(f.tokens, std::span(job.tokens).subspan(job.prompt_length)));
                CHECK((f.reason == FinishReason::kStop) == job.stops);
                ++finished;
            }
            scheduler.check_integrity();
            sampled.pop_front();
        }
    }
    CHECK(finished == jobs.size());
    CHECK(scheduler.pool().num_used() == 0);
    return {scheduler.preemptions(), scheduler.accepted_tokens(), copied};
}

void refuses_what_it_cannot_run() {
    const SchedulerConfig good{
        .num_pages = 4, .page_size = 4, .max_slots = 2, .max_step_tokens = 16, .max_seq_len = 30};
    for (const auto spoil :
         {+[](SchedulerConfig& c) { c.num_pages = 0; }, +[](SchedulerConfig& c) { c.page_size = 0; },
          +[](SchedulerConfig& c) { c.max_slots = 0; }, +[](SchedulerConfig& c) { c.max_seq_len = 1; },
          +[](SchedulerConfig& c) { c.max_step_tokens = 1; }}) {
        SchedulerConfig bad = good;
        spoil(bad);
        CHECK_THROWS(Scheduler{bad}, std::invalid_argument);
    }
    Scheduler scheduler(good);
    const std::vector<int32_t> prompt(10, 1);
    scheduler.add({.id = 1, .prompt = prompt, .max_new_tokens = 7});  // 16 computed tokens fill the 4 pages
    CHECK_THROWS(scheduler.add({.id = 1, .prompt = prompt, .max_new_tokens = 1}), std::invalid_argument);
    CHECK_THROWS(scheduler.add({.id = 2, .prompt = prompt, .max_new_tokens = 8}), std::invalid_argument);
    CHECK_THROWS(scheduler.add({.id = 2, .prompt = {}, .max_new_tokens = 1}), std::invalid_argument);
    CHECK_THROWS(scheduler.add({.id = 2, .prompt = prompt, .max_new_tokens = 0}), std::invalid_argument);
    CHECK_THROWS(scheduler.update({}), std::logic_error);
    CHECK(scheduler.schedule() != nullptr);
    CHECK_THROWS(scheduler.update({}), std::invalid_argument);
    CHECK(scheduler.schedule() != nullptr);
    CHECK_THROWS(scheduler.schedule(), std::logic_error);
    CHECK(!scheduler.finish(2) && scheduler.finish(1) && scheduler.num_open() == 0);
    scheduler.check_integrity();
}

}  // namespace

int main() {
    struct Mode {
        int32_t steps_ahead, lookup;
    };
    for (const Mode mode : {Mode{0, 0}, Mode{1, 0}, Mode{0, 5}}) {
        Outcome sum;
        for (uint32_t seed = 0; seed < 60; ++seed) {
            const Outcome outcome = random_jobs(seed, mode.steps_ahead, mode.lookup);
            sum.preemptions += outcome.preemptions;
            sum.accepted += outcome.accepted;
            sum.copied += outcome.copied;
        }
        CHECK(sum.preemptions > 20 && (sum.accepted > 500) == (mode.lookup > 0) && sum.copied > 100);
    }
    refuses_what_it_cannot_run();
}
