// Kernels with one mistake each, for the test that the emulator sees it. `fault` 0 is the kernel without the mistake.
#include <pybind11/pybind11.h>

#include "gpu/mma.cuh"

namespace {

using namespace batchinfer;
using namespace batchinfer::gpu;

constexpr int kThreads = 64;

// Every thread writes one word of each kind of memory and reads its neighbour's.
enum Fault { none, past_global, past_dynamic, past_static, no_barrier, divergent_barrier, lone_lane, other_lane };

__global__ void neighbours(int* out, int fault) {
    BATCHINFER_DYNAMIC_SHARED(bytes, 128);
    __shared__ int words[kThreads];
    int* dynamic = reinterpret_cast<int*>(bytes);
    const int t = threadIdx.x, next = (t + 1) % kThreads;
    words[fault == past_static ? t + 1 : t] = t;
    dynamic[fault == past_dynamic ? t + 1 : t] = t;
    if (fault == divergent_barrier && t == 5) return;
    if (fault != no_barrier) __syncthreads();
    if (fault == lone_lane && t == 5) return;
    int sum = words[next] + dynamic[next];
    // The lanes of a pair change values; with the mistake, those of a pair of pairs.
    sum += shuffle_xor(t, fault == other_lane ? 2 : 1);
    out[fault == past_global ? t + 1 : t] = sum;
}

// A copy that is read before it is waited for, and one that is.
__global__ void copied(const int* from, int* out, int fault) {
    BATCHINFER_DYNAMIC_SHARED(bytes, 128);
    const int t = threadIdx.x;
    copy_async(shared_address(bytes) + 16 * t, from + 4 * t, true);
    copy_commit();
    if (!fault) copy_wait<0>();
    out[t] = reinterpret_cast<int*>(bytes)[4 * t];
}

// A product of ones with the rows of a 16 x 16 tile numbered; with the mistake, of a tile a row too far.
__global__ void product(int* out, int fault) {
    BATCHINFER_DYNAMIC_SHARED(bytes, 128);
    const int lane = threadIdx.x;
    auto* numbers = reinterpret_cast<bf16*>(bytes);
    for (int i = lane; i < 256; i += kWarp) {
        numbers[i] = from_float<bf16>(i / 16);
    }
    sync_warp();
    Operand rows, ones;
    const SharedAddress first = shared_address(bytes);
    load_left(rows, [&](int row, int piece) { return first + (row + (fault ? 1 : 0)) * 32 + piece * 16; });
    for (uint32_t& word : ones.word) {
        word = pack2<bf16>(1, 1);
    }
    Tile sums = {};
    multiply_add<bf16>(sums, rows, ones);
    for (int i = 0; i < Tile::kNumbers; ++i) {
        out[Tile::row(lane, Tile::row_of(i))] = sums.x[i];
    }
}

}  // namespace

PYBIND11_MODULE(_faults, m) {
    m.def("neighbours", [](uintptr_t out, int fault) {
        gpuLaunch(neighbours, 1, kThreads, kThreads * sizeof(int), nullptr, reinterpret_cast<int*>(out), fault);
    });
    m.def("copied", [](uintptr_t from, uintptr_t out, int fault) {
        gpuLaunch(copied, 1, kThreads, kThreads * 16, nullptr, reinterpret_cast<const int*>(from),
                  reinterpret_cast<int*>(out), fault);
    });
    m.def("product", [](uintptr_t out, int fault) {
        gpuLaunch(product, 1, kWarp, 512, nullptr, reinterpret_cast<int*>(out), fault);
    });
}
