#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tile.h"

#define BATCHINFER_QUOTED(x) #x
#define BATCHINFER_NAME(x) BATCHINFER_QUOTED(x)

namespace batchinfer::BATCHINFER_ISA {

extern const KernelTable table = {
    .isa = BATCHINFER_NAME(BATCHINFER_ISA),
    .bf16_dot = BATCHINFER_BF16_DOT,
    .embed = embed,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .add = add,
    .softcap = softcap,
    .rope_and_cache = rope_and_cache,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .activate = activate,
    .gather_rows = gather_rows,
    .gemm = {&gemm_float32, &gemm_bfloat16, &gemm_int8, &gemm_blocks8, &gemm_blocks4, &gemm_short_blocks8},
    .attention = &attention_kernel,
    .block_maxima = block_maxima,
    .probability_mass = probability_mass,
    .gumbel_max = gumbel_max,
    .gumbel_noise = gumbel_noise,
    .exp = exp_of,
};

}  // namespace batchinfer::BATCHINFER_ISA
