// The CPU backend: checks what the pointers index, splits rows over threads, calls the kernels.
//
// Each op throws std::invalid_argument for an index outside its table and leaves the outputs untouched then. Shapes,
// dtypes and contiguity are the caller's to check (batchinfer/ops/native.py).
#pragma once

#include <string>

#include "batchinfer/ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/program.h"

namespace batchinfer {

struct Cpu {
    ThreadPool pool;
    const KernelTable& kernels;
    Program* recording = nullptr;  // to which the ops of a step are added as they are called

    // See ThreadPool and choose_kernels for the arguments and what they throw.
    explicit Cpu(int threads = 0, const std::string& isa = "") : pool(threads), kernels(choose_kernels(isa)) {}
};

void embed(Cpu&, const EmbedArgs&);
void rms_norm(Cpu&, const RmsNormArgs&);
void layer_norm(Cpu&, const LayerNormArgs&);
void add(Cpu&, const AddArgs&);
void softcap(Cpu&, const SoftcapArgs&);
void rope_and_cache(Cpu&, const RopeAndCacheArgs&);
void silu_mul(Cpu&, const GateArgs&);
void gelu_mul(Cpu&, const GateArgs&);
void activate(Cpu&, const ActivateArgs&);
void gather_rows(Cpu&, const GatherRowsArgs&);
void copy_pages(Cpu&, const CopyPagesArgs&);
void sample(Cpu&, const SampleArgs&);

}  // namespace batchinfer
