// Memory for what is read again and again from end to end: weights.
#pragma once

#include <cstddef>
#include <memory>

namespace batchinfer {

inline constexpr size_t kHugePage = size_t{2} << 20;

// At least `bytes`, aligned to 64, not yet touched; freed with the last pointer into its chunk. Allocations lie one
// after the other in chunks that ask for huge pages: a panel of weights spans ten small ones, and on a virtual machine
// each of them costs a walk through two page tables. Throws std::bad_alloc.
std::shared_ptr<std::byte> huge_pages(size_t bytes);

}  // namespace batchinfer
