// Host time of schedule() + update() with 2,000 running sequences, one JSON line per case:
//   {"name": ..., "running": ..., "steps": ..., "us_per_step": ..., "us_p90": ..., "wall_us_per_step": ..., ...}
// us_* is the thread's CPU time, median and 90th percentile over the steps; on an idle machine wall time is the same.
// The device is left out: each sampled token is a number drawn from a fixed sequence. An argument runs only the cases
// whose name contains it.

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "engine/scheduler.h"

using namespace batchinfer;

namespace {

constexpr int32_t kRunning = 2000;
constexpr int32_t kStop = 1;

double micros(clockid_t clock) {
    timespec now{};
    clock_gettime(clock, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

/// Microseconds between two moments, of CPU and on the wall.
struct Spent {
    double cpu = -micros(CLOCK_THREAD_CPUTIME_ID);
    double wall = -micros(CLOCK_MONOTONIC);
    void pause() {
        cpu += micros(CLOCK_THREAD_CPUTIME_ID);
        wall += micros(CLOCK_MONOTONIC);
    }
    void resume() {
        cpu -= micros(CLOCK_THREAD_CPUTIME_ID);
        wall -= micros(CLOCK_MONOTONIC);
    }
};

struct Case {
    std::string name;
    int32_t shared_prefix;  // tokens that all prompts begin with
    int32_t own_prompt;     // tokens of each prompt after that
    int32_t min_new;        // lengths are uniform in min_new .. max_new, expected to be max_new
    int32_t max_new;
    int32_t num_pages;
    int32_t steps_ahead;
};

class Workload {
  public:
    explicit Workload(const Case& parameters)
        : case_(parameters),
          scheduler_({.num_pages = parameters.num_pages,
                      .page_size = 16,
                      .max_slots = kRunning,
                      .max_step_tokens = 8192,
                      .max_seq_len = 4096}) {}

    /// One step; returns the time spent in the scheduler.
    Spent step() {
        while (scheduler_.num_waiting() < 500)
            add();
        Spent spent;
        const auto step = scheduler_.schedule();
        spent.pause();
        sampled_.push_back(std::vector<int32_t>(step->num_samples));
        for (int32_t i = 0; i < step->num_samples; ++i) {
            const int64_t wanted = length(step->sample_seq[i]);
            sampled_.back()[i] =
                step->sample_count[i] + 1 >= wanted ? kStop : 2 + static_cast<int32_t>(random_() % 50000);
        }
        tokens += step->num_tokens;
        if (std::ssize(sampled_) > case_.steps_ahead) {
            spent.resume();
            scheduler_.update(sampled_.front());
            spent.pause();
            sampled_.pop_front();
        }
        return spent;
    }

    const Scheduler& scheduler() const { return scheduler_; }
    int64_t tokens = 0;

  private:
    int64_t length(int64_t id) const {
        return case_.min_new +
               static_cast<int64_t>(static_cast<uint64_t>(id) * 2654435761u % (case_.max_new - case_.min_new + 1));
    }

    void add() {
        std::vector<int32_t> prompt(case_.shared_prefix, 7);
        for (int32_t i = 0; i < case_.own_prompt; ++i)
            prompt.push_back(2 + static_cast<int32_t>(random_() % 50000));
        const int32_t stop = kStop;
        scheduler_.add(
            {.id = next_id_++, .prompt = prompt, .max_new_tokens = case_.max_new, .stop_token_ids = {&stop, 1}});
    }

    Case case_;
    Scheduler scheduler_;
    std::deque<std::vector<int32_t>> sampled_;
    std::mt19937_64 random_{1};
    int64_t next_id_ = 0;
};

double quantile(std::vector<double> values, double q) {
    std::ranges::sort(values);
    return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

void run(const Case& parameters, int steps) {
    Workload work(parameters);
    for (int i = 0; i < 400; ++i)
        work.step();
    work.tokens = 0;
    std::vector<double> cpu;
    std::vector<double> wall;
    double running = 0;
    for (int i = 0; i < steps; ++i) {
        const Spent spent = work.step();
        cpu.push_back(spent.cpu);
        wall.push_back(spent.wall);
        running += work.scheduler().num_running();
    }
    std::printf(
        "{\"name\": \"%s\", \"running\": %.0f, \"steps\": %d, \"us_per_step\": %.1f, \"us_p90\": %.1f, "
        "\"wall_us_per_step\": %.1f, \"tokens_per_step\": %.0f, \"pages_used\": %d, \"preemptions\": %lld}\n",
        parameters.name.c_str(), running / steps, steps, quantile(cpu, 0.5), quantile(cpu, 0.9), quantile(wall, 0.5),
        static_cast<double>(work.tokens) / steps, work.scheduler().pool().num_used(),
        static_cast<long long>(work.scheduler().preemptions()));
}

}  // namespace

int main(int argc, char** argv) {
    const int32_t plenty = 400'000;
    const Case cases[] = {
        {"decode", 0, 200, 3000, 3000, plenty, 0},
        {"decode, one step ahead", 0, 200, 3000, 3000, plenty, 1},
        {"mixed: 300 prompt tokens, 64-256 new", 0, 300, 64, 256, plenty, 0},
        {"mixed, one step ahead", 0, 300, 64, 256, plenty, 1},
        {"mixed, shared prefix of 512", 512, 64, 64, 256, plenty, 0},
        {"mixed, limited by pages", 0, 300, 64, 256, 48'000, 0},
        {"admission: 20 prompt tokens, 1-16 new", 0, 20, 1, 16, plenty, 0},
        {"admission, shared prefix of 512", 512, 20, 1, 16, plenty, 0},
    };
    for (const Case& parameters : cases) {
        if (argc < 2 || parameters.name.find(argv[1]) != std::string::npos) run(parameters, 1000);
    }
}
