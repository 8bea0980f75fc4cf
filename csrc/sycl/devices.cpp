// Which devices the extension can use.
#include <sycl/sycl.hpp>

#include "gpu/ops.h"

namespace batchinfer::gpu {

int device_count() {
    try {
        return static_cast<int>(sycl::device::get_devices(sycl::info::device_type::gpu).size());
    } catch (const sycl::exception&) {  // no driver
        return 0;
    }
}

}  // namespace batchinfer::gpu
