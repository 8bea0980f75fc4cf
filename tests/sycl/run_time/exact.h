// The sampler's arithmetic by itself, a kernel each.
#pragma once

#include "sycl/sample.h"

namespace batchinfer::gpu {

struct DivideArgs {
    const float *a, *b;
    float* out;
    int64_t count;
};

struct Divide {
    using Args = DivideArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 64;

    static void run(const Item& item, Local&, const Args& args) {
        const int64_t i = item.get_global_id(1);
        if (i < args.count) args.out[i] = exact::div(args.a[i], args.b[i]);
    }
};

struct ShareArgs {
    const uint64_t* total;
    const float* share;
    uint64_t* out;
    int64_t count;
};

struct Share {
    using Args = ShareArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 64;

    static void run(const Item& item, Local&, const Args& args) {
        const int64_t i = item.get_global_id(1);
        if (i < args.count) args.out[i] = exact::share_of(args.total[i], args.share[i]);
    }
};

}  // namespace batchinfer::gpu
