// feed_back: one work-item a row; see csrc/gpu/portable.h.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

struct FeedBack {
    using Args = FeedBackArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 128;

    static void run(const Item& item, Local&, const Args& a) {
        const int64_t row = item.get_global_id(1);
        if (row < a.rows) feed_back_row(a, row);
    }
};

}  // namespace batchinfer::gpu
