// The warpgroup products of compute capability 9.0 (wgmma) and what their pipelines need: barriers in shared memory,
// proxy fences, register hand-over. Needs the target sm_90a; other targets see BATCHINFER_WGMMA 0.
//
// Operands in shared memory are panels: panels.cuh. An accumulator of 64 x N holds, in warp w of the group, rows 16 w +
// lane / 4 and + 8, column 8 n + lane % 4 * 2 in elements 4 n ...; as in mma.cuh.
#pragma once

#include "gpu/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BATCHINFER_WGMMA 1
#else
#define BATCHINFER_WGMMA 0
#endif

#if BATCHINFER_WGMMA

namespace batchinfer::gpu {

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives when all asynchronous copies that this thread has started are done; counted in the barrier's arrivals.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase with this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Makes shared-memory writes that this thread has made, or has been told of by a barrier, visible to the matrix unit.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Of one warpgroup; 0 is __syncthreads's.
__device__ __forceinline__ void named_barrier(int name) {
    asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}

template <int Registers>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `Left` committed groups are unfinished.
template <int Left>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
// Keeps the compiler from moving uses of accumulators over a wait.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(x[i])::"memory");
    }
}

// The operand lists of the sums: registers %0 to %127 in sixteens, and the numbers that they stand for.
#define BATCHINFER_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BATCHINFER_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BATCHINFER_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BATCHINFER_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BATCHINFER_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define BATCHINFER_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BATCHINFER_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define BATCHINFER_112 \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BATCHINFER_LIST_32 "{" BATCHINFER_0 BATCHINFER_16 "}"
#define BATCHINFER_LIST_64 "{" BATCHINFER_0 BATCHINFER_16 BATCHINFER_32 BATCHINFER_48 "}"
#define BATCHINFER_LIST_112 \
    "{" BATCHINFER_0 BATCHINFER_16 BATCHINFER_32 BATCHINFER_48 BATCHINFER_64 BATCHINFER_80 BATCHINFER_96 "}"
#define BATCHINFER_LIST_128                                                                \
    "{" BATCHINFER_0 BATCHINFER_16 BATCHINFER_32 BATCHINFER_48 BATCHINFER_64 BATCHINFER_80 \
        BATCHINFER_96 BATCHINFER_112 "}"
#define BATCHINFER_SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define BATCHINFER_SUMS_16(i) \
    BATCHINFER_SUMS_4(i), BATCHINFER_SUMS_4(i + 4), BATCHINFER_SUMS_4(i + 8), BATCHINFER_SUMS_4(i + 12)
#define BATCHINFER_SUMS_32 BATCHINFER_SUMS_16(0), BATCHINFER_SUMS_16(16)
#define BATCHINFER_SUMS_64 BATCHINFER_SUMS_32, BATCHINFER_SUMS_16(32), BATCHINFER_SUMS_16(48)
#define BATCHINFER_SUMS_112 BATCHINFER_SUMS_64, BATCHINFER_SUMS_16(64), BATCHINFER_SUMS_16(80), BATCHINFER_SUMS_16(96)
#define BATCHINFER_SUMS_128 BATCHINFER_SUMS_112, BATCHINFER_SUMS_16(112)

// c (64 x N, N / 2 numbers a thread) from products of depth 16. scores: a and b in shared memory, elements of the depth
// side by side in both; c is overwritten unless `add`. values: a in registers, b in shared memory with its columns side
// by side; c is added to.
template <class T, int Count>
struct Products;

// `columns`: of the instruction, twice `count`; `a`, `b`, `add`: the operands that follow the sums.
#define BATCHINFER_SCORES(name, count, columns, a_, b_, add_)                                                        \
    __device__ __forceinline__ static void scores(float (&c)[count], uint64_t a, uint64_t b, int add) {              \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
                     "k16.f32." name "." name " " BATCHINFER_LIST_##count ", %" a_ ", %" b_ ", add, 1, 1, 0, 0;\n}"  \
                     : BATCHINFER_SUMS_##count                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                                    \
    }
#define BATCHINFER_VALUES(name, count, columns, a0, a1, a2, a3, b_)                                                   \
    __device__ __forceinline__ static void values(float (&c)[count], const uint32_t (&a)[4], uint64_t b) {            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." name "." name " " BATCHINFER_LIST_##count \
                     ", {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_ ", 1, 1, 1, 1;"                                   \
                     : BATCHINFER_SUMS_##count                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
    }
#define BATCHINFER_PRODUCTS(type, name)                                  \
    template <>                                                          \
    struct Products<type, 32> {                                          \
        BATCHINFER_SCORES(name, 32, "64", "32", "33", "34")              \
        BATCHINFER_VALUES(name, 32, "64", "32", "33", "34", "35", "36")  \
    };                                                                   \
    template <>                                                          \
    struct Products<type, 64> {                                          \
        BATCHINFER_SCORES(name, 64, "128", "64", "65", "66")             \
        BATCHINFER_VALUES(name, 64, "128", "64", "65", "66", "67", "68") \
    };                                                                   \
    template <>                                                          \
    struct Products<type, 112> {                                         \
        BATCHINFER_SCORES(name, 112, "224", "112", "113", "114")         \
    };                                                                   \
    template <>                                                          \
    struct Products<type, 128> {                                         \
        BATCHINFER_SCORES(name, 128, "256", "128", "129", "130")         \
    };
BATCHINFER_PRODUCTS(bf16, "bf16")
BATCHINFER_PRODUCTS(f16, "f16")

#undef BATCHINFER_0
#undef BATCHINFER_16
#undef BATCHINFER_32
#undef BATCHINFER_48
#undef BATCHINFER_64
#undef BATCHINFER_80
#undef BATCHINFER_96
#undef BATCHINFER_112
#undef BATCHINFER_LIST_32
#undef BATCHINFER_LIST_64
#undef BATCHINFER_LIST_112
#undef BATCHINFER_LIST_128
#undef BATCHINFER_SUMS_4
#undef BATCHINFER_SUMS_16
#undef BATCHINFER_SUMS_32
#undef BATCHINFER_SUMS_64
#undef BATCHINFER_SUMS_112
#undef BATCHINFER_SUMS_128
#undef BATCHINFER_SCORES
#undef BATCHINFER_VALUES
#undef BATCHINFER_PRODUCTS

}  // namespace batchinfer::gpu

#endif  // BATCHINFER_WGMMA
