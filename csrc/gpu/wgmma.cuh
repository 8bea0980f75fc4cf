// The warpgroup products of compute capability 9.0 (wgmma) and what their pipelines need: barriers in shared memory,
// proxy fences, register hand-over. Needs the target sm_90a; other targets see BATCHINFER_WGMMA 0.
//
// Operands in shared memory are panels of 64 elements (128 bytes) a row with the 128-byte swizzle: 16-byte piece p of
// row r stands at piece p ^ r % 8, and 8 rows are 1,024 bytes, to which panels are aligned. An accumulator of 64 x N
// holds, in warp w of the group, rows 16 w + lane / 4 and + 8, column 8 n + lane % 4 * 2 in elements 4 n ...; as in
// mma.cuh.
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

#define BATCHINFER_REGISTERS_64                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"           \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define BATCHINFER_REGISTERS_32                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define BATCHINFER_OUTPUTS_64                                                                                   \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),  \
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), \
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), \
        "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), \
        "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), \
        "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), \
        "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
#define BATCHINFER_OUTPUTS_32                                                                                   \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),  \
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), \
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

// c (64 x N, N / 2 numbers a thread) from products of depth 16. scores: a and b in shared memory, elements of the depth
// side by side in both; c is overwritten unless `add`. values: a in registers, b in shared memory with its columns side
// by side; c is added to.
template <class T, int Count>
struct Products;

template <>
struct Products<bf16, 64> {
    __device__ __forceinline__ static void scores(float (&c)[64], uint64_t a, uint64_t b, int add) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " BATCHINFER_REGISTERS_64
            ", %64, %65, add, 1, 1, 0, 0;\n}"
            : BATCHINFER_OUTPUTS_64
            : "l"(a), "l"(b), "r"(add));
    }
    __device__ __forceinline__ static void values(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " BATCHINFER_REGISTERS_64
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : BATCHINFER_OUTPUTS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct Products<bf16, 32> {
    __device__ __forceinline__ static void scores(float (&c)[32], uint64_t a, uint64_t b, int add) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " BATCHINFER_REGISTERS_32
            ", %32, %33, add, 1, 1, 0, 0;\n}"
            : BATCHINFER_OUTPUTS_32
            : "l"(a), "l"(b), "r"(add));
    }
    __device__ __forceinline__ static void values(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " BATCHINFER_REGISTERS_32
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : BATCHINFER_OUTPUTS_32
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct Products<f16, 64> {
    __device__ __forceinline__ static void scores(float (&c)[64], uint64_t a, uint64_t b, int add) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " BATCHINFER_REGISTERS_64
            ", %64, %65, add, 1, 1, 0, 0;\n}"
            : BATCHINFER_OUTPUTS_64
            : "l"(a), "l"(b), "r"(add));
    }
    __device__ __forceinline__ static void values(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " BATCHINFER_REGISTERS_64
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : BATCHINFER_OUTPUTS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct Products<f16, 32> {
    __device__ __forceinline__ static void scores(float (&c)[32], uint64_t a, uint64_t b, int add) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " BATCHINFER_REGISTERS_32
            ", %32, %33, add, 1, 1, 0, 0;\n}"
            : BATCHINFER_OUTPUTS_32
            : "l"(a), "l"(b), "r"(add));
    }
    __device__ __forceinline__ static void values(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " BATCHINFER_REGISTERS_32
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : BATCHINFER_OUTPUTS_32
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

#undef BATCHINFER_REGISTERS_64
#undef BATCHINFER_REGISTERS_32
#undef BATCHINFER_OUTPUTS_64
#undef BATCHINFER_OUTPUTS_32

}  // namespace batchinfer::gpu

#endif  // BATCHINFER_WGMMA
