// Arguments of the ops: raw pointers, shapes and strides, the same for every device. The contract of each op (order of
// the arithmetic, what may alias) is in batchinfer/ops/__init__.py, with the same names and notation.
//
// Sizes and strides count elements. Tensors are contiguous except for the strides named here.
#pragma once

#include <cstdint>

namespace batchinfer {

// Of weights and caches. On the CPU activations are float32, but for what only a matrix product reads (`out_dtype`).
// Of caches alone are int8, a row of which is head_width signed codes and their scale, float32, and e4m3.
enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, int8 = 2, e4m3 = 3 };

struct EmbedArgs {
    const int32_t* ids;  // [tokens]
    const void* table;   // [vocab, width]
    Dtype table_dtype;
    float* out;  // [tokens, width]
    int64_t tokens, width, vocab;
    float scale;
};

struct RmsNormArgs {
    const float* x;       // [tokens, width]
    const float* weight;  // [width]
    float* residual;      // [tokens, width] or null
    void* out;            // [tokens, width], may be x
    Dtype out_dtype;
    int64_t tokens, width;
    float eps;
};

struct LayerNormArgs {
    const float* x;       // [tokens, width]
    const float* weight;  // [width]
    const float* bias;    // [width] or null
    float* residual;      // [tokens, width] or null
    void* out;            // [tokens, width], may be x
    Dtype out_dtype;
    int64_t tokens, width;
    float eps;
};

struct AddArgs {
    const float* x;   // [tokens, width]
    float* residual;  // [tokens, width]
    int64_t tokens, width;
};

// x -> softcap * tanh(x / softcap).
struct SoftcapArgs {
    float* x;  // [rows, width]
    int64_t rows, width;
    float softcap;
};

struct RopeAndCacheArgs {
    const float* qkv;          // [tokens, heads + 2 * kv_heads, head_width]
    const int32_t* positions;  // [tokens]
    const int64_t* kv_index;   // [tokens], page * page_size + offset
    const float* cos_sin;      // [max_positions, rotary_width] or null: no rotation
    const float* q_norm;       // [head_width] or null: no norm of the heads; [heads * head_width] with norm_all
    const float* k_norm;       // [head_width], null together with q_norm; [kv_heads * head_width] with norm_all
    void* k_cache;             // [pages, kv_heads, page_size, head_width], or rows of codes
    void* v_cache;
    Dtype cache_dtype;
    float* q_out;  // [tokens, heads, head_width]
    int64_t tokens, heads, kv_heads, head_width;
    int64_t max_positions, rotary_width;
    int64_t pages, page_size;
    float norm_eps;
    bool norm_all;  // one norm over all heads of q, and one over those of k
};

// Of silu_mul and gelu_mul.
struct GateArgs {
    const float* gate_up;  // [tokens, 2 * width]
    void* out;             // [tokens, width]
    Dtype out_dtype;
    int64_t tokens, width;
};

// gelu_tanh is the approximation of Hendrycks & Gimpel; gelu has the normal distribution itself.
enum class Activation : int32_t { gelu = 0, gelu_tanh = 1, relu = 2 };

struct ActivateArgs {
    Activation kind;
    const float* x;  // [tokens, width]
    void* out;       // [tokens, width], may be x
    Dtype out_dtype;
    int64_t tokens, width;
};

struct GatherRowsArgs {
    const void* x;         // [x_rows, width]
    const int32_t* index;  // [rows]
    void* out;             // [rows, width]
    Dtype dtype;           // of both
    int64_t x_rows, rows, width;
};

// Page target[i] of both caches becomes a copy of page source[i]. Caches of any type: a page is so many bytes.
struct CopyPagesArgs {
    void* k_cache;  // [pages, page_bytes]
    void* v_cache;
    const int32_t* source;  // [copies]
    const int32_t* target;  // [copies], none twice and none of the sources
    int64_t copies, pages, page_bytes;
};

struct SampleArgs {
    float* logits;  // [rows, vocab], overwritten
    int64_t rows, vocab;

    // Each [rows].
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int32_t* position;

    // All null if no row is penalised. history_start [rows + 1] cuts history_ids [history_size]; the rest [rows].
    const float* repetition;
    const float* presence;
    const float* frequency;
    const int32_t* history_ids;
    const int32_t* history_start;
    const int32_t* history_prompt;
    int64_t history_size;

    // Null if no row has biases. bias_start [rows + 1] cuts bias_ids and bias_values [bias_size]; a row has an id once.
    const int32_t* bias_ids;
    const int32_t* bias_start;
    const float* bias_values;
    int64_t bias_size;

    // Null if no token is banned. banned_start [rows + 1] cuts banned_ids [banned_size].
    const int32_t* banned_ids;
    const int32_t* banned_start;
    int64_t banned_size;
    // Null if every row may choose any token. [rows, (vocab + 31) / 32]; bit t % 32 of word t / 32: t may be chosen.
    const uint32_t* allowed = nullptr;

    int32_t* tokens;  // [rows]

    // Null if no row wants log-probabilities. NaN, -1 and -inf stand where a row has nothing to report.
    const int32_t* num_logprobs;  // [rows]
    float* chosen;                // [rows]
    int32_t* top_ids;             // [rows, top_width]
    float* top;                   // [rows, top_width]
    int64_t top_width;
};

// Which tokens of a step attend to what.
struct AttentionPlanArgs {
    const int32_t* q_start;     // [sequences + 1]
    const int32_t* kv_len;      // [sequences]
    const int32_t* slot;        // [sequences]
    const int32_t* page_table;  // [slots, slot_pages]
    int64_t sequences, slots, slot_pages;
    int64_t heads, kv_heads, head_width;
    int64_t pages, page_size;
    int64_t window;  // positions that a token sees, itself included; 0: all
};

struct AttentionArgs {
    const float* q;       // [tokens, heads, head_width]
    const void* k_cache;  // [pages, kv_heads, page_size, head_width], or rows of codes
    const void* v_cache;
    Dtype cache_dtype;
    void* out;  // [tokens, heads, head_width]
    Dtype out_dtype;
    float* lse;  // [tokens, heads]
    int64_t heads, kv_heads, head_width, page_size;
    int64_t window;
    float scale;
    float softcap;  // scores are softcap * tanh(score / softcap); 0: as they are
};

}  // namespace batchinfer
