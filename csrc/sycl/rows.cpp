// Launches of the row-wise kernels.
#include "sycl/rows.h"

#include "sycl/launch.h"

namespace batchinfer::gpu {
namespace {

template <class Activation>
void gate(const GateArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    with_dtype(a.dtype, [&](auto t) {
        using Kernel = Gate<decltype(t), Activation>;
        launch<Kernel>(stream, a.tokens, ceil_div(a.width, Kernel::kThreads), a);
    });
}

}  // namespace

void lookup(const LookupArgs& a, Stream stream) {
    if (a.rows == 0) return;
    with_dtype(a.dtype, [&](auto t) {
        using Kernel = Lookup<decltype(t)>;
        launch<Kernel>(stream, a.rows, ceil_div(a.width, Kernel::kThreads), a);
    });
}

void rms_norm(const RmsNormArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    with_dtype(a.dtype, [&](auto t) { launch<RmsNorm<decltype(t)>>(stream, a.tokens, 1, a); });
}

void silu_mul(const GateArgs& a, Stream stream) {
    gate<Silu>(a, stream);
}

void gelu_mul(const GateArgs& a, Stream stream) {
    gate<Gelu>(a, stream);
}

bool gated_linear(const GatedLinearArgs&, Stream) {
    return false;
}

}  // namespace batchinfer::gpu
