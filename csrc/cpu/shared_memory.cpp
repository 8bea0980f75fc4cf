#include "cpu/shared_memory.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <system_error>

#include "cpu/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace batchinfer {

#ifdef __linux__

namespace {

// At a time: a call of madvise waits for all CPUs of the node.
constexpr size_t kPopulated = 32 * kHugePage;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack

[[noreturn]] void fail() {
    throw std::system_error(errno, std::generic_category(), "mmap of shared weights");
}

}  // namespace

SharedMemory::SharedMemory(int fd, size_t bytes, bool writable) : bytes_(bytes) {
    // Room with an aligned address in it; what stays over is address space and no memory.
    room_ = mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room_ == MAP_FAILED) fail();
    auto* start = static_cast<std::byte*>(room_);
    data_ = start + -reinterpret_cast<uintptr_t>(start) % kHugePage;
    const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap(data_, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        const int error = errno;
        munmap(room_, bytes + kHugePage);
        errno = error;
        fail();
    }
}

SharedMemory::~SharedMemory() {
    munmap(room_, bytes_ + kHugePage);
}

// A page of each huge one is touched, and the kernel asked to make it one: it has to clear it, but copies nothing, and
// half a GB takes 0.04 s. As small pages, each of which is a fault, it takes 0.3 s, and is read at three quarters of
// the speed. (Whether a file in memory gets huge pages by itself is for the administrator to say; Linux says no.)
void SharedMemory::populate(size_t end, ThreadPool& pool) {
    while (populated_ < std::min(end, bytes_)) {
        const size_t begin = populated_;
        populated_ = std::min(begin + kPopulated, bytes_);
        pool.run([&](int thread, int threads) {
            for (size_t page = begin + thread * kHugePage; page < populated_; page += threads * kHugePage)
                data_[page] = std::byte{0};
        });
        madvise(data_ + begin, populated_ - begin, kCollapse);  // fails on Linux before 6.1: the pages are small then
    }
}

#else

SharedMemory::SharedMemory(int, size_t, bool) {
    throw std::runtime_error("weights are shared on Linux only");
}
SharedMemory::~SharedMemory() = default;
void SharedMemory::populate(size_t, ThreadPool&) {}

#endif

std::shared_ptr<std::byte> SharedMemory::part(const std::shared_ptr<SharedMemory>& memory, size_t offset) {
    return {memory, memory->data() + offset};
}

}  // namespace batchinfer
