// How a kernel is put on the caller's queue (torch.xpu's, in order). tests/sycl has its own, for run-time compilation.
#pragma once

#include "gpu/dispatch.h"
#include "sycl/device.h"

namespace batchinfer::gpu {

inline int64_t compute_units(Stream stream) {
    return static_cast<sycl::queue*>(stream)->get_device().get_info<sycl::info::device::max_compute_units>();
}

// rows x pieces groups of Kernel::kThreads work-items.
template <class Kernel>
void launch(Stream stream, int64_t rows, int64_t pieces, const typename Kernel::Args& args) {
    const sycl::range<2> groups(rows, pieces), threads(1, Kernel::kThreads);
    static_cast<sycl::queue*>(stream)->submit([&](sycl::handler& handler) {
        const sycl::local_accessor<typename Kernel::Local, 1> local(1, handler);
        handler.parallel_for(sycl::nd_range<2>(groups * threads, threads),
                             [=](Item item)
                                 [[sycl::reqd_sub_group_size(kSubGroup)]] { Kernel::run(item, local[0], args); });
    });
}

}  // namespace batchinfer::gpu
