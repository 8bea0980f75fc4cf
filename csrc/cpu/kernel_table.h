// The kernels of one instruction set, as a table of function pointers.
//
// The sources in csrc/cpu/kernels are compiled once per instruction set, with -DBATCHINFER_ISA=<name>, into namespace
// batchinfer::<name>. Everything else is compiled for the platform's baseline, so the module loads anywhere.
//
// Kernel sources include no header of the C++ standard library that defines functions: an inline function or template
// of it that the compiler does not inline becomes a symbol shared by the whole program, the linker keeps any one copy,
// and the baseline code could end up in one with AVX-512 instructions. So kernels work on raw pointers and ranges;
// checks, threads and containers stay outside.
#pragma once

#include <stdint.h>

#include "batchinfer/ops.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"

namespace batchinfer {

// The sampler keeps the maximum of every block of this many logits, to skip blocks that cannot matter.
constexpr int64_t kSampleBlock = 64;

// A row of logits as the sampler sees it: (logit - highest) * inverse_temperature, at most 0.
struct TemperedRow {
    const float* logits;  // [vocab]
    int64_t vocab;
    float highest;
    float inverse_temperature;
};

// Keys the noise of one row: the words of Philox4x32-10 are counted by (position, token id).
struct NoiseKey {
    uint64_t seed;
    uint32_t position;
};

// Kernels of one instruction set. Those with a range do rows [begin, end) of the op on the calling thread; row results
// do not depend on the range. Nothing here checks its arguments.
struct KernelTable {
    const char* isa;
    bool bf16_dot;  // what meets bfloat16 weights, keys and values is rounded to bfloat16, too

    // kernels/elementwise.cpp, kernels/rope.cpp
    void (*embed)(const EmbedArgs&, int64_t begin, int64_t end);
    void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);
    void (*layer_norm)(const LayerNormArgs&, int64_t begin, int64_t end);
    void (*add)(const AddArgs&, int64_t begin, int64_t end);
    void (*softcap)(const SoftcapArgs&, int64_t begin, int64_t end);
    void (*rope_and_cache)(const RopeAndCacheArgs&, int64_t begin, int64_t end);
    void (*silu_mul)(const GateArgs&, int64_t begin, int64_t end);
    void (*gelu_mul)(const GateArgs&, int64_t begin, int64_t end);
    void (*activate)(const ActivateArgs&, int64_t begin, int64_t end);
    void (*gather_rows)(const GatherRowsArgs&, int64_t begin, int64_t end);

    const GemmKernel* gemm[kWeightFormats];  // kernels/gemm.cpp, kernels/gemm_codes.cpp
    const AttentionKernel* attention;        // kernels/attention.cpp

    // kernels/sample.cpp. NaN counts as -inf. Bit for bit the same on all instruction sets.
    //
    // Maxima of the blocks of x [n] into maxima [ceil(n / kSampleBlock)]; returns the maximum of all.
    float (*block_maxima)(const float* x, int64_t n, float* maxima);
    // Sum of the exponentials of the row, each rounded to a multiple of 2^-34, which makes the sum exact.
    double (*probability_mass)(const TemperedRow&);
    // The token with the largest sum of tempered logit and Gumbel noise, the smallest id among equals. `maxima` as from
    // block_maxima; `likely` is any block, best the one with the highest logit, which lets others be skipped.
    int64_t (*gumbel_max)(const TemperedRow&, NoiseKey, const float* maxima, int64_t likely);
    // out [n] = the Gumbel noise of the tokens ids [n].
    void (*gumbel_noise)(NoiseKey, const int32_t* ids, int64_t n, float* out);
    // out [n] = e^x for x <= 0.
    void (*exp)(const float* x, int64_t n, float* out);
};

}  // namespace batchinfer
