#include "cpu/huge_pages.h"

#include <cstdint>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace batchinfer {
namespace {

// Small beside any model; a chunk takes memory only as it is touched.
constexpr size_t kChunk = 64 * kHugePage;

size_t round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

std::shared_ptr<std::byte> new_chunk(size_t bytes) {
    auto* memory = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kHugePage}));
#ifdef __linux__
    madvise(memory, bytes, MADV_HUGEPAGE);  // a kernel without them gives small ones
#endif
    return {memory, [](std::byte* p) { ::operator delete(p, std::align_val_t{kHugePage}); }};
}

}  // namespace

std::shared_ptr<std::byte> huge_pages(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<std::byte> open;  // the chunk that has room
    static size_t size = 0, used = 0;
    const std::lock_guard lock(mutex);
    bytes = round_up(bytes, 64);
    std::shared_ptr<std::byte> chunk = open.lock();
    if (!chunk || used + bytes > size) {
        size = round_up(bytes, kChunk);
        used = 0;
        chunk = new_chunk(size);
        open = chunk;
    }
    std::shared_ptr<std::byte> part(chunk, chunk.get() + used);
    used += bytes;
    return part;
}

}  // namespace batchinfer
