// Device code that CUDA and SYCL share as it is: indices clamped into their tables, what a sequence has in the step, a
// row of feed_back, and the arithmetic of e4m3. Who includes it has defined BATCHINFER_ON_DEVICE, which marks a
// function for the device, and float_bits() and float_of(), which take a float for its 32 bits and the other way round.
#pragma once

#include <cstdint>

#include "gpu/ops.h"

namespace batchinfer::gpu {

inline constexpr float kLog2e = 1.44269504088896f;
inline constexpr float kLn2 = 0.693147180559945f;

// Before a row has seen a key. Finite, as a window may hide whole tiles from a row, and -inf - -inf is no number; far
// below any score.
inline constexpr float kNoScore = -1e30f;

BATCHINFER_ON_DEVICE int64_t clamp_index(int64_t i, int64_t count) {
    return i < 0 ? 0 : i < count ? i : count - 1;
}

// A number as an e4m3 code: to nearest, ties to even; what is larger than 448 becomes 448, and NaN stays NaN.
BATCHINFER_ON_DEVICE uint8_t e4m3_code(float x) {
    constexpr uint32_t kLargest = 0x43e00000, kLeastNormal = 0x3c800000;  // 448 and 2**-6
    const uint32_t sign = float_bits(x) >> 24 & 0x80, size = float_bits(x) & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7f;
    if (size >= kLargest) return sign | 0x7e;
    // Below, the codes count in units of 2**-9: that of the last bit of 2**14.
    if (size < kLeastNormal) return sign | (float_bits(float_of(size) + 16384.0f) - float_bits(16384.0f));
    return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - ((127 - 7) << 3));
}

// The number of a code, exactly.
BATCHINFER_ON_DEVICE float e4m3_value(uint8_t code) {
    const uint32_t sign = uint32_t{code} >> 7 << 31, size = code & 0x7f;
    if (size < 8) return float_of(sign | float_bits(size * 0x1p-9f));
    return float_of(sign | (size == 0x7f ? 0x7fc00000 : (size << 20) + ((127 - 7) << 23)));
}

BATCHINFER_ON_DEVICE int larger_of(int a, int b) {
    return a > b ? a : b;
}
BATCHINFER_ON_DEVICE int smaller_of(int a, int b) {
    return a < b ? a : b;
}

// A sequence's part of the step, with every number clamped into its tensor.
struct Sequence {
    int token;   // first row in the step
    int tokens;  // rows
    int length;  // keys, this step's included
    bool ended;  // nobody wants what its token attends to
    const int32_t* page_row;
};

BATCHINFER_ON_DEVICE Sequence sequence_of(const AttentionPlan& p, int s, int step_tokens) {
    Sequence q;
    q.token = smaller_of(larger_of(p.q_start[s], 0), step_tokens);
    q.tokens = smaller_of(larger_of(p.q_start[s + 1], q.token), step_tokens) - q.token;
    const int32_t length = p.kv_len[s];
    q.ended = length < 0 && q.tokens == 1;
    // Keys up to the first query's own are always there: a shorter kv_len would leave rows without any key.
    q.length =
        smaller_of(larger_of(q.ended ? -larger_of(length, -INT32_MAX) : length, q.tokens), p.slot_pages * p.page_size);
    q.page_row = p.page_table + clamp_index(p.slot[s], p.slots) * int64_t{p.slot_pages};
    return q;
}

// Where the keys end that a sequence reads, of those from `begin` on: one that has ended reads a single one, so that
// its row has some number.
BATCHINFER_ON_DEVICE int keys_end(const Sequence& q, int begin) {
    return q.ended ? begin + 1 : q.length;
}

// A row of feed_back.
BATCHINFER_ON_DEVICE void feed_back_row(const FeedBackArgs& a, int64_t row) {
    if (a.ids[row] >= 0) return;
    const int32_t token = a.last_token[clamp_index(a.slot[row], a.slots)];
    a.ids[row] = token;
    bool ended = false;
    for (int64_t i = row * a.stops; i < (row + 1) * a.stops; ++i) {
        ended |= a.stop_ids[i] == token;
    }
    if (ended) a.kv_len[row] = -a.kv_len[row];
}

// The first position that a token at `position` sees.
BATCHINFER_ON_DEVICE int window_start(const AttentionPlan& p, int position) {
    return p.window ? larger_of(position - p.window + 1, 0) : 0;
}

}  // namespace batchinfer::gpu
