#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

// Static shared variables lie in a section of their own (gpu_language.h); the linker marks its ends. But GCC before 14
// leaves those of templates elsewhere (its bug 88061): they are zero at first, and keep what the last block wrote.
extern "C" unsigned char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

namespace simt {
namespace {

// PTX addresses. The dynamic part starts where 128 bytes are the alignment, so that a need for more shows; operands of
// wgmma have 18 bits. Static variables keep their distance from the block object: they are in the same library.
constexpr uint32_t kDynamicBase = 1024 + 128;
constexpr uint32_t kStaticBase = 1u << 31;
constexpr size_t kMostShared = SIMT_SHARED_KB << 10;

// An mbarrier's 64 bits. `bytes` of asynchronous copies are still to come; they may come before they are expected.
struct Phase {
    uint64_t expected : 10, pending : 10, parity : 1, mark : 16;
    int64_t bytes : 27;
};
static_assert(sizeof(Phase) == 8);
constexpr uint16_t kMark = 0xb1a5;

// Red zones are written too, which AddressSanitizer must not see.
__attribute__((no_sanitize_address, noinline)) void fill_raw(unsigned char* from, const unsigned char* to) {
    for (volatile unsigned char* p = from; p != to; ++p) {
        *p = 0xff;
    }
}

}  // namespace

Block& block() {
    static Block the_only;
    return the_only;
}

void Block::run(dim3 grid_, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
    grid = grid_, threads_per_block = threads;
    thread_count_ = static_cast<int>(threads.x * threads.y * threads.z);
    if (threads.y != 1 || threads.z != 1 || thread_count_ % kLanes || thread_count_ > kWarps * kLanes) {
        throw std::runtime_error("a block of " + std::to_string(threads.x) + " x " + std::to_string(threads.y) + " x " +
                                 std::to_string(threads.z) + " threads: one row of whole warps is wanted, at most " +
                                 std::to_string(kWarps * kLanes));
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        throw std::runtime_error("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                 std::to_string(grid.z) + " blocks");
    }
    kernel_ = &kernel;
    for (index.z = 0; index.z < grid.z; ++index.z) {
        for (index.y = 0; index.y < grid.y; ++index.y) {
            for (index.x = 0; index.x < grid.x; ++index.x) {
                run_block(shared_bytes);
            }
        }
    }
}

void Block::run_block(size_t shared_bytes) {
    if (shared_bytes > kMostShared) throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory");
    const std::unique_ptr<unsigned char, decltype(&std::free)> memory(
        static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)), &std::free);
    dynamic_ = memory.get(), dynamic_bytes_ = shared_bytes;
    fill_shared(shared_bytes);
    start_threads();
    while (live_ > 0 && failure_.empty()) {
        const int next = next_ready();
        if (next < 0) {
            if (!finish_late_copies()) failure_ = "the block stands still: " + who_waits();
            continue;
        }
        current_ = next;
        Fiber::switch_fibers(caller_, threads_[current_].fiber);
        current_ = -1;
    }
    if (failure_.empty()) return;
    const std::string message = std::exchange(failure_, {});
    for (Thread& thread : threads_) {  // their stacks hold frames that nobody will leave
        std::destroy_at(&thread);
        std::construct_at(&thread);
    }
    throw std::runtime_error(message);
}

void Block::start_threads() {
    const int warps = thread_count_ / kLanes;
    for (int w = 0; w < kWarps; ++w) {
        warp_of_rank_[w] = w;
    }
    for (int w = warps - 1; w > 0; --w) {
        std::swap(warp_of_rank_[w], warp_of_rank_[draw() % (w + 1)]);
    }
    for (int r = 0; r < warps; ++r) {
        rank_of_warp_[warp_of_rank_[r]] = r;
    }
    last_lane_first_ = draw() & 1, copies_early_ = draw() & 1;
    for (int w = 0; w < warps; ++w) {
        warps_[w].live = warps_[w].ready = kAll;
        warps_[w].arrived = 0;
    }
    ready_ranks_ = static_cast<uint32_t>((uint64_t{1} << warps) - 1);
    live_ = thread_count_;
    barriers_.fill({});
    phase_waits_.clear(), late_.clear();
    for (int t = 0; t < thread_count_; ++t) {
        Thread& thread = threads_[t];
        thread.fiber.prepare(&Block::thread_entry);
        thread.copies.clear(), thread.copy_groups.clear();
        thread.products.clear(), thread.product_groups.clear();
    }
}

void Block::fill_shared(size_t bytes) {
    std::memset(dynamic_, 0xff, bytes);
    fill_raw(__start_simt_shared, __stop_simt_shared);
}

void Block::thread_entry() {
    Fiber::entered();
    Block& b = block();
    (*b.kernel_)();
    b.end_thread();
}

void Block::end_thread() {
    Warp& w = warps_[warp()];
    const LaneMask me = LaneMask{1} << lane();
    if (w.arrived) {
        fail("a thread has ended while lanes of its warp wait in " + std::string(w.site.operation) + " (" +
             w.site.file + ":" + std::to_string(w.site.line) + ")");
    }
    w.live &= ~me;
    w.ready &= ~me;
    if (!w.ready) ready_ranks_ &= ~(1u << rank_of_warp_[warp()]);
    --live_;
    Fiber::switch_fibers(threads_[current_].fiber, caller_);
}

int Block::next_ready() {
    if (!ready_ranks_) return -1;
    const int w = warp_of_rank_[std::countr_zero(ready_ranks_)];
    const LaneMask ready = warps_[w].ready;
    return w * kLanes + (last_lane_first_ ? 63 - std::countl_zero(ready) : std::countr_zero(ready));
}

void Block::go_on() {
    const int next = next_ready(), self = current_;
    if (next == self) return;
    if (next < 0) {
        Fiber::switch_fibers(threads_[self].fiber, caller_);
    } else {
        current_ = next;
        Fiber::switch_fibers(threads_[self].fiber, threads_[next].fiber);
    }
}

void Block::wait() {
    Warp& w = warps_[warp()];
    w.ready &= ~(LaneMask{1} << lane());
    if (!w.ready) ready_ranks_ &= ~(1u << rank_of_warp_[warp()]);
    go_on();
}

void Block::make_ready(int t) {
    const int w = t / kLanes;
    warps_[w].ready |= LaneMask{1} << t % kLanes;
    ready_ranks_ |= 1u << rank_of_warp_[w];
}

bool Block::arrive_in_warp(const Site& site) {
    Warp& w = warps_[warp()];
    if (w.live != kAll) fail(std::string(site.operation) + " of all lanes, but some have ended");
    if (w.arrived && (w.site.line != site.line || w.site.file != site.file || w.site.operation != site.operation)) {
        fail(std::string("lanes of a warp meet in ") + site.operation + " (" + site.file + ":" +
             std::to_string(site.line) + ") and in " + w.site.operation + " (" + w.site.file + ":" +
             std::to_string(w.site.line) + ")");
    }
    thread().site = w.site = site;
    w.arrived |= LaneMask{1} << lane();
    return w.arrived == kAll;
}

void Block::leave_in_warp() {
    Warp& w = warps_[warp()];
    if (w.arrived != kAll) return wait();
    w.arrived = 0;
    w.ready = kAll;
    go_on();
}

void Block::barrier(int name, int expected, const Site& site) {
    NamedBarrier& b = barriers_[name];
    thread().site = site;
    b.waiting[warp()] |= LaneMask{1} << lane();
    if (++b.arrived < expected) return wait();
    for (int w = 0; w < kWarps; ++w) {
        if (!b.waiting[w]) continue;
        warps_[w].ready |= b.waiting[w];
        ready_ranks_ |= 1u << rank_of_warp_[w];
    }
    b = {};
    go_on();
}

void Block::phase_init(uint32_t address, int arrivals) {
    Phase fresh{};
    fresh.expected = fresh.pending = static_cast<uint64_t>(arrivals), fresh.mark = kMark;
    std::memcpy(at(address, sizeof fresh), &fresh, sizeof fresh);
}

void Block::phase_change(uint32_t address, int arrivals, int bytes) {
    Phase phase;
    std::memcpy(&phase, at(address, sizeof phase), sizeof phase);
    if (phase.mark != kMark) fail("arrives at an mbarrier that nobody has initialised");
    phase.pending -= static_cast<uint64_t>(arrivals), phase.bytes += bytes;
    if (phase.pending == 0 && phase.bytes == 0) {
        phase.pending = phase.expected;
        phase.parity ^= 1;
        std::erase_if(phase_waits_, [&](const PhaseWait& waiting) {
            if (waiting.address != address) return false;
            make_ready(waiting.thread);
            return true;
        });
    }
    std::memcpy(at(address, sizeof phase), &phase, sizeof phase);
}

void Block::phase_wait(uint32_t address, uint32_t parity, const Site& site) {
    for (;;) {
        Phase phase;
        std::memcpy(&phase, at(address, sizeof phase), sizeof phase);
        if (phase.mark != kMark) fail("waits for an mbarrier that nobody has initialised");
        if (phase.parity != parity) return;
        thread().site = site;
        phase_waits_.push_back({current_, address});
        wait();
    }
}

void Block::phase_change_after_copies(uint32_t address, int arrivals, int bytes) {
    if (copies_early_) return phase_change(address, arrivals, bytes);
    at(address, sizeof(Phase));
    late_.push_back({current_, thread().copies.size(), address, arrivals, bytes});
}

bool Block::finish_late_copies() {
    if (late_.empty()) return false;
    const size_t chosen = draw() % late_.size();
    // A thread's copies end in order, as far as its arrivals can tell.
    const auto mine = std::find_if(late_.begin(), late_.end(),
                                   [&](const LateArrival& l) { return l.thread == late_[chosen].thread; });
    const LateArrival arrival = *mine;
    late_.erase(mine);
    do_copies(threads_[arrival.thread], arrival.copies);
    for (LateArrival& later : late_) {
        if (later.thread == arrival.thread) later.copies -= arrival.copies;
    }
    phase_change(arrival.barrier, arrival.arrivals, arrival.bytes);
    return true;
}

void Block::copy(uint32_t to, const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("an asynchronous copy from an address that 16 does not divide");
    if (to % 16) fail("an asynchronous copy to an address that 16 does not divide");
    at(to, 16);
    thread().copies.push_back({to, from});
    if (copies_early_) {
        do_copies(thread(), thread().copies.size());
    }
}

void Block::finish_copies(size_t groups_left) {
    Thread& t = thread();
    if (t.copy_groups.size() <= groups_left) return;
    const size_t groups = t.copy_groups.size() - groups_left, count = t.copy_groups[groups - 1];
    t.copy_groups.erase(t.copy_groups.begin(), t.copy_groups.begin() + groups);
    for (size_t& end : t.copy_groups) {
        end -= count;
    }
    do_copies(t, count);
}

void Block::do_copies(Thread& thread, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const Copy& c = thread.copies[i];
        unsigned char* to = at(c.to, 16);
        if (c.from) {
            std::memcpy(to, c.from, 16);
        } else {
            std::memset(to, 0, 16);
        }
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
}

uint32_t Block::address_of(const void* pointer) const {
    const auto* p = static_cast<const unsigned char*>(pointer);
    if (p >= dynamic_ && p < dynamic_ + dynamic_bytes_) return kDynamicBase + static_cast<uint32_t>(p - dynamic_);
    return kStaticBase + static_cast<uint32_t>(p - reinterpret_cast<const unsigned char*>(this));
}

unsigned char* Block::at(uint32_t address, size_t bytes) const {
    if (address >= kStaticBase / 2) {
        const auto offset = static_cast<int32_t>(address - kStaticBase);
        return const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(this)) + offset;
    }
    if (address >= kDynamicBase && address - kDynamicBase + bytes <= dynamic_bytes_) {
        return dynamic_ + (address - kDynamicBase);
    }
    block().fail("a shared-memory access of " + std::to_string(bytes) + " bytes at " +
                 std::to_string(static_cast<int64_t>(address) - kDynamicBase) + " of the " +
                 std::to_string(dynamic_bytes_) + " that the block has");
}

void Block::fail(const std::string& message) {
    if (current_ < 0) std::terminate();  // late copies were checked when they were started
    failure_ = "block " + std::to_string(index.x) + ", thread " + std::to_string(current_) + ": " + message;
    Fiber::switch_fibers(threads_[current_].fiber, caller_);
    std::abort();  // nobody comes back
}

std::string Block::who_waits() const {
    std::map<std::string, std::pair<int, int>> places;  // place -> how many, the first
    for (int t = 0; t < thread_count_; ++t) {
        if (!(warps_[t / kLanes].live >> t % kLanes & 1)) continue;
        const Site& s = threads_[t].site;
        const std::string place = std::string(s.operation) + " (" + s.file + ":" + std::to_string(s.line) + ")";
        const auto [found, fresh] = places.try_emplace(place, 0, t);
        ++found->second.first;
    }
    std::string text =
        std::to_string(thread_count_ - live_) + " threads of block " + std::to_string(index.x) + " have ended";
    for (const auto& [place, count] : places) {
        text += "; " + std::to_string(count.first) + ", thread " + std::to_string(count.second) +
                " the first, wait in " + place;
    }
    return text;
}

// SplitMix64 (Steele, Lea & Flood 2014).
uint64_t Block::draw() {
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

}  // namespace simt

extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) {
    simt::block().draw_from(seed);
}
