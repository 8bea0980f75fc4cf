// Attention of sequences with one token in the step: bound by reading the KV cache once.
//
// A block of 128 threads takes one (split, kv head). The up to 16 query heads of the kv head are the rows of one
// matrix-unit tile, so keys and values are read once for all of them; with 4 heads three quarters of the products are
// wasted, which by the unit's rate is a fifth of the time that the bytes take, or serve three more sequences with the
// same beginning (attention.cuh). The warps take chunks of 16 positions in turn, each with its own asynchronous copies,
// running maximum and sums: no block barrier in the loop. Bytes in flight are what counts: 3.0 TB/s with about 1 us of
// latency wants 23 KB a multiprocessor of an H100; 2 blocks x 4 warps x (kStages - 1) chunks of 8 KB (width 128) keep
// 128 KB in flight. AMD's GPUs have no such copies: a warp there waits for each of its chunks. A sequence longer than
// the split leaves normalised partial results; the block that finishes last adds them up in order.
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

// What one item is about.
struct Item {
    int sequence, members;  // the first, and how many share the item
    int part, kv_head, row_tile;
    int begin, end;  // positions
};

template <bool kExtended>
__device__ __forceinline__ Item decode_item(const AttentionPlan& p, const Sequence& q, int sequence, int index) {
    const int group = p.heads / p.kv_heads, tile = sequences_per_tile(group);
    const int row_tiles = (group + kDecodeRows - 1) / kDecodeRows;
    const int shared = p.shared[sequence], together = kExtended && p.window ? 0 : (shared + p.split - 1) / p.split;
    const int items_together = sequence % tile == 0 ? together * p.kv_heads : 0;
    Item item;
    item.sequence = sequence;
    if (index < items_together) {
        item.members = min(tile, p.sequences - sequence);
        item.row_tile = 0;
        item.kv_head = index % p.kv_heads;
        item.part = index / p.kv_heads;
        item.begin = item.part * p.split;
        item.end = min(shared, item.begin + p.split);
        return item;
    }
    index -= items_together;
    item.members = 1;
    item.row_tile = index % row_tiles;
    item.kv_head = index / row_tiles % p.kv_heads;
    const int alone = index / row_tiles / p.kv_heads;
    item.part = together + alone;
    item.begin = shared + alone * p.split;
    item.end = min(q.length, item.begin + p.split);
    return item;
}

// Where row `row` of a tile stands in [tokens, heads], from its first: the heads of a kv head, member by member.
// Members have one token each, one after the other.
__device__ __forceinline__ int64_t row_offset(const AttentionPlan& p, int row) {
    const int group = p.heads / p.kv_heads;
    return int64_t{row / group} * p.heads + row % group;
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

    // `left` positions are before the item's end, the first `hidden` of them before the window.
    template <bool kExtended>
    __device__ __forceinline__ void add_chunk(SharedAddress shared, const Operand (&query)[E / 16], int left,
                                              int hidden, const ScoreMap<kExtended>& map) {
        const float scale = map.factor;
        const int first = Tile::column(threadIdx.x % kWarp, 0);
        Tile score = {};
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            Operand key;
            load_right(key,
                       [&](int row, int piece) { return shared + row * E * 2 + ((2 * k + piece) ^ row % 8) * 16; });
            multiply_add<T>(score, query[k], key);
        }
        if constexpr (kExtended) {
            map.cap_all(score.x);
#pragma unroll
            for (int i = 0; i < Tile::kNumbers; ++i) {
                if (Tile::column(0, i) < hidden - first) score.x[i] = -INFINITY;
            }
        }
        if (left < kChunk) {
#pragma unroll
            for (int i = 0; i < Tile::kNumbers; ++i) {
                if (Tile::column(0, i) >= left - first) score.x[i] = -INFINITY;
            }
        }
        float shrink[Tile::kRows];
        bool shrinks = false;
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            float top = across_row(highest(score, r), [](float x, float y) { return fmaxf(x, y); });
            top = fmaxf(maximum[r], top * scale);
            shrink[r] = exp2_fast(maximum[r] - top);  // 0 for the first chunk, which always has a key
            shrinks |= shrink[r] != 1;
            maximum[r] = top;
            sum[r] *= shrink[r];
#pragma unroll
            for (int i = 0; i < Tile::kNumbers; ++i) {
                if (Tile::row_of(i) != r) continue;
                score.x[i] = exp2_fast(score.x[i] * scale - top);
                sum[r] += score.x[i];
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
        const Operand weights = rounded<T>(score);
#pragma unroll
        for (int n = 0; n < E / 16; ++n) {
            Operand value;
            load_right_transposed(value, [&](int row, int piece) {
                return shared + (kChunk + row) * E * 2 + ((2 * n + piece) ^ row % 8) * 16;
            });
            multiply_add<T>(out[n], weights, value);
        }
    }
};

// A warp's share of the item: chunks warp, warp + kWarps, ... of the range. `shared` are its kWarpBytes.
template <bool kExtended, class T, class C, int E>
__device__ __forceinline__ void walk(RowState<T, E>& state, const Operand (&query)[E / 16], const Pages& pages,
                                     const C* k, const C* v, const Item& item, unsigned char* shared, int window_begin,
                                     const ScoreMap<kExtended>& map) {
    constexpr int kWidened = kStages<C, E> * kStageBytes<C, E>;
    const SharedAddress stages = shared_address(shared);
    const int warp = threadIdx.x / kWarp;
    const int chunks = (item.end - item.begin + kChunk - 1) / kChunk;
    const int mine = (chunks - warp + kWarps - 1) / kWarps;
    const auto position = [&](int i) { return item.begin + (i * kWarps + warp) * kChunk; };
    const auto start = [&](int i) {
        if (i < mine) {
            const int at = position(i);
            copy_chunk<C, E>(stages + i % kStages<C, E> * kStageBytes<C, E>, k, v, pages.offset(at), item.end - at);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages<C, E> - 1; ++i) {
        start(i);
    }
    for (int i = 0; i < mine; ++i) {
        if constexpr (kAsyncCopies) {
            copy_wait<kStages<C, E> - 2>();
            sync_warp();  // chunk i is there for all lanes, and all have left chunk i - 1, whose place is filled now
            start(i + kStages<C, E> - 1);
        } else {
            sync_warp();
            start(i);
            sync_warp();
        }
        int chunk = i % kStages<C, E> * kStageBytes<C, E>;
        if constexpr (kCodes<C>) {
            widen_rows<E, 2 * kChunk, kWarp>(shared + chunk, shared + kWidened, threadIdx.x % kWarp);
            sync_warp();
            chunk = kWidened;
        }
        state.template add_chunk<kExtended>(stages + chunk, query, item.end - position(i), window_begin - position(i),
                                            map);
    }
    copy_wait<0>();
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

template <class T, class C, int E, bool kExtended>
__global__ void BATCHINFER_LAUNCH_BOUNDS(kThreads, kBlocks<E>) decode_kernel(AttentionArgs a) {
    BATCHINFER_DYNAMIC_SHARED(shared, 128);
    __shared__ int mailbox;
    __shared__ bool last;
    __shared__ float warp_lse[kWarps][kDecodeRows];
    const AttentionPlan& p = a.plan;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int group = p.heads / p.kv_heads;
    float* warp_out = reinterpret_cast<float*>(shared);  // [kWarps][kDecodeRows][E], once the chunks are done

    Queue queue(p.queues, p.decode_start[p.sequences], &mailbox);
    for (int index = queue.next(); index >= 0; index = queue.next()) {
        const int s = find_sequence(p.decode_start, p.sequences, index);
        const Sequence q = sequence_of(p, s, a.tokens);
        const Item item = decode_item<kExtended>(p, q, s, index - p.decode_start[s]);
        const int head = item.kv_head * group + item.row_tile * kDecodeRows;
        const int rows_each = min(group - item.row_tile * kDecodeRows, kDecodeRows);
        const int rows = rows_each * item.members;
        const int64_t out_row = int64_t{q.token} * p.heads + head;

        Operand query[E / 16];
        load_queries<T, E>(p, static_cast<const T*>(a.q) + out_row * E, rows, query);
        RowState<T, E> state;
        state.clear();
        walk<kExtended>(state, query, Pages(p, q.page_row, item.kv_head), static_cast<const C*>(a.k_cache),
                        static_cast<const C*>(a.v_cache), item, shared + warp * kWarpBytes<C, E>,
                        window_start(p, q.length - 1), ScoreMap<kExtended>(a));

        queue.draw();
        __syncthreads();  // all warps have left their chunks
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            const int row = Tile::row(lane, r);
            const float sum = across_row(state.sum[r], [](float a, float b) { return a + b; });
            const float inverse = sum > 0 ? 1 / sum : 0;  // a warp may have had no chunk
            if (Tile::leads(lane)) warp_lse[warp][row] = sum > 0 ? state.maximum[r] + log2f(sum) : -INFINITY;
            if (row < rows) {
                float* to = warp_out + (warp * kDecodeRows + row) * E;
#pragma unroll
                for (int n = 0; n < E / 16; ++n) {
                    store_row<float>(state.out[n], r, inverse, [&](int column) { return to + n * 16 + column; });
                }
            }
        }
        __syncthreads();
        const bool whole = p.partial_start[s] == p.partial_start[s + 1];
        for (int i = 4 * threadIdx.x; i < rows * E; i += 4 * kThreads) {
            const int row = i / E, member = row / rows_each;
            float total;
            const float4 value =
                merge_row(warp_out + i, kDecodeRows * E, &warp_lse[0][row], kDecodeRows, kWarps, total);
            if (whole) {
                store4(static_cast<T*>(a.out) + out_row * E + i, value);
                if (i % E == 0) a.lse[out_row + row] = total * kLn2;
            } else {
                const int64_t to = int64_t{p.partial_start[s + member] + item.part} * p.heads + head + row % rows_each;
                *reinterpret_cast<float4*>(p.partial_out + to * E + i % E) = value;
                if (i % E == 0) p.partial_lse[to] = total;
            }
        }
        if (whole) continue;

        __threadfence();
        for (int member = 0; member < item.members; ++member) {
            const int first_part = p.partial_start[s + member];
            const int parts = p.partial_start[s + member + 1] - first_part;
            __syncthreads();  // all have written, and have read `last`
            if (threadIdx.x == 0) {
                const int row_tiles = (group + kDecodeRows - 1) / kDecodeRows;
                int32_t* arrived = p.arrivals + ((s + member) * p.kv_heads + item.kv_head) * row_tiles + item.row_tile;
                last = atomicAdd(arrived, 1) == parts - 1;
                if (last) *arrived = 0;
            }
            __syncthreads();
            if (!last) continue;
            __threadfence();
            const int64_t from = int64_t{first_part} * p.heads + head;
            const int64_t to = out_row + int64_t{member} * p.heads;
            for (int i = 4 * threadIdx.x; i < rows_each * E; i += 4 * kThreads) {
                float total;
                const float4 value = merge_row(p.partial_out + from * E + i, int64_t{p.heads} * E,
                                               p.partial_lse + from + i / E, p.heads, parts, total);
                store4(static_cast<T*>(a.out) + to * E + i, value);
                if (i % E == 0) a.lse[to + i / E] = total * kLn2;
            }
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
