// Packed weights in an anonymous file (memfd) that the ranks of a node map: one fills it, the others read.
#pragma once

#include <cstddef>
#include <memory>

#include "cpu/parallel.h"

namespace batchinfer {

class SharedMemory {
  public:
    // Maps the first `bytes` of the file `fd`, aligned to huge pages; the descriptor remains the caller's. Throws
    // std::system_error.
    SharedMemory(int fd, size_t bytes, bool writable);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }

    // Takes huge pages for what lies below `end` and has none yet, where the kernel can; they go round the threads of
    // `pool`, and so round the NUMA domains of these.
    void populate(size_t end, ThreadPool& pool);

    // A pointer into `memory` that keeps it mapped.
    static std::shared_ptr<std::byte> part(const std::shared_ptr<SharedMemory>& memory, size_t offset);

  private:
    size_t bytes_;
    void* room_ = nullptr;
    std::byte* data_ = nullptr;
    size_t populated_ = 0;
};

}  // namespace batchinfer
