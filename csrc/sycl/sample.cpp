// Launches of the sampler's kernels, a group a row.
#include "sycl/choose.h"
#include "sycl/launch.h"
#include "sycl/logprobs.h"
#include "sycl/penalties.h"

namespace batchinfer::gpu {

void penalise(const SampleArgs& a, Stream stream) {
    if (a.rows == 0 || (!a.repetition && !a.banned_ids)) return;
    launch<Penalise>(stream, a.rows, 1, a);
}

void choose(const SampleArgs& a, Stream stream) {
    if (a.rows == 0) return;
    launch<Choose>(stream, a.rows, 1, a);
}

void logprobs(const SampleArgs& a, const float* raw, Stream stream) {
    if (a.rows == 0 || !a.num_logprobs) return;
    launch<Logprobs>(stream, a.rows, 1, {a, raw});
}

}  // namespace batchinfer::gpu
