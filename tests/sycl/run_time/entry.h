// The kernels as free functions, which run-time compilation can name.
#pragma once

#include "exact.h"
#include "local_words.h"
#include "sycl/attention.h"
#include "sycl/choose.h"
#include "sycl/feed_back.h"
#include "sycl/logprobs.h"
#include "sycl/pages.h"
#include "sycl/penalties.h"
#include "sycl/rope.h"
#include "sycl/rows.h"

namespace batchinfer::gpu {

template <class Kernel>
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<2>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::sub_group_size<kSubGroup>)) void entry(
    typename Kernel::Args args, LocalWords local) {
    Kernel::run(sycl::ext::oneapi::this_work_item::get_nd_item<2>(),
                reinterpret_cast<typename Kernel::Local&>(local[0]), args);
}

}  // namespace batchinfer::gpu
