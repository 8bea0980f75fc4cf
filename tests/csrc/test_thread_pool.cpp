#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/parallel.h"

using namespace batchinfer;

namespace {

void every_thread_runs_each_job_once() {
    for (const int threads : {1, 2, 3, 7}) {
        ThreadPool pool(threads);
        CHECK(pool.size() == threads);
        std::vector<int> calls(threads);
        for (int job = 1; job <= 300; ++job) {
            pool.run([&](int thread, int num_threads) {
                CHECK(num_threads == threads);
                ++calls[thread];
            });
            for (const int n : calls)
                CHECK(n == job);  // run() returns after the last one
        }
    }
}

void parallel_for_covers_the_range_once() {
    for (const int threads : {1, 2, 3}) {
        ThreadPool pool(threads);
        for (const int64_t n : {0, 1, 2, 3, 10, 1001}) {
            for (const int64_t grain : {1, 4, 1000}) {
                std::vector<int> visits(n);
                std::atomic<int> parts{0};
                pool.parallel_for(
                    n,
                    [&](int64_t begin, int64_t end, int thread) {
                        CHECK(0 <= thread && thread < threads);
                        CHECK(end - begin >= std::min(n, grain));
                        for (int64_t i = begin; i < end; ++i)
                            ++visits[i];
                        ++parts;
                    },
                    grain);
                CHECK(parts <= threads);
                for (const int v : visits)
                    CHECK(v == 1);
            }
        }
    }
}

void an_exception_reaches_the_caller_and_the_pool_lives_on() {
    for (const int threads : {1, 3}) {
        ThreadPool pool(threads);
        for (int bad = 0; bad < threads; ++bad) {
            std::string message;
            try {
                pool.run([&](int thread, int) {
                    if (thread == bad) throw std::runtime_error("thread " + std::to_string(thread));
                });
            } catch (const std::runtime_error& e) {
                message = e.what();
            }
            CHECK(message == "thread " + std::to_string(bad));
        }
        std::atomic<int> calls{0};
        pool.run([&](int, int) { ++calls; });
        CHECK(calls == threads);
    }
}

void one_job_at_a_time() {
    ThreadPool pool(2);
    CHECK_THROWS(pool.run([&](int thread, int) {
        if (thread == 1) pool.run([](int, int) {});
    }),
                 std::logic_error);
    pool.run([](int, int) {});
}

void sleeping_workers_wake_up() {
    ThreadPool pool(2);
    std::atomic<int> calls{0};
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // longer than workers spin
        pool.run([&](int, int) { ++calls; });
    }
    CHECK(calls == 40);
}

void every_task_is_taken_once() {
    for (const int threads : {1, 2, 3}) {
        ThreadPool pool(threads);
        for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
            TaskShares shares(tasks, threads);
            std::vector<std::atomic<int>> taken(tasks);
            pool.run([&](int thread, int) {
                for (int64_t task = shares.take(thread); task >= 0; task = shares.take(thread))
                    ++taken[task];
            });
            for (const std::atomic<int>& n : taken)
                CHECK(n == 1);
        }
    }
    TaskShares shares(5, 2);  // 0 1 | 2 3 4
    for (const int64_t task : {2, 3, 4, 0, 1, -1})
        CHECK(shares.take(1) == task);
    CHECK(shares.goes_on(0, 0) && !shares.goes_on(0, 1));
    CHECK(shares.goes_on(1, 2) && !shares.goes_on(1, 4) && !shares.goes_on(1, 0));
}

}  // namespace

int main() {
    CHECK_THROWS(ThreadPool(-1), std::invalid_argument);
    CHECK(ThreadPool(0).size() == available_cpus());
    every_thread_runs_each_job_once();
    parallel_for_covers_the_range_once();
    an_exception_reaches_the_caller_and_the_pool_lives_on();
    one_job_at_a_time();
    sleeping_workers_wake_up();
    every_task_is_taken_once();
}
