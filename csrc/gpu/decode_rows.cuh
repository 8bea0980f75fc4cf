// The rows of decode attention: a warp's 16 query heads over chunks of 16 positions from the paged cache. For
// attention_decode.cu alone.
//
// Each warp has asynchronous copies of its own, a running maximum and running sums. Bytes in flight are what
// counts: 3.0 TB/s with about 1 us of latency wants 23 KB a multiprocessor of an H100; 2 blocks x 4 warps x (kStages -
// 1) chunks of 8 KB (width 128) keep 128 KB in flight. AMD's GPUs have no such copies: a warp there waits for each of
// its chunks.
#pragma once

#include "gpu/attention.cuh"

namespace batchinfer::gpu {

inline constexpr int kChunk = 16;  // positions; pages hold a whole number of them

// What is kept of a warp's chunks in shared memory: kStages as they lie in the cache, and of codes one as bf16.
template <class C, int E>
constexpr int kStages = kAsyncCopies ? (E == 128 ? 3 : 4) + (kCodes<C> ? E == 128 ? 1 : 2 : 0) : 1;
template <int E>
constexpr int kBlocks = E == 128 ? 2 : 3;  // per multiprocessor
template <int E>
constexpr int kChunkBytes = 2 * kChunk * E * 2;
template <class C, int E>
constexpr int kStageBytes = kChunkBytes<E> / (kCodes<C> ? 2 : 1);
template <class C, int E>
constexpr int kWarpBytes = kStages<C, E> * kStageBytes<C, E> + (kCodes<C> ? kChunkBytes<E> : 0);
template <class C, int E>
constexpr int kSharedBytes = kDecodeThreads / 32 * kWarpBytes<C, E>;  // of targets with 32 lanes, the most

#if BATCHINFER_MMA

// Chunks whose scores a warp has in registers, of those that all warps compute. AMD's have no room for several.
inline constexpr int kChunksAtOnce = kAsyncCopies ? kDecodeWarps : 1;

// Where row `row` of a tile stands in [tokens, heads], from its first: the heads of a kv head, member by member.
// Members have one token each, one after the other.
__device__ __forceinline__ int64_t row_offset(const AttentionPlan& p, int row) {
    const int group = p.heads / p.kv_heads;
    return int64_t{row / group} * p.heads + row % group;
}

// Of a kv head the query heads that fit a tile of rows.
struct Heads {
    int number;  // among those of all kv heads
    int kv_head, first, count;

    __device__ __forceinline__ Heads(const AttentionPlan& p, int number_) : number(number_) {
        const int group = p.heads / p.kv_heads, tiles = row_tiles(p), tile = number % tiles;
        kv_head = number / tiles;
        first = kv_head * group + tile * kDecodeRows;
        count = min(group - tile * kDecodeRows, kDecodeRows);
    }
    __device__ __forceinline__ static int row_tiles(const AttentionPlan& p) {
        return (p.heads / p.kv_heads + kDecodeRows - 1) / kDecodeRows;
    }
};

// The first member's first head in [tokens, heads].
__device__ __forceinline__ int64_t first_row(const AttentionArgs& a, const DecodePart& part) {
    return int64_t{max(min(part.token, a.tokens - part.members), 0)} * a.plan.heads;
}
// Where a member's part of a head stands among the partial results.
__device__ __forceinline__ int64_t partial_row(const AttentionPlan& p, const DecodePart& part, int member, int head) {
    return int64_t{p.partial_start[part.sequence + member] + part.number} * p.heads + head;
}

// The 16 x E query tile, straight from global memory; missing rows are zero.
template <class T, int E>
__device__ __forceinline__ void load_queries(const AttentionPlan& p, const T* q, int rows, Operand (&query)[E / 16]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < E / 16; ++k) {
#pragma unroll
        for (int i = 0; i < Operand::kWords; ++i) {
            const int row = Operand::left_row(lane, i);
            const T* at = q + row_offset(p, row) * E + k * 16 + Operand::left_column(lane, i);
            query[k].word[i] = row < rows ? *reinterpret_cast<const uint32_t*>(at) : 0;
        }
    }
}

// Starts copying one chunk of keys and values. Rows at or after `end` become zeros, as no memory may hold a NaN there.
// A row's 16-byte pieces are permuted by its number, so that the 8 rows of a tile load fall into different banks; not
// those of codes, which are widened first.
template <class C, int E>
__device__ __forceinline__ void copy_chunk(SharedAddress to, const C* k, const C* v, int64_t offset, int left) {
    constexpr int kEach = 16 / sizeof(C), kPieces = E / kEach, kCopies = kChunk * kPieces / kWarp;
    [[maybe_unused]] constexpr int kAtOnce = kAsyncCopies ? kCopies : 4;  // others go through registers
    const int lane = threadIdx.x % kWarp;
#pragma unroll kAtOnce
    for (int i = 0; i < kCopies; ++i) {
        const int piece = (lane + i * kWarp) % kPieces, row = (lane + i * kWarp) / kPieces;
        const SharedAddress target = to + row * kPieces * 16 + (kCodes<C> ? piece : piece ^ row % 8) * 16;
        const int64_t source = offset + row * E + piece * kEach;
        copy_async(target, k + source, row < left);
        copy_async(target + kChunk * kPieces * 16, v + source, row < left);
    }
}

// Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over the chunks of one warp, base 2. `sum` is per lane
// until the end.
template <class T, int E>
struct RowState {
    Tile out[E / 16];
    float maximum[Tile::kRows], sum[Tile::kRows];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < E / 16; ++n) {
            out[n] = {};
        }
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            maximum[r] = -INFINITY, sum[r] = 0;
        }
    }

    // N chunks of consecutive positions, `stride` bytes apart: several at once are independent products to issue, and
    // one look at the maximum. `left` positions are before the part's end, the first `hidden` of them before the
    // window.
    template <bool kExtended, int N>
    __device__ __forceinline__ void add_chunks(SharedAddress shared, int stride, const Operand (&query)[E / 16],
                                               int left, int hidden, const ScoreMap<kExtended>& map) {
        const float scale = map.factor;
        const int first = Tile::column(threadIdx.x % kWarp, 0);
        Tile score[N] = {};
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
#pragma unroll
            for (int c = 0; c < N; ++c) {
                Operand key;
                load_right(key, [&](int row, int piece) {
                    return shared + c * stride + row * E * 2 + ((2 * k + piece) ^ row % 8) * 16;
                });
                multiply_add<T>(score[c], query[k], key);
            }
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const auto hide = [&](auto hidden_at) {
#pragma unroll
                for (int i = 0; i < Tile::kNumbers; ++i) {
                    if (hidden_at(c * kChunk + Tile::column(0, i))) score[c].x[i] = -INFINITY;
                }
            };
            if constexpr (kExtended) {
                map.cap_all(score[c].x);
                hide([&](int position) { return position < hidden - first; });
            }
            if (left < (c + 1) * kChunk) hide([&](int position) { return position >= left - first; });
        }
        float shrink[Tile::kRows];
        bool shrinks = false;
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            float top = highest(score[0], r);
#pragma unroll
            for (int c = 1; c < N; ++c) {
                top = fmaxf(top, highest(score[c], r));
            }
            top = across_row(top, [](float x, float y) { return fmaxf(x, y); });
            top = fmaxf(maximum[r], top * scale);
            shrink[r] = exp2_fast(maximum[r] - top);  // 0 for the first chunk, which always has a key
            shrinks |= shrink[r] != 1;
            maximum[r] = top;
            sum[r] *= shrink[r];
#pragma unroll
            for (int c = 0; c < N; ++c) {
#pragma unroll
                for (int i = 0; i < Tile::kNumbers; ++i) {
                    if (Tile::row_of(i) != r) continue;
                    score[c].x[i] = exp2_fast(score[c].x[i] * scale - top);
                    sum[r] += score[c].x[i];
                }
            }
        }
        if (any_lane(shrinks)) {
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
#pragma unroll
                for (int i = 0; i < Tile::kNumbers; ++i) {
                    out[n].x[i] *= shrink[Tile::row_of(i)];
                }
            }
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const Operand weights = rounded<T>(score[c]);
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
                Operand value;
                load_right_transposed(value, [&](int row, int piece) {
                    return shared + c * stride + (kChunk + row) * E * 2 + ((2 * n + piece) ^ row % 8) * 16;
                });
                multiply_add<T>(out[n], weights, value);
            }
        }
    }
};

// What the warps of a block share: the positions of a part; or its rows, each warp for all positions; or nothing, as
// each has a part of its own.
enum class Share { positions, rows, nothing };

// A warp's `rows` rows, from member `first` of the part on, over the positions that are its. `shared` are the block's
// kSharedBytes.
template <bool kExtended, Share kShare, class T, class C, int E>
__device__ __forceinline__ RowState<T, E> attend(const AttentionArgs& a, const DecodePart& part, const Heads& heads,
                                                 int first, int rows, unsigned char* shared) {
    constexpr int kWidened = kStages<C, E> * kStageBytes<C, E>;
    constexpr int kStride = kShare == Share::nothing ? 1 : kDecodeWarps;  // chunks of a round
    const AttentionPlan& p = a.plan;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const Pages pages(p, p.page_table + int64_t{part.slot} * p.slot_pages, heads.kv_head);
    const int window_begin = window_start(p, part.length - 1);
    const ScoreMap<kExtended> map(a);
    unsigned char* const own = shared + warp * kWarpBytes<C, E>;
    const int copied = kShare == Share::nothing ? 0 : warp;      // of a round's chunks, the one that the warp copies
    const int computed = kShare == Share::positions ? warp : 0;  // and the one that it computes, or the first
    const int rounds = ((part.end - part.begin + kChunk - 1) / kChunk + kStride - 1 - computed) / kStride;
    const auto sync = [] {
        if constexpr (kShare == Share::rows) {
            __syncthreads();
        } else {
            sync_warp();
        }
    };
    const auto start = [&](int round) {
        const int at = part.begin + (round * kStride + copied) * kChunk;
        if (round < rounds) {  // in the last one, of which all are computed, some may be zeros alone
            copy_chunk<C, E>(shared_address(own) + round % kStages<C, E> * kStageBytes<C, E>,
                             static_cast<const C*>(a.k_cache), static_cast<const C*>(a.v_cache),
                             pages.offset(min(at, part.end - 1) & ~(kChunk - 1)), part.end - at);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages<C, E> - 1; ++i) {
        start(i);
    }
    Operand query[E / 16];
    const int64_t row = first_row(a, part) + int64_t{first} * p.heads + heads.first;
    load_queries<T, E>(p, static_cast<const T*>(a.q) + row * E, rows, query);
    RowState<T, E> state;
    state.clear();
    for (int i = 0; i < rounds; ++i) {
        if constexpr (kAsyncCopies) {
            copy_wait<kStages<C, E> - 2>();
            sync();  // round i is there for all, and all have left round i - 1, whose place is filled now
            start(i + kStages<C, E> - 1);
        } else {
            sync();
            start(i);
            sync();
        }
        int stage = i % kStages<C, E> * kStageBytes<C, E>;
        if constexpr (kCodes<C>) {
            widen_rows<E, 2 * kChunk, kWarp>(own + stage, own + kWidened, lane);
            sync();
            stage = kWidened;
        }
        constexpr int kComputed = kShare == Share::rows ? kDecodeWarps : 1;
        constexpr int kAtOnce = kShare == Share::rows ? kChunksAtOnce : 1;
        unsigned char* const from = (kShare == Share::rows ? shared : own) + stage;
        const int position = part.begin + (i * kStride + computed) * kChunk;
#pragma unroll 1
        for (int c = 0; c < kComputed; c += kAtOnce) {
            const int at = position + c * kChunk;
            state.template add_chunks<kExtended, kAtOnce>(shared_address(from + c * kWarpBytes<C, E>), kWarpBytes<C, E>,
                                                          query, part.end - at, window_begin - at, map);
        }
    }
    copy_wait<0>();
    return state;
}

#endif  // BATCHINFER_MMA

}  // namespace batchinfer::gpu
