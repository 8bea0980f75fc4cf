// One block of a kernel at a time, each of its threads a fiber; what a GPU's multiprocessor does, and what it forbids.
//
// A thread runs until it must wait: for the other lanes of its warp, for a barrier, or for the end of the kernel. Then
// the ready thread of the warp with the highest priority goes on; priorities are drawn anew for each block. A warp so
// gets as far ahead of the others as the barriers allow, which is what shows a missing one (Burckhardt et al. 2010,
// "A randomized scheduler with probabilistic guarantees of finding bugs"). Asynchronous copies happen, as the draw
// says, when they are started or at the last moment that the waits allow; wgmma products always at the last.
//
// What is an error here, reported as std::runtime_error by the launch, with the place in the source:
//   - threads that wait for each other or for somebody who has ended;
//   - lanes of a warp that meet in different operations, or without all of them;
//   - a shared-memory address outside the block's; an address that an access of its width may not have.
// Other addresses are AddressSanitizer's business, as dynamic shared memory is allocated for each block, and indices of
// static shared arrays UndefinedBehaviorSanitizer's. Shared memory is filled with 0xff (NaN, -1) before a block starts.
//
// Not modelled: the weak order of memory, blocks that run at the same time, clusters, register limits, proxy fences. A
// race is seen only where one of the orders that are drawn gives a wrong result.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

inline constexpr int kLanes = SIMT_LANES;     // of a warp: 32 or 64
inline constexpr int kWarps = 1024 / kLanes;  // of a block, at most
inline constexpr int kPayload = 64;           // bytes that a lane may bring to an operation of its warp

using LaneMask = uint64_t;  // bit i: lane i
inline constexpr LaneMask kAll = ~LaneMask{0} >> (64 - kLanes);

// Where in the source a thread waits, and in what.
struct Site {
    const char* operation = "";
    const char* file = "";
    int line = 0;
};

// A 16-byte asynchronous copy to shared memory; zeros if `from` is null.
struct Copy {
    uint32_t to;
    const void* from;
};

// A warpgroup product that is under way: c (64 x 2 * count) = or += a (64 x 16) b (16 x 2 * count).
struct Product {
    float* c;
    int count;  // numbers of c in a thread
    bool add, a_in_registers, b_transposed;
    uint64_t a_operand, b_operand;
    uint32_t a[4];
    float (*number)(uint16_t bits);  // of an element
};

struct Thread {
    Fiber fiber;
    Site site;  // of the last wait
    std::vector<Copy> copies;
    std::vector<size_t> copy_groups;  // ends of committed groups in `copies`
    std::vector<Product> products;
    std::vector<size_t> product_groups;
};

struct Warp {
    LaneMask live = 0, ready = 0, arrived = 0;  // lanes; arrived: in the operation that the warp does together
    Site site;
    alignas(16) unsigned char in[kLanes * kPayload];
    alignas(16) unsigned char out[kLanes * kPayload];
};

class Block {
  public:
    // Runs all blocks of a grid, one after the other.
    void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

    // Of the running thread.
    dim3 thread_index() const { return {static_cast<unsigned>(current_), 0, 0}; }
    int lane() const { return current_ % kLanes; }
    Thread& thread() { return threads_[current_]; }
    Thread& thread_of_warp(int lane) { return threads_[current_ / kLanes * kLanes + lane]; }
    int warp() const { return current_ / kLanes; }

    // All lanes of the warp bring `mine`; the last to come fills the lanes' results; each leaves with its own.
    template <class Out, class In, class Complete>
    Out together(const Site& site, const In& mine, Complete complete) {
        static_assert(sizeof(In) <= kPayload && sizeof(Out) <= kPayload);
        Warp& w = warps_[warp()];
        std::memcpy(w.in + lane() * sizeof(In), &mine, sizeof(In));
        if (arrive_in_warp(site)) complete(reinterpret_cast<const In*>(w.in), reinterpret_cast<Out*>(w.out));
        leave_in_warp();
        Out out;
        std::memcpy(&out, w.out + lane() * sizeof(Out), sizeof(Out));
        return out;
    }

    // Waits for `expected` threads to come to barrier `name`.
    void barrier(int name, int expected, const Site& site);
    int thread_count() const { return thread_count_; }

    // mbarriers: 64 bits in shared memory, which count arrivals, and bytes if told to expect some, down and then turn
    // their phase.
    void phase_init(uint32_t address, int arrivals);
    void phase_arrive(uint32_t address, int arrivals = 1, int expected_bytes = 0) {
        phase_change(address, arrivals, expected_bytes);
    }
    void phase_wait(uint32_t address, uint32_t parity, const Site& site);
    void phase_arrive_after_copies(uint32_t address) { phase_change_after_copies(address, 1, 0); }
    void phase_count_after_copies(uint32_t address, int bytes) { phase_change_after_copies(address, 0, -bytes); }

    void copy(uint32_t to, const void* from);
    void commit_copies() { thread().copy_groups.push_back(thread().copies.size()); }
    void finish_copies(size_t groups_left);

    // Shared memory by the 32-bit addresses that PTX uses.
    uint32_t address_of(const void* pointer) const;
    unsigned char* at(uint32_t address, size_t bytes) const;
    unsigned char* dynamic_shared() const { return dynamic_; }

    void draw_from(uint64_t seed) { random_ = seed; }
    [[noreturn]] void fail(const std::string& message);  // of the running thread

    dim3 grid, threads_per_block, index;

  private:
    struct NamedBarrier {
        int arrived = 0;
        std::array<LaneMask, kWarps> waiting{};
    };
    struct PhaseWait {
        int thread;
        uint32_t address;
    };
    struct LateArrival {
        int thread;
        size_t copies;  // how many of the thread's must be done
        uint32_t barrier;
        int arrivals, bytes;
    };

    void run_block(size_t shared_bytes);
    void start_threads();
    void fill_shared(size_t bytes);
    bool arrive_in_warp(const Site& site);
    void leave_in_warp();
    void wait();       // gives up the turn; the running thread is not ready
    void go_on();      // lets the ready thread of the highest priority run, maybe the same
    int next_ready();  // -1: none
    void make_ready(int thread);
    void phase_change(uint32_t address, int arrivals, int bytes);
    void phase_change_after_copies(uint32_t address, int arrivals, int bytes);
    bool finish_late_copies();
    void do_copies(Thread& thread, size_t count);
    void end_thread();
    std::string who_waits() const;
    static void thread_entry();
    uint64_t draw();

    std::array<Thread, kWarps * kLanes> threads_;
    std::array<Warp, kWarps> warps_;
    std::array<NamedBarrier, 16> barriers_;
    std::vector<PhaseWait> phase_waits_;
    std::vector<LateArrival> late_;
    Fiber caller_;
    const std::function<void()>* kernel_ = nullptr;
    std::string failure_;
    unsigned char* dynamic_ = nullptr;
    size_t dynamic_bytes_ = 0;
    int thread_count_ = 0, live_ = 0, current_ = -1;
    uint32_t ready_ranks_ = 0;  // bit r: the warp of rank r has a ready lane; the lowest has the highest priority
    std::array<int, kWarps> warp_of_rank_{}, rank_of_warp_{};
    bool last_lane_first_ = false, copies_early_ = false;
    uint64_t random_ = 1;
};

Block& block();

}  // namespace simt
