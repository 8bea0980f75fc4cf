// out = SiLU(x gate^T) * (x up^T) in one kernel, for compute capability 9.0: the products of an MLP's first half and
// the gate between them, so that sums are neither written nor read. On an H100 this takes 3 to 22 % less time than the
// vendor's product and silu_mul (rows.cu), 8 % for 8,192 rows of Llama-3.1-8B; where it was seen to take more, they are
// taken (gated_tiles.h), but for 576 rows of Llama-3.2-1B (tests/gpu/RESULTS.md).
//
// A block of three warpgroups takes 128 rows against as many rows of the gate as of up, 64 elements deep at a time. One
// thread of the first group only copies, boxes by the tensor memory accelerator, as many stages ahead as shared memory
// holds; boxes past the end of a matrix bring zeros. Two groups of 64 rows multiply: the gate's sums are the first half
// of a thread's registers, up's the second, at the same places, so that the gate needs no exchange. The grid is
// persistent; a block's copies for its next tile begin while it ends the one before.
#ifdef BATCHINFER_SM90A  // CUDA from 12 on
#include <algorithm>

#include "gpu/activations.cuh"
#include "gpu/gated_tiles.h"
#include "gpu/panels.cuh"
#include "gpu/tma.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 384;
constexpr int kDepth = kBoxColumns;  // elements of a stage: a panel
constexpr int kGroupRows = 64;

template <int C>
constexpr int kStageBytes = (kGatedRows + 2 * C) * kDepth * 2;
template <int C>
constexpr int kStages = C == 64 ? 6 : 4;
template <int C>
constexpr int kOutBytes = kGroupRows * ((C + kDepth - 1) / kDepth * kDepth) * 2;  // of a group
template <int C>
constexpr int kSharedBytes = kStages<C> * kStageBytes<C> + 2 * kOutBytes<C> + 1024;  // 1024: to align

#if BATCHINFER_WGMMA

template <int C>
struct Barriers {
    uint64_t full[kStages<C>], empty[kStages<C>];
};

// The tiles of `out` in the order of the work list: up to kTogether tiles of rows take turns for each tile of columns,
// so that what the blocks read at a time, rows and weights, stays in the L2 cache.
struct Tiles {
    static constexpr int kTogether = 16;
    int row_tiles, column_tiles;

    __device__ __forceinline__ Tiles(const GatedLinearArgs& a, int columns)
        : row_tiles((a.rows + kGatedRows - 1) / kGatedRows), column_tiles((a.width + columns - 1) / columns) {}
    __device__ __forceinline__ int count() const { return row_tiles * column_tiles; }

    struct Place {
        int row, column;
    };
    __device__ __forceinline__ Place at(int index) const {
        const int band = index / (kTogether * column_tiles), inside = index % (kTogether * column_tiles);
        const int together = min(kTogether, row_tiles - band * kTogether);
        return {band * kTogether + inside % together, inside / together};
    }
};

// By one thread.
template <int C>
__device__ void copy_tiles(const GatedLinearArgs& a, const BoxMap& x, const BoxMap& weight, Barriers<C>& b,
                           uint32_t stages) {
    const Tiles tiles(a, C);
    int step = 0;  // of all tiles
    for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
        const auto [row, column] = tiles.at(index);
        for (int k = 0; k < a.depth; k += kDepth, ++step) {
            const int stage = step % kStages<C>;
            const uint32_t full = shared_address(&b.full[stage]), to = stages + stage * kStageBytes<C>;
            const uint32_t gate = to + kGatedRows * kPanel, up = gate + C * kPanel;
            barrier_wait(shared_address(&b.empty[stage]), (step / kStages<C> & 1) ^ 1);
            barrier_arrive_expecting(full, 1, kStageBytes<C>);
            copy_box(to, x, row * kGatedRows, k, full);
            copy_box(gate, weight, column * C, k, full);
            copy_box(up, weight, static_cast<int>(a.width) + column * C, k, full);
        }
    }
}

// A group's rows from its sums to `out`, by way of `rows` in shared memory, of which each warp has its own.
template <class T, int C>
__device__ __forceinline__ void store_gated(const float (&sum)[C], unsigned char* rows, const GatedLinearArgs& a,
                                            int64_t first_row, int first_column) {
    constexpr int kPieces = C / 8;
    const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp % 4 * 16;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = 4 * n + 2 * h;
            *reinterpret_cast<uint32_t*>(rows + place(warp_row + lane / 4 + 8 * h, n, kGroupRows) + lane % 4 * 4) =
                pack2<T>(Silu()(sum[i]) * sum[C / 2 + i], Silu()(sum[i + 1]) * sum[C / 2 + i + 1]);
        }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < 16 * kPieces; i += kWarp) {
        const int row = warp_row + i / kPieces, piece = i % kPieces;
        if (first_row + row < a.rows && first_column + piece * 8 < a.width) {
            *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + (first_row + row) * a.width + first_column + piece * 8) =
                *reinterpret_cast<const uint4*>(rows + place(row, piece, kGroupRows));
        }
    }
    __syncwarp();
}

template <class T, int C>
__device__ void multiply(const GatedLinearArgs& a, Barriers<C>& b, unsigned char* shared, int group) {
    const Tiles tiles(a, C);
    unsigned char* my_rows = shared + kStages<C> * kStageBytes<C> + group * kOutBytes<C>;
    const auto release = [&](int step) {
        if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&b.empty[step % kStages<C>]));
    };
    int step = 0;  // of all tiles
    for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
        float sum[C];
        for (int k = 0; k < a.depth; k += kDepth, ++step) {
            const int stage = step % kStages<C>;
            const uint32_t x = shared_address(shared) + stage * kStageBytes<C> + group * kGroupRows * kPanel;
            const uint32_t weight = shared_address(shared) + stage * kStageBytes<C> + kGatedRows * kPanel;
            barrier_wait(shared_address(&b.full[stage]), step / kStages<C> & 1);
            pin(sum);
            products_begin();
#pragma unroll
            for (int i = 0; i < kDepth / 16; ++i) {
                Products<T, C>::scores(sum, operand(x + i * 32), operand(weight + i * 32), k > 0 || i > 0);
            }
            products_commit();
            if (k > 0) {
                products_wait<1>();
                release(step - 1);
            }
        }
        products_wait<0>();
        pin(sum);
        release(step - 1);
        const auto [row, column] = tiles.at(index);
        store_gated<T, C>(sum, my_rows, a, int64_t{row} * kGatedRows + group * kGroupRows, column * C);
    }
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads, 1)
    gated_kernel(GatedLinearArgs a, const __grid_constant__ BoxMap x, const __grid_constant__ BoxMap weight) {
    BATCHINFER_DYNAMIC_SHARED(unaligned, 1);
    __shared__ Barriers<C> b;
    unsigned char* shared = unaligned + (-shared_address(unaligned) & 1023);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages<C>; ++i) {
            barrier_init(shared_address(&b.full[i]), 1);
            barrier_init(shared_address(&b.empty[i]), 8);  // multiplying warps
        }
        fence_async_proxy();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_give<40>();
        if (threadIdx.x == 0) copy_tiles<C>(a, x, weight, b, shared_address(shared));
    } else {
        registers_take<232>();
        multiply<T, C>(a, b, shared, threadIdx.x / 128 - 1);
    }
}

#else
template <class T, int C>
__global__ void gated_kernel(GatedLinearArgs, const __grid_constant__ BoxMap, const __grid_constant__ BoxMap) {}
#endif  // BATCHINFER_WGMMA

template <class T, int C>
void launch(const GatedLinearArgs& a, Stream stream) {
    static const int blocks = persistent_blocks(gated_kernel<T, C>, kThreads, kSharedBytes<C>);
    const int depth = static_cast<int>(a.depth);
    const BoxMap x = box_map(a.x, a.rows, depth, kGatedRows), weight = box_map(a.weight, 2 * a.width, depth, C);
    const int64_t tiles = ceil_div(a.rows, kGatedRows) * ceil_div(a.width, C);
    gpuLaunch(gated_kernel<T, C>, std::min<int64_t>(tiles, blocks), kThreads, kSharedBytes<C>, native(stream), a, x,
              weight);
    check_launch("gated_linear");
}

template <class T>
bool launch(const GatedLinearArgs& a, Stream stream) {
    switch (gated_columns(a.rows, a.width, multiprocessors())) {
        case 64:
            launch<T, 64>(a, stream);
            return true;
        case 112:
            launch<T, 112>(a, stream);
            return true;
        case 128:
            launch<T, 128>(a, stream);
            return true;
        default:
            return false;
    }
}

}  // namespace

bool gated_linear(const GatedLinearArgs& a, Stream stream) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (matrix_unit() != MatrixUnit::warpgroup || a.dtype == GpuDtype::float32 || a.width % 8 || a.depth % 8 ||
        !aligned(a.x) || !aligned(a.weight) || !aligned(a.out)) {
        return false;
    }
    return a.dtype == GpuDtype::bfloat16 ? launch<bf16>(a, stream) : launch<f16>(a, stream);
}

}  // namespace batchinfer::gpu

#else
#include "gpu/ops.h"

namespace batchinfer::gpu {

bool gated_linear(const GatedLinearArgs&, Stream) {
    return false;
}

}  // namespace batchinfer::gpu
#endif  // BATCHINFER_SM90A
