// The ops of the GPU backends (csrc/gpu, csrc/sycl): arguments and launchers. Every pointer is a device pointer,
// nothing here waits for the device, and no launch geometry depends on device data, so that a whole step can be
// captured in a graph.
//
// Contracts and notation: batchinfer/ops/__init__.py. Activations have the engine's dtype here. An index outside its
// table cannot be raised without waiting: it is clamped, or its write is dropped, so that no byte outside the tensors
// is touched.
#pragma once

#include <cstdint>

#include "batchinfer/ops.h"

namespace batchinfer::gpu {

using Stream = void*;  // cudaStream_t, or sycl::queue*, in order

// e4m3 is of caches alone, beside activations in bfloat16 (batchinfer/ops/quantized.py has the format).
enum class GpuDtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, e4m3 = 3 };

// out [rows, width] = scale * table[ids]: embedding and row gather in one.
struct LookupArgs {
    const int32_t* ids;  // [rows]
    const void* table;   // [table_rows, width]
    void* out;
    GpuDtype dtype;
    int64_t rows, width, table_rows;
    float scale;
};

struct RmsNormArgs {
    const void* x;        // [tokens, width]
    const float* weight;  // [width]
    void* residual;       // [tokens, width] or null
    void* out;            // [tokens, width], may be x
    GpuDtype dtype;
    int64_t tokens, width;
    float eps;
};

// Of silu_mul and gelu_mul.
struct GateArgs {
    const void* gate_up;  // [tokens, 2 * width]
    void* out;            // [tokens, width]
    GpuDtype dtype;
    int64_t tokens, width;
};

// out [rows, width] = SiLU(x gate^T) * (x up^T).
struct GatedLinearArgs {
    const void* x;       // [rows, depth]
    const void* weight;  // [2 * width, depth], the gate's rows first
    void* out;           // [rows, width]
    GpuDtype dtype;
    int64_t rows, width, depth;
};

struct RopeAndCacheArgs {
    const void* qkv;           // [tokens, heads + 2 * kv_heads, head_width]
    const int32_t* positions;  // [tokens]
    const int64_t* kv_index;   // [tokens]; outside the cache (-1): q is written, k and v are not
    const float* cos_sin;      // [max_positions, rotary_width] or null
    const float* q_norm;       // [head_width] or null
    const float* k_norm;       // [head_width], null together with q_norm
    void* k_cache;             // [pages, kv_heads, page_size, head_width]
    void* v_cache;
    void* q_out;  // [tokens, heads, head_width]
    GpuDtype dtype, cache_dtype;
    int64_t tokens, heads, kv_heads, head_width;
    int64_t max_positions, rotary_width;
    int64_t pages, page_size;
    float norm_eps;
};

// A part of a decoding sequence's keys, or of what a tile of sequences reads together.
struct alignas(16) DecodePart {
    int32_t sequence, members;  // the first, and how many share the part
    int32_t number;             // among each member's partial results; -1: there is no other part
    int32_t begin, end;         // positions
    int32_t token, slot;        // of the first sequence: its row in the step, and in the page table
    int32_t length;             // of its keys
};

// The work lists of a step, made by plan_attention and read by attention; see attention.cuh. In running sums over the
// sequences item i belongs to the sequence s with start[s] <= i < start[s + 1].
struct AttentionPlan {
    const int32_t* q_start;     // [sequences + 1]
    const int32_t* kv_len;      // [sequences]
    const int32_t* slot;        // [sequences]
    const int32_t* page_table;  // [slots, slot_pages]
    int32_t sequences, slots, slot_pages;
    int32_t heads, kv_heads, head_width;
    int32_t pages, page_size;
    int32_t split;     // KV positions that one decode item covers at most
    bool decode_only;  // no sequence has more than one token: no launch looks for others
    int32_t window;    // a token sees so many positions, its own included; 0: all

    int32_t* decode_start;    // [sequences + 1]; of csrc/sycl alone
    int32_t* prefill_start;   // [sequences + 1]
    int32_t* partial_start;   // [sequences + 1], in parts; a sequence has none if one item covers it
    int32_t* shared;          // [sequences]; leading positions that its tile's sequences read together (attention.cuh);
                              // with a window those that nobody reads
    DecodePart* parts;        // [sequences * (splits + 1)]; csrc/sycl does without
    DecodePart* short_parts;  // [sequences]; the last ones of sequences, where a warp is enough
    int32_t* part_counts;     // [2]: parts, and short parts
    int32_t* queues;          // [4]: next item and finished blocks, for decode and for prefill; zero between launches
    int32_t* arrivals;        // [sequences, kv_heads * row_tiles]: finished parts; zero between launches
    float* partial_out;       // [partial rows, head_width], partial rows = sequences * (splits + 1) * heads
    float* partial_lse;       // [partial rows], base 2
};

struct AttentionArgs {
    AttentionPlan plan;
    const void* q;        // [tokens, heads, head_width]
    const void* k_cache;  // [pages, kv_heads, page_size, head_width]
    const void* v_cache;
    void* out;   // [tokens, heads, head_width]
    float* lse;  // [tokens, heads]
    GpuDtype dtype, cache_dtype;
    int32_t tokens;
    float scale;
    float softcap;  // scores are softcap * tanh(scale * q.k / softcap); 0: scale * q.k
};

// See Ops.feed_back.
struct FeedBackArgs {
    int32_t* ids;               // [rows]
    int32_t* kv_len;            // [rows]
    const int32_t* slot;        // [rows]
    const int32_t* last_token;  // [slots]
    const int32_t* stop_ids;    // [rows, stops]
    int64_t rows, slots, stops;
};

// Each throws std::invalid_argument for a shape it cannot do and std::runtime_error if the launch fails.
void lookup(const LookupArgs&, Stream);
void rms_norm(const RmsNormArgs&, Stream);
void silu_mul(const GateArgs&, Stream);
void gelu_mul(const GateArgs&, Stream);
bool gated_linear(const GatedLinearArgs&, Stream);  // false: there is no kernel for these, and nothing was done
void rope_and_cache(const RopeAndCacheArgs&, Stream);
void copy_pages(const CopyPagesArgs&, Stream);  // pages of a multiple of 16 bytes
void feed_back(const FeedBackArgs&, Stream);
void plan_attention(const AttentionPlan&, Stream);
void attention(const AttentionArgs&, Stream);
void attention_decode(const AttentionArgs&, Stream);
void attention_prefill(const AttentionArgs&, Stream);
void attention_prefill_sm90(const AttentionArgs&, Stream);  // compiled for sm_90a
void attention_generic(const AttentionArgs&, Stream);

// Each reads `a.logits` as they are and leaves its part of the answer; sample() runs them in the order of the contract.
// `raw` are the logits before penalties (a.logits itself if there are none).
void penalise(const SampleArgs& a, Stream);
void choose(const SampleArgs& a, Stream);
void logprobs(const SampleArgs& a, const float* raw, Stream);

int device_count();

}  // namespace batchinfer::gpu
