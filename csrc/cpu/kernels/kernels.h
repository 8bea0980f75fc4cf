// Declares this instruction set's kernels; kernel_table.h says what they share, table.cpp lists them.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

void embed(const EmbedArgs&, int64_t begin, int64_t end);
void rms_norm(const RmsNormArgs&, int64_t begin, int64_t end);
void layer_norm(const LayerNormArgs&, int64_t begin, int64_t end);
void add(const AddArgs&, int64_t begin, int64_t end);
void softcap(const SoftcapArgs&, int64_t begin, int64_t end);
void rope_and_cache(const RopeAndCacheArgs&, int64_t begin, int64_t end);
void silu_mul(const GateArgs&, int64_t begin, int64_t end);
void gelu_mul(const GateArgs&, int64_t begin, int64_t end);
void activate(const ActivateArgs&, int64_t begin, int64_t end);
void gather_rows(const GatherRowsArgs&, int64_t begin, int64_t end);
extern const GemmKernel gemm_float32, gemm_bfloat16;
extern const GemmKernel gemm_int8, gemm_blocks8, gemm_blocks4, gemm_short_blocks8;
extern const AttentionKernel attention_kernel;

float block_maxima(const float* x, int64_t n, float* maxima);
double probability_mass(const TemperedRow&);
int64_t gumbel_max(const TemperedRow&, NoiseKey, const float* maxima, int64_t likely);
void gumbel_noise(NoiseKey, const int32_t* ids, int64_t n, float* out);
void exp_of(const float* x, int64_t n, float* out);

}  // namespace batchinfer::BATCHINFER_ISA
