// Room for a kernel's Local in words of the largest alignment: the front end of 2026.2 crashes on a local_accessor of a
// type that depends on a template's parameter.
#pragma once

#include <sycl/sycl.hpp>

namespace batchinfer::gpu {

using LocalWords = sycl::local_accessor<sycl::uint4, 1>;

}  // namespace batchinfer::gpu
