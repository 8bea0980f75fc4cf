// Stands in front of csrc/sycl/launch.h where no DPC++ compiles the launchers: g++ does, and the kernels that they name
// are compiled when the first of them is launched. Every launch is waited for.
#pragma once

#include <string>
#include <typeinfo>

#include "gpu/dispatch.h"
#include "local_words.h"
#include "sycl/device.h"

namespace batchinfer::run_time {

// Notes that the kernel of this type is wanted; what entry<> of it is called.
std::string enrol(const std::type_info& kernel);
sycl::kernel compiled(const std::string& name);
sycl::queue& queue();

template <class Kernel>
inline const std::string name = enrol(typeid(Kernel));

}  // namespace batchinfer::run_time

namespace batchinfer::gpu {

inline int64_t compute_units(Stream) {
    return 3;  // few, so that a group gets several items
}

template <class Kernel>
void launch(Stream, int64_t rows, int64_t pieces, const typename Kernel::Args& args) {
    const sycl::range<2> groups(rows, pieces), threads(1, Kernel::kThreads);
    const sycl::kernel kernel = run_time::compiled(run_time::name<Kernel>);
    run_time::queue()
        .submit([&](sycl::handler& handler) {
            const LocalWords local(ceil_div(sizeof(typename Kernel::Local), sizeof(sycl::uint4)), handler);
            handler.set_args(args, local);
            handler.parallel_for(sycl::nd_range<2>(groups * threads, threads), kernel);
        })
        .wait_and_throw();
}

}  // namespace batchinfer::gpu
