// Attention of sequences with one token in the step: bound by reading the KV cache once.
//
// A block of 128 threads takes one (part of a sequence, kv head). The up to 16 query heads of the kv head are the rows
// of one matrix-unit tile, so keys and values are read once for all of them; with 4 heads three quarters of the
// products are wasted, which by the unit's rate is a fifth of the time that the bytes take, or serve three more
// sequences with the same beginning (attention.cuh). The warps take chunks of 16 positions in turn, each with its own
// asynchronous copies, running maximum and sums: no block barrier in the loop. Bytes in flight are what counts: 3.0
// TB/s with about 1 us of latency wants 23 KB a multiprocessor of an H100; 2 blocks x 4 warps x (kStages - 1) chunks of
// 8 KB (width 128) keep 128 KB in flight. AMD's GPUs have no such copies: a warp there waits for each of its chunks. A
// sequence longer than the split leaves normalised partial results; the block that finishes last adds them up in order.
#include "gpu/attention.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 16;  // positions; pages hold a whole number of them

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
constexpr int kSharedBytes = kThreads / 32 * kWarpBytes<C, E>;  // of targets with 32 lanes, the most

#if BATCHINFER_MMA

constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps == kDecodeTiles);

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
    constexpr int kStride = kShare == Share::nothing ? 1 : kWarps;  // chunks of a round
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
        const int position = part.begin + (i * kStride + computed) * kChunk;
        state.template add_chunks<kExtended, kShare == Share::rows ? kWarps : 1>(
            shared_address((kShare == Share::rows ? shared : own) + stage), kWarpBytes<C, E>, query,
            part.end - position, window_begin - position, map);
    }
    copy_wait<0>();
    return state;
}

// Adds up `parts` results of one row in order: part i has values at out + i * out_stride and base-2 log-sum at
// lse[i * lse_stride]. Returns four of this thread's columns; `total` is the log-sum of all.
__device__ __forceinline__ float4 merge_row(const float* out, int64_t out_stride, const float* lse, int64_t lse_stride,
                                            int parts, float& total) {
    float top = -INFINITY;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) {
        top = fmaxf(top, lse[i * lse_stride]);
    }
    float sum = 0;
    float4 value = {};
#pragma unroll 8
    for (int i = 0; i < parts; ++i) {
        const float weight = exp2_fast(lse[i * lse_stride] - top);  // part 0 always has a key: top is finite
        const float4 part = *reinterpret_cast<const float4*>(out + i * out_stride);
        sum += weight;
        value.x += weight * part.x, value.y += weight * part.y;
        value.z += weight * part.z, value.w += weight * part.w;
    }
    total = top + log2f(sum);
    const float inverse = 1 / sum;
    return {value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse};
}

template <class T>
__device__ __forceinline__ void store4(T* to, const float4& x) {
    *reinterpret_cast<uint2*>(to) = {pack2<T>(x.x, x.y), pack2<T>(x.z, x.w)};
}

// What a warp has of its rows, for the part or for the positions of it that were the warp's.
template <class T, int E>
struct WarpRows {
    const RowState<T, E>& state;
    float inverse[Tile::kRows], lse[Tile::kRows];  // base 2

    __device__ __forceinline__ explicit WarpRows(const RowState<T, E>& s) : state(s) {
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            const float sum = across_row(state.sum[r], [](float a, float b) { return a + b; });
            inverse[r] = sum > 0 ? 1 / sum : 0;  // a warp may have had no chunk
            lse[r] = sum > 0 ? state.maximum[r] + log2f(sum) : -INFINITY;
        }
    }
    // Row r of the lane to E numbers from `to` on.
    template <class Out>
    __device__ __forceinline__ void store(int r, Out* to) const {
#pragma unroll
        for (int n = 0; n < E / 16; ++n) {
            store_row<Out>(state.out[n], r, inverse[r], [&](int column) { return to + n * 16 + column; });
        }
    }
};

// Stores rows that have been over all positions of the part.
template <class T, int E>
__device__ __forceinline__ void store_rows(const AttentionArgs& a, const DecodePart& part, const Heads& heads,
                                           int first, int rows, const RowState<T, E>& state) {
    const int lane = threadIdx.x % kWarp;
    const WarpRows<T, E> mine(state);
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const int row = Tile::row(lane, r);
        if (row >= rows) continue;
        const int member = first + row / heads.count, head = heads.first + row % heads.count;
        if (part.number < 0) {
            const int64_t to = first_row(a, part) + int64_t{member} * a.plan.heads + head;
            mine.store(r, static_cast<T*>(a.out) + to * E);
            if (Tile::leads(lane)) a.lse[to] = mine.lse[r] * kLn2;
        } else {
            const int64_t to = partial_row(a.plan, part, member, head);
            mine.store(r, a.plan.partial_out + to * E);
            if (Tile::leads(lane)) a.plan.partial_lse[to] = mine.lse[r];
        }
    }
}

// Adds up and stores what the warps of the block have of one member's or a tile's rows, each for positions of its own.
template <class T, class C, int E>
__device__ __forceinline__ void store_sum(const AttentionArgs& a, const DecodePart& part, const Heads& heads,
                                          const RowState<T, E>& state, unsigned char* shared) {
    __shared__ float warp_lse[kWarps][kDecodeRows];
    float* const warp_out = reinterpret_cast<float*>(shared);  // [kWarps][kDecodeRows][E]
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, rows = heads.count * part.members;
    const WarpRows<T, E> mine(state);
    __syncthreads();  // all warps have left their chunks
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const int row = Tile::row(lane, r);
        if (Tile::leads(lane)) warp_lse[warp][row] = mine.lse[r];
        if (row < rows) mine.store(r, warp_out + (warp * kDecodeRows + row) * E);
    }
    __syncthreads();
    for (int i = 4 * threadIdx.x; i < rows * E; i += 4 * kThreads) {
        const int row = i / E, member = row / heads.count, head = heads.first + row % heads.count;
        float total;
        const float4 value = merge_row(warp_out + i, kDecodeRows * E, &warp_lse[0][row], kDecodeRows, kWarps, total);
        if (part.number < 0) {
            const int64_t to = first_row(a, part) + int64_t{member} * a.plan.heads + head;
            store4(static_cast<T*>(a.out) + to * E + i % E, value);
            if (i % E == 0) a.lse[to] = total * kLn2;
        } else {
            const int64_t to = partial_row(a.plan, part, member, head);
            *reinterpret_cast<float4*>(a.plan.partial_out + to * E + i % E) = value;
            if (i % E == 0) a.plan.partial_lse[to] = total;
        }
    }
}

// Counts a member's part as done, whether it was the last of them.
__device__ __forceinline__ bool arrive(const AttentionPlan& p, const DecodePart& part, const Heads& heads, int member) {
    const int s = part.sequence + member, parts = p.partial_start[s + 1] - p.partial_start[s];
    int32_t* arrived = p.arrivals + s * p.kv_heads * Heads::row_tiles(p) + heads.number;
    const bool last = atomicAdd(arrived, 1) == parts - 1;
    if (last) *arrived = 0;
    return last;
}

// Adds up the parts of a member, in order: thread `thread` of so many threads.
template <class T, int E>
__device__ __forceinline__ void add_up(const AttentionArgs& a, const DecodePart& part, const Heads& heads, int member,
                                       int thread, int threads) {
    __threadfence();  // what others had stored before they arrived
    const AttentionPlan& p = a.plan;
    const int s = part.sequence + member, first_part = p.partial_start[s];
    const int64_t from = int64_t{first_part} * p.heads + heads.first;
    const int64_t to = first_row(a, part) + int64_t{member} * p.heads + heads.first;
    for (int i = 4 * thread; i < heads.count * E; i += 4 * threads) {
        float total;
        const float4 value = merge_row(p.partial_out + from * E + i, int64_t{p.heads} * E, p.partial_lse + from + i / E,
                                       p.heads, p.partial_start[s + 1] - first_part, total);
        store4(static_cast<T*>(a.out) + to * E + i, value);
        if (i % E == 0) a.lse[to + i / E] = total * kLn2;
    }
}

template <class T, class C, int E, bool kExtended>
__global__ void BATCHINFER_LAUNCH_BOUNDS(kThreads, kBlocks<E>) decode_kernel(AttentionArgs a) {
    BATCHINFER_DYNAMIC_SHARED(shared, 128);
    __shared__ int mailbox;
    __shared__ bool last[kDecodeTiles * kDecodeRows];
    const AttentionPlan& p = a.plan;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int each = sequences_per_tile(p.heads / p.kv_heads), all_heads = p.kv_heads * Heads::row_tiles(p);
    const int long_items = p.part_counts[0] * all_heads,
              short_tasks = p.part_counts[1] * all_heads;  // of a block; of a warp

    Queue queue(p.queues, long_items + (short_tasks + kWarps - 1) / kWarps, &mailbox);
    for (int index = queue.next(); index >= 0; index = queue.next()) {
        if (index >= long_items) {
            const int task = (index - long_items) * kWarps + warp;
            if (task < short_tasks) {
                const DecodePart part = p.short_parts[task / all_heads];
                const Heads heads(p, task % all_heads);
                const auto state = attend<kExtended, Share::nothing, T, C, E>(a, part, heads, 0, heads.count, shared);
                store_rows(a, part, heads, 0, heads.count, state);
                if (part.number >= 0) {
                    __threadfence();
                    sync_warp();  // all have written
                    if (any_lane(lane == 0 && arrive(p, part, heads, 0))) add_up<T, E>(a, part, heads, 0, lane, kWarp);
                }
            }
            queue.draw();
            continue;
        }
        const DecodePart part = p.parts[index / all_heads];
        const Heads heads(p, index % all_heads);
        if (part.members > each) {
            const int first = warp * each, rows = max(min(part.members - first, each), 0) * heads.count;
            const auto state = attend<kExtended, Share::rows, T, C, E>(a, part, heads, first, rows, shared);
            queue.draw();
            store_rows(a, part, heads, first, rows, state);
        } else {
            const int rows = part.members * heads.count;
            const auto state = attend<kExtended, Share::positions, T, C, E>(a, part, heads, 0, rows, shared);
            queue.draw();
            store_sum<T, C, E>(a, part, heads, state, shared);
        }
        if (part.number < 0) continue;
        __threadfence();
        __syncthreads();  // all have written
        if (const int member = threadIdx.x; member < part.members) last[member] = arrive(p, part, heads, member);
        __syncthreads();
        for (int member = 0; member < part.members; ++member) {
            if (last[member]) add_up<T, E>(a, part, heads, member, threadIdx.x, kThreads);
        }
    }
    queue.finish();
}

#else
template <class T, class C, int E, bool kExtended>
__global__ void decode_kernel(AttentionArgs) {}
#endif  // BATCHINFER_MMA

template <class T, class C, int E, bool kExtended>
void launch(const AttentionArgs& a, Stream stream) {
    constexpr int kShared = kSharedBytes<C, E>;
    static const int blocks = persistent_blocks(decode_kernel<T, C, E, kExtended>, kThreads, kShared);
    gpuLaunch(decode_kernel<T, C, E, kExtended>, blocks, kThreads, kShared, native(stream), a);
    check_launch("attention (decode)");
}

}  // namespace

void attention_decode(const AttentionArgs& a, Stream stream) {
    if (a.cache_dtype == GpuDtype::e4m3) {
        return with_width_of_codes(a, [&](auto width) { launch<bf16, e4m3, width, true>(a, stream); });
    }
    with_matrix_shape(
        a, [&](auto t, auto width, auto extended) { launch<decltype(t), decltype(t), width, extended>(a, stream); });
}

}  // namespace batchinfer::gpu
