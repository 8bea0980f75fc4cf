// What an instruction set's attention kernels offer to csrc/cpu/attention.cpp (made by kernels/attention.cpp).
//
// A work item is some query rows against one key/value head. A row is one query head of one token; the heads that share
// a key/value head stand together, so that they read it once. Keys and values are taken in blocks of kKeyBlock
// positions, counted from the start of the sequence, with the running maximum of Milakov & Gimelshein (2018,
// arXiv:1805.02867) as in FlashAttention (Dao et al. 2022, arXiv:2205.14135). Every kSplit positions the running sums
// are closed and added to the row's total. So the order of a row's additions follows from its position alone, and an
// item may hold rows of any sequences, or only some splits of a row, without a change in any bit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "batchinfer/ops.h"

namespace batchinfer {

inline constexpr int64_t kKeyBlock = 64;
inline constexpr int64_t kSplit = 1024;

// Consecutive query tokens of one sequence.
struct QueryRange {
    const int32_t* pages;  // of the sequence
    int64_t token;         // the first one's row in the step
    int64_t tokens;
    int64_t position;  // the first one's position in the sequence
};

// The first position that the token at `position` sees.
inline int64_t window_start(int64_t position, int64_t window) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}

struct AttentionItem {
    const QueryRange* queries;
    int64_t num_queries;
    int64_t kv_head;
    // Leading key blocks whose pages are the same for all queries: read once for all of them.
    int64_t shared_blocks;
    // Null: whole rows, results go to out and lse. Else the item has one query range, covers split number `split` only,
    // and leaves its running sums (state_floats per row) here.
    float* partial;
    int64_t split;
};

struct AttentionKernel {
    size_t (*scratch_bytes)(const AttentionArgs&, int64_t rows);
    int64_t (*state_floats)(int64_t head_width);
    // `next`: the item that this thread will do after this one, or null; its first keys are prefetched.
    void (*attend)(const AttentionArgs&, const AttentionItem&, const AttentionItem* next, void* scratch);
    // Adds up the splits of an item's rows, in order: partial [splits, rows, state_floats].
    void (*merge)(const AttentionArgs&, const QueryRange&, int64_t kv_head, const float* partial, int64_t splits,
                  void* scratch);
};

}  // namespace batchinfer
