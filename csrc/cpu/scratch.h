// Working memory of the calling thread, kept between calls: an allocation of this size is a system call and page
// faults.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace batchinfer {

// At least `bytes`, aligned to 64. The next call on this thread may return the same memory.
inline std::byte* thread_scratch(size_t bytes) {
    struct Free {
        void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<std::byte[], Free> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
        size = bytes;
    }
    return memory.get();
}

}  // namespace batchinfer
