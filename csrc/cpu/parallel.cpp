#include "cpu/parallel.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace batchinfer {
namespace {

// Between two ops of a step the host needs 5-20 us of Python; between two steps about 100 us.
constexpr std::chrono::microseconds kSpin{100};

std::vector<int> affinity() {
    std::vector<int> cpus;
#ifdef __linux__
    for (int capacity = 1024; capacity <= 1 << 20; capacity *= 2) {  // the kernel's mask may be wider than cpu_set_t
        cpu_set_t* set = CPU_ALLOC(capacity);
        const size_t bytes = CPU_ALLOC_SIZE(capacity);
        if (sched_getaffinity(0, bytes, set) == 0) {
            for (int cpu = 0; cpu < capacity; ++cpu) {
                if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
            }
            CPU_FREE(set);
            break;
        }
        CPU_FREE(set);
    }
#endif
    return cpus;
}

void pin(std::thread& thread, int cpu) {
#ifdef __linux__
    cpu_set_t* set = CPU_ALLOC(cpu + 1);
    const size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
    CPU_ZERO_S(bytes, set);
    CPU_SET_S(cpu, bytes, set);
    pthread_setaffinity_np(thread.native_handle(), bytes, set);  // a container may forbid it: then the OS places us
    CPU_FREE(set);
#endif
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until a condition over atomics holds: spins, then sleeps. Whoever makes it true calls wake() afterwards.
class Gate {
  public:
    template <class Condition>
    void wait(std::chrono::microseconds spin, Condition holds) {
        const auto deadline = std::chrono::steady_clock::now() + spin;
        do {
            for (int i = 0; i < 64; ++i) {
                if (holds()) return;
                pause();
            }
            // Whom we wait for may be queued behind us on this CPU: on a busy machine the median of an empty job was
            // 208 us without this, and 3 us with it. An idle machine does not get here: it takes 0.3 us.
            std::this_thread::yield();
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock lock(mutex_);
        ++sleepers_;  // before the condition is read again, as wake() reads it after the condition was written
        wakeup_.wait(lock, holds);
        --sleepers_;
    }

    void wake() {
        if (sleepers_ == 0) return;  // the usual case: everybody spins, no system call
        {
            std::lock_guard lock(mutex_);
        }
        wakeup_.notify_all();
    }

  private:
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wakeup_;
};

}  // namespace

int available_cpus() {
    const size_t cpus = affinity().size();
    if (cpus > 0) return static_cast<int>(cpus);
    const unsigned all = std::thread::hardware_concurrency();
    return all > 0 ? static_cast<int>(all) : 1;
}

// All atomics are used with sequential consistency, which Gate relies on.
struct ThreadPool::Shared {
    std::chrono::microseconds spin{0};
    Call call = nullptr;
    void* job = nullptr;
    bool stop = false;
    std::atomic<bool> running{false};
    alignas(64) std::atomic<uint64_t> epoch{0};  // number of the current job; a change starts the workers
    Gate start;
    alignas(64) std::atomic<int> unfinished{0};  // workers still in the current job
    Gate finish;
    std::mutex error_mutex;
    std::exception_ptr error;

    void call_guarded(int thread, int threads) {
        try {
            call(job, thread, threads);
        } catch (...) {
            std::lock_guard lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    }
};

ThreadPool::ThreadPool(int threads) {
    if (threads < 0) {
        throw std::invalid_argument("threads=" + std::to_string(threads) +
                                    " is not allowed: give 0 (the CPUs of this process) or a positive number");
    }
    const std::vector<int> cpus = affinity();
    size_ = threads > 0 ? threads : available_cpus();
    if (size_ == 1) return;
    shared_ = std::make_unique<Shared>();
    // More threads than CPUs: spinning would take the CPU from the thread that is waited for.
    shared_->spin = cpus.empty() || static_cast<size_t>(size_) <= cpus.size() ? kSpin : std::chrono::microseconds{0};
    const bool pinned = static_cast<size_t>(size_) == cpus.size();
    for (int thread = 1; thread < size_; ++thread) {
        workers_.emplace_back([this, thread] { work(thread); });
        if (pinned) pin(workers_.back(), cpus[thread]);
    }
}

ThreadPool::~ThreadPool() {
    if (workers_.empty()) return;
    shared_->stop = true;
    ++shared_->epoch;
    shared_->start.wake();
    for (std::thread& worker : workers_)
        worker.join();
}

void ThreadPool::dispatch(Call call, void* job) {
    Shared& s = *shared_;
    if (s.running.exchange(true)) {
        throw std::logic_error(
            "the thread pool runs one job at a time: an op was called while another one was running");
    }
    s.call = call;
    s.job = job;
    s.unfinished = size_ - 1;
    ++s.epoch;
    s.start.wake();
    s.call_guarded(0, size_);
    s.finish.wait(s.spin, [&] { return s.unfinished == 0; });
    const std::exception_ptr error = std::exchange(s.error, nullptr);
    s.running = false;
    if (error) std::rethrow_exception(error);
}

void ThreadPool::work(int thread) {
    Shared& s = *shared_;
    for (uint64_t seen = 0;; ++seen) {
        s.start.wait(s.spin, [&] { return s.epoch != seen; });
        if (s.stop) return;
        s.call_guarded(thread, size_);
        if (--s.unfinished == 0) s.finish.wake();
    }
}

}  // namespace batchinfer
