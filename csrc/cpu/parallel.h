// Our own persistent thread pool.
//
// Not OpenMP: torch brings its own copy of an OpenMP runtime, and two runtimes that both spin after a parallel region
// take each other's cores. An op of a decode step lasts 10-1000 us, so workers wait for the next one by spinning
// for a bounded time and then sleep: an idle rank costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace batchinfer {

// How many CPUs this process may use (its affinity mask, which is what Slurm and mpiexec set), at least 1.
int available_cpus();

class ThreadPool {
  public:
    // `threads` counts the caller of run(); 0 means available_cpus(). Workers are pinned, one to a CPU, only when they
    // fill the affinity mask exactly: with fewer threads than CPUs, several processes that share a mask would
    // all be pinned to its first CPUs. The caller is never pinned, because threads that it starts
    // later (torch, tokenizers) would inherit the pin. Throws std::invalid_argument if threads < 0.
    explicit ThreadPool(int threads = 0);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Calls f(thread, num_threads) once on every thread, the caller being thread 0, and returns when all are done. The
    // first exception thrown in f is rethrown here. One job at a time: a second caller, or f itself, calling run()
    // meanwhile gets std::logic_error. With size() == 1 this is a plain call.
    template <class F>
    void run(F&& f) {
        if (size_ == 1) {
            f(0, 1);
            return;
        }
        using Job = std::remove_reference_t<F>;
        dispatch([](void* job, int thread, int threads) { (*static_cast<Job*>(job))(thread, threads); },
                 const_cast<void*>(static_cast<const void*>(&f)));
    }

    // Calls f(begin, end, thread) with [0, n) split evenly over the threads; threads without work are not called.
    // No thread gets fewer than `grain` items, and below 2 * grain items the caller does all of it without
    // waking anybody. The split depends on n, grain and size() alone.
    template <class F>
    void parallel_for(int64_t n, F&& f, int64_t grain = 1) {
        if (n <= 0) return;
        const int64_t parts = n / grain < size_ ? n / grain : size_;
        if (parts <= 1) {
            f(int64_t{0}, n, 0);
            return;
        }
        run([&](int thread, int) {
            if (thread >= parts) return;
            const int64_t begin = n * thread / parts, end = n * (thread + 1) / parts;
            f(begin, end, thread);
        });
    }

  private:
    using Call = void (*)(void* job, int thread, int threads);
    struct Shared;  // what the workers see

    void dispatch(Call call, void* job);
    void work(int thread);

    int size_ = 1;
    std::unique_ptr<Shared> shared_;
    std::vector<std::thread> workers_;
};

// Tasks [0, n) of a job: every thread goes through a share of its own, in order, and then helps with the others'.
class TaskShares {
  public:
    TaskShares(int64_t n, int threads) : shares_(threads) {
        for (int t = 0; t < threads; ++t) {
            shares_[t].next = n * t / threads;
            shares_[t].end = n * (t + 1) / threads;
        }
    }

    // A task that nobody has taken; -1: none is left.
    int64_t take(int thread) {
        const int threads = static_cast<int>(shares_.size());
        for (int i = 0; i < threads; ++i) {
            Share& share = shares_[(thread + i) % threads];
            if (share.next >= share.end) continue;
            if (const int64_t task = share.next++; task < share.end) return task;
        }
        return -1;
    }

    // Whether the task after `task` is of the thread's own share.
    bool goes_on(int thread, int64_t task) const { return task + 1 < shares_[thread].end && task >= first(thread); }

  private:
    int64_t first(int thread) const { return thread == 0 ? 0 : shares_[thread - 1].end; }

    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares_;
};

}  // namespace batchinfer
