// Launches of attention: the plan of a step, and its use by a layer.
#include "sycl/attention.h"

#include "sycl/launch.h"

namespace batchinfer::gpu {
namespace {

template <class T, class C, int kPieces>
void attend(const AttentionArgs& a, Stream stream) {
    // A compute unit (vector engine) runs eight sub-groups: one group each is more than its local memory lets in, and
    // the device evens out items of different lengths.
    launch<Attend<T, C, kPieces>>(stream, 1, compute_units(stream), a);
    launch<MergeParts<T>>(stream, a.plan.sequences, ceil_div(a.plan.heads, MergeParts<T>::kHeads), a);
}

template <class T, class C>
void attend(const AttentionArgs& a, Stream stream) {
    if (a.plan.head_width <= 64) {
        attend<T, C, 4>(a, stream);
    } else if (a.plan.head_width <= 128) {
        attend<T, C, 8>(a, stream);
    } else {
        attend<T, C, 16>(a, stream);
    }
}

}  // namespace

void plan_attention(const AttentionPlan& p, Stream stream) {
    check_shape(p);
    launch<PlanAttention>(stream, 1, 1, p);
}

void attention(const AttentionArgs& a, Stream stream) {
    if (a.tokens == 0 || a.plan.sequences == 0) return;
    if (a.cache_dtype == GpuDtype::e4m3) return attend<bf16, e4m3>(a, stream);
    with_dtype(a.dtype, [&](auto t) { attend<decltype(t), decltype(t)>(a, stream); });
}

}  // namespace batchinfer::gpu
