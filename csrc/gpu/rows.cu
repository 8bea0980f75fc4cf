// Row-wise ops: table lookup, RMSNorm with residual, SiLU or GELU times up.
//
// All are bound by memory: 16-byte accesses, every element read and written once. A row of RMSNorm stays in
// registers between its sum of squares and its scaling (32 elements a thread, so rows up to 32,768), one block a row.
// Rows whose width or address does not allow 16-byte accesses take the same kernels with one element an access.
#include <algorithm>

#include "gpu/activations.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kNormElements = 32;  // of a row, per thread

template <class T, int N>
__global__ void lookup_kernel(LookupArgs a) {
    const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
    if (column >= a.width) return;
    const int64_t row = clamp_index(a.ids[blockIdx.x], a.table_rows);
    float x[N];
    load<N>(static_cast<const T*>(a.table) + row * a.width + column, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] *= a.scale;
    }
    store<N>(static_cast<T*>(a.out) + blockIdx.x * a.width + column, x);
}

template <class T, int N>
__global__ void __launch_bounds__(1024) rms_norm_kernel(RmsNormArgs a) {
    constexpr int kPieces = kNormElements / N;
    __shared__ float scratch[kWarp];
    const int64_t row = int64_t{blockIdx.x} * a.width;
    const T* x = static_cast<const T*>(a.x) + row;
    T* residual = a.residual ? static_cast<T*>(a.residual) + row : nullptr;
    float value[kPieces][N], sum = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int64_t i = (int64_t{p} * blockDim.x + threadIdx.x) * N;
        if (i >= a.width) break;
        load<N>(x + i, value[p]);
        if (residual) {
            float old[N];
            load<N>(residual + i, old);
#pragma unroll
            for (int e = 0; e < N; ++e) {  // rounded as it is stored, so that the norm sees what the next layer sees
                value[p][e] = to_float(from_float<T>(value[p][e] + old[e]));
            }
            store<N>(residual + i, value[p]);
        }
#pragma unroll
        for (int e = 0; e < N; ++e) {
            sum += value[p][e] * value[p][e];
        }
    }
    sum = block_reduce(sum, scratch, [](float l, float r) { return l + r; });
    const float inverse = rsqrtf(sum / a.width + a.eps);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int64_t i = (int64_t{p} * blockDim.x + threadIdx.x) * N;
        if (i >= a.width) break;
        float weight[N];
        load<N>(a.weight + i, weight);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            value[p][e] *= inverse * weight[e];
        }
        store<N>(static_cast<T*>(a.out) + row + i, value[p]);
    }
}

template <class T, int N, class Activation>
__global__ void gate_kernel(GateArgs a) {
    const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
    if (column >= a.width) return;
    const T* gate_up = static_cast<const T*>(a.gate_up) + 2 * blockIdx.x * a.width + column;
    float gate[N], up[N];
    load<N>(gate_up, gate);
    load<N>(gate_up + a.width, up);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        gate[i] = Activation()(gate[i]) * up[i];
    }
    store<N>(static_cast<T*>(a.out) + blockIdx.x * a.width + column, gate);
}

bool wide(int64_t width, std::initializer_list<const void*> pointers) {
    return width % 8 == 0 && std::all_of(pointers.begin(), pointers.end(),
                                         [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

dim3 grid_of(int64_t rows, int64_t pieces) {
    return dim3(rows, ceil_div(pieces, kThreads));
}

template <class Activation>
void gate(const GateArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    with_dtype(a.dtype, [&](auto t) {
        using T = decltype(t);
        if (wide(a.width, {a.gate_up, a.out})) {
            gpuLaunch(gate_kernel<T, 8, Activation>, grid_of(a.tokens, a.width / 8), kThreads, 0, native(stream), a);
        } else {
            gpuLaunch(gate_kernel<T, 1, Activation>, grid_of(a.tokens, a.width), kThreads, 0, native(stream), a);
        }
    });
}

}  // namespace

void lookup(const LookupArgs& a, Stream stream) {
    if (a.rows == 0) return;
    with_dtype(a.dtype, [&](auto t) {
        using T = decltype(t);
        if (wide(a.width, {a.table, a.out})) {
            gpuLaunch(lookup_kernel<T, 8>, grid_of(a.rows, a.width / 8), kThreads, 0, native(stream), a);
        } else {
            gpuLaunch(lookup_kernel<T, 1>, grid_of(a.rows, a.width), kThreads, 0, native(stream), a);
        }
    });
    check_launch("lookup");
}

void rms_norm(const RmsNormArgs& a, Stream stream) {
    if (a.tokens == 0) return;
    const int64_t limit = kNormElements * 1024;
    if (a.width > limit) {
        throw std::invalid_argument("rms_norm: rows of " + std::to_string(a.width) + " elements; the limit is " +
                                    std::to_string(limit));
    }
    // Half of the registers a thread may use, so that short rows still spread over many threads.
    const int64_t threads =
        std::clamp<int64_t>(ceil_div(ceil_div(a.width, kNormElements / 2), kWarp) * kWarp, kWarp, 1024);
    with_dtype(a.dtype, [&](auto t) {
        using T = decltype(t);
        if (wide(a.width, {a.x, a.weight, a.residual, a.out})) {
            gpuLaunch(rms_norm_kernel<T, 8>, a.tokens, threads, 0, native(stream), a);
        } else {
            gpuLaunch(rms_norm_kernel<T, 1>, a.tokens, threads, 0, native(stream), a);
        }
    });
    check_launch("rms_norm");
}

void silu_mul(const GateArgs& a, Stream stream) {
    gate<Silu>(a, stream);
    check_launch("silu_mul");
}

void gelu_mul(const GateArgs& a, Stream stream) {
    gate<Gelu>(a, stream);
    check_launch("gelu_mul");
}

}  // namespace batchinfer::gpu
