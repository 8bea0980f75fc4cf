// Attention of sequences with several tokens in the step, for compute capability 9.0: the pipeline of FlashAttention-3
// (Shah et al. 2024, arXiv:2407.08608) over paged keys. attention_prefill.cu does the same for other GPUs; its matrix
// instructions reach two thirds of this chip's rate at best.
//
// A block of three warpgroups takes 128 rows of one kv head against tiles of 128 positions. One group only copies:
// boxes by the tensor memory accelerator, and 16 bytes a thread where rows past the end must become zeros. Keys and
// values have two buffers each. Two groups of 64 rows compute: the products of the next scores are issued before the
// softmax of this tile's and run together with the products of the values, so that the special function unit works
// while the matrix unit does. Copiers give registers to computers (224: 64 output, 64 scores, 32 weights of the tile
// before). On an H100 598 TFLOP/s (8,192 tokens, causal, width 128).
#ifdef BATCHINFER_SM90A  // CUDA from 12 on
#include <algorithm>

#include "gpu/attention.cuh"
#include "gpu/panels.cuh"
#include "gpu/tma.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kThreads = 384;
constexpr int kKeys = 128;  // positions of a tile
constexpr int kStages = 2;

template <int E>
constexpr int kTileBytes = kKeys * E * 2;
template <int E>
constexpr int kQueryBytes = kPrefillRows * E * 2;
template <int E>
constexpr int kSharedBytes = kQueryBytes<E> + 2 * kStages * kTileBytes<E> + 1024;  // 1024: to align

// The caches as matrices [pages x kv_heads x page_size, E], in boxes of `rows` rows: a page, or a tile if that is less.
struct CacheBoxes {
    BoxMap keys, values;
    int rows;
};

#if BATCHINFER_WGMMA

constexpr int kCopyThreads = 128;
constexpr int kGroupRows = 64;
constexpr int kItemsAhead = 2;
constexpr float kSlack = 8;  // see attention_prefill.cu

struct Barriers {
    uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
    uint64_t item_full[kItemsAhead], item_empty[kItemsAhead];
    int item[kItemsAhead];
};

// What all warps of the block must agree on: the item numbers, handed out by thread 0 one ahead.
__device__ __forceinline__ int take_item(Barriers& b, int n) {
    barrier_wait(shared_address(&b.item_full[n % kItemsAhead]), n / kItemsAhead & 1);
    const int item = *const_cast<volatile int*>(&b.item[n % kItemsAhead]);
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&b.item_empty[n % kItemsAhead]));
    return item;
}
__device__ __forceinline__ void post_item(Barriers& b, int n, int item) {
    barrier_wait(shared_address(&b.item_empty[n % kItemsAhead]), (n / kItemsAhead & 1) ^ 1);
    *const_cast<volatile int*>(&b.item[n % kItemsAhead]) = item;
    barrier_arrive(shared_address(&b.item_full[n % kItemsAhead]));
}

template <bool kExtended>
struct Item {
    Sequence sequence;
    int kv_head, first, count, group, heads, before;
    int start, length;  // positions that some row sees, whole tiles from the start
    int64_t base;       // row 0 of the sequence and kv head in [tokens, heads]

    __device__ __forceinline__ Item(const AttentionPlan& p, int index, int step_tokens) {
        const int s = find_sequence(p.prefill_start, p.sequences, index);
        sequence = sequence_of(p, s, step_tokens);
        group = p.heads / p.kv_heads, heads = p.heads;
        const int tiles = (sequence.tokens * group + kPrefillRows - 1) / kPrefillRows;
        const int inside = index - p.prefill_start[s];
        kv_head = inside % p.kv_heads;
        first = (tiles - 1 - inside / p.kv_heads) * kPrefillRows;
        count = min(sequence.tokens * group - first, kPrefillRows);
        before = sequence.length - sequence.tokens;
        length = limit(count - 1) + 1;
        start = kExtended ? window_start(p, limit(0)) & ~(kKeys - 1) : 0;
        base = int64_t{sequence.token} * heads + kv_head * group;
    }
    // Last position that a row of the item may see (the first is window_start() of it), and the row's place in [tokens,
    // heads].
    __device__ __forceinline__ int limit(int row) const { return before + (first + row) / group; }
    __device__ __forceinline__ int64_t global(int row) const {
        return base + int64_t{(first + row) / group} * heads + (first + row) % group;
    }
};

// The copying warpgroup. It never waits for data: the copies themselves arrive at the barrier. A tile of the sequence
// comes in boxes, of a page or the part of one that the tile takes; its eight runs of 16 positions are looked up by
// eight lanes, a tile ahead. A sequence's last tile, whose rows past the end must become zeros, comes 16 bytes a
// thread; a thread's places in shared memory differ between tiles and runs by constants alone.
template <class T, int E, bool kExtended>
__device__ void copy_tiles(const AttentionArgs& a, const CacheBoxes& boxes, Barriers& b, uint32_t buffers) {
    constexpr int kPieces = E / 8, kRowsAtOnce = kCopyThreads / kPieces;  // 8 or 16: a page holds whole runs of 16
    constexpr int kRuns = kKeys / 16;
    const AttentionPlan& p = a.plan;
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces, lane = threadIdx.x % kWarp;
    const int items = p.prefill_start[p.sequences];
    const int64_t inside = row * E + piece * 8;
    const int box_column = threadIdx.x / kRuns * kBoxColumns;
    const bool has_box = box_column < E && threadIdx.x % kRuns * 16 % boxes.rows == 0;
    const uint32_t box_place = box_column / kBoxColumns * kKeys * kPanel + threadIdx.x % kRuns * 16 * kPanel;
    if (threadIdx.x == 0) post_item(b, 0, static_cast<int>(blockIdx.x) < items ? static_cast<int>(blockIdx.x) : -1);
    __syncwarp();
    int tile = 0;
    for (int n = 0;; ++n) {
        const int index = take_item(b, n);
        if (index < 0) return;
        const Item<kExtended> item(p, index, a.tokens);
        const Pages pages(p, item.sequence.page_row, item.kv_head);
        const auto look_up = [&](int begin) {
            return pages.cache_row(min(begin + lane % kRuns * 16, item.sequence.length - 1) & ~15);
        };
        int next = look_up(item.start);
        for (int begin = item.start; begin < item.length; begin += kKeys, ++tile) {
            const int found = next, stage = tile % kStages, left = item.length - begin - row;
            const bool whole = begin + kKeys <= item.sequence.length;
            next = look_up(begin + kKeys);
            const auto copy = [&](const void* cache, const BoxMap& map, uint32_t buffer, uint64_t* full,
                                  uint64_t* empty) {
                const uint32_t barrier = shared_address(full + stage);
                barrier_wait(shared_address(empty + stage), (tile / kStages & 1) ^ 1);
                __syncwarp();
                if (whole) {
                    // Each warp for itself, or one that is late could find the phase it waits for two phases ago.
                    if (lane == 0) barrier_arrive_expecting(barrier, kWarp, threadIdx.x == 0 ? kTileBytes<E> : 0);
                    if (has_box) copy_box(buffer + box_place, map, found, box_column, barrier);
                    return;
                }
                const uint32_t target = buffer + place(row, piece, kKeys);
#pragma unroll
                for (int run = 0; run < kKeys; run += 16) {
                    const T* from =
                        static_cast<const T*>(cache) + inside + int64_t{__shfl_sync(kAllLanes, found, run / 16)} * E;
#pragma unroll
                    for (int i = 0; i < 16; i += kRowsAtOnce) {
                        copy_async(target + (run + i) * kPanel, from + i * E, run + i < left);
                    }
                }
                barrier_arrive_after_copies(barrier);
            };
            copy(a.k_cache, boxes.keys, buffers + stage * kTileBytes<E>, b.keys_full, b.keys_empty);
            copy(a.v_cache, boxes.values, buffers + (kStages + stage) * kTileBytes<E>, b.values_full, b.values_empty);
        }
        if (threadIdx.x == 0) {
            const int drawn = gridDim.x + atomicAdd(p.queues + 2, 1);
            post_item(b, n + 1, drawn < items ? drawn : -1);
        }
        __syncwarp();
    }
}

// A computing warpgroup's 64 rows. Row h of a lane: 16 warp + 8 h + lane / 4.
template <class T, int E, bool kExtended>
struct GroupRows {
    float out[E / 2], maximum[2], sum[2];
    uint32_t weight[kKeys / 16][4];

    __device__ __forceinline__ void issue_scores(float (&score)[kKeys / 2], uint32_t queries, uint32_t keys) {
        products_begin();
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            const uint32_t q = queries + k / 4 * kGroupRows * kPanel + k % 4 * 32;
            const uint32_t key = keys + k / 4 * kKeys * kPanel + k % 4 * 32;
            Products<T, kKeys / 2>::scores(score, operand(q, 0), operand(key, 0), k > 0);
        }
        products_commit();
    }
    __device__ __forceinline__ void issue_values(uint32_t values) {
        products_begin();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            Products<T, E / 2>::values(out, weight[k], operand(values + k * 16 * kPanel, kKeys * kPanel));
        }
        products_commit();
    }

    // Scores to 2**(score - maximum) in place; returns what the output must be multiplied with, if `moved`.
    __device__ __forceinline__ float2 soften(float (&score)[kKeys / 2], float scale, bool& moved) {
        float top[2] = {-INFINITY, -INFINITY}, shrink[2] = {1, 1};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            top[i / 2 % 2] = fmaxf(top[i / 2 % 2], score[i]);
        }
        bool exceeded = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
            top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
            top[h] = fmaxf(maximum[h], top[h] * scale);
            exceeded |= top[h] > maximum[h] + kSlack;
        }
        moved = __any_sync(kAllLanes, exceeded);
        if (moved) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                shrink[h] = exp2_fast(maximum[h] - top[h]);
                maximum[h] = top[h];
                sum[h] *= shrink[h];
            }
        }
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            score[i] = exp2_fast(score[i] * scale - maximum[i / 2 % 2]);
            sum[i / 2 % 2] += score[i];
        }
        return {shrink[0], shrink[1]};
    }
    __device__ __forceinline__ void rescale(float2 shrink) {
#pragma unroll
        for (int i = 0; i < E / 2; ++i) {
            out[i] *= i / 2 % 2 ? shrink.y : shrink.x;
        }
    }
    __device__ __forceinline__ void pack(const float (&score)[kKeys / 2]) {
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) {
            weight[i / 4][i % 4] = pack2<T>(score[2 * i], score[2 * i + 1]);
        }
    }
    // The soft cap, and -inf for what a row may not see.
    __device__ __forceinline__ static void mask(float (&score)[kKeys / 2], const Item<kExtended>& item, int first,
                                                int begin, const AttentionPlan& p, const ScoreMap<kExtended>& map) {
        const int lane = threadIdx.x % kWarp, row = first + threadIdx.x / kWarp % 4 * 16 + lane / 4;
        if constexpr (kExtended) {
            map.cap_all(score);
            if (begin < window_start(p, item.limit(first + kGroupRows - 1))) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int hidden = window_start(p, item.limit(row + 8 * h)) - begin - lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n) {
                        if (n * 8 < hidden) score[4 * n + 2 * h] = -INFINITY;
                        if (n * 8 + 1 < hidden) score[4 * n + 2 * h + 1] = -INFINITY;
                    }
                }
            }
        }
        if (begin + kKeys <= item.limit(first) + 1) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int visible = item.limit(row + 8 * h) - begin - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
                if (n * 8 > visible) score[4 * n + 2 * h] = -INFINITY;
                if (n * 8 + 1 > visible) score[4 * n + 2 * h + 1] = -INFINITY;
            }
        }
    }
};

// The warpgroup's rows of q into its part of shared memory, or its results from there to `out`.
template <class T, int E, bool kExtended>
__device__ __forceinline__ void copy_queries(uint32_t to, const AttentionArgs& a, const Item<kExtended>& item,
                                             int first) {
    constexpr int kPieces = E / 8;
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < kGroupRows * kPieces; i += 128) {
        const int row = i / kPieces, piece = i % kPieces;
        const bool wanted = first + row < item.count;
        copy_async(to + place(row, piece, kGroupRows),
                   static_cast<const T*>(a.q) + item.global(wanted ? first + row : 0) * E + piece * 8, wanted);
    }
    copy_commit();
    copy_wait<0>();
    fence_async_proxy();
}

template <class T, int E, bool kExtended>
__device__ __forceinline__ void store_rows(GroupRows<T, E, kExtended>& state, unsigned char* rows,
                                           const AttentionArgs& a, const Item<kExtended>& item, int first) {
    constexpr int kPieces = E / 8;
    const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float sum = state.sum[h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const float inverse = 1 / sum;
        const int row = warp_row + lane / 4 + 8 * h;
        if (lane % 4 == 0 && first + row < item.count) {
            a.lse[item.global(first + row)] = (state.maximum[h] + log2f(sum)) * kLn2;
        }
#pragma unroll
        for (int n = 0; n < E / 8; ++n) {
            *reinterpret_cast<uint32_t*>(rows + place(row, n, kGroupRows) + lane % 4 * 4) =
                pack2<T>(state.out[4 * n + 2 * h] * inverse, state.out[4 * n + 2 * h + 1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < 16 * kPieces; i += kWarp) {
        const int row = warp_row + i / kPieces, piece = i % kPieces;
        if (first + row < item.count) {
            *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + item.global(first + row) * E + piece * 8) =
                *reinterpret_cast<const uint4*>(rows + place(row, piece, kGroupRows));
        }
    }
}

template <class T, int E, bool kExtended>
__device__ void compute(const AttentionArgs& a, Barriers& b, unsigned char* shared, int group) {
    unsigned char* my_rows = shared + group * kGroupRows * E * 2;
    const uint32_t queries = shared_address(my_rows);
    const uint32_t keys = shared_address(shared) + kQueryBytes<E>, values = keys + kStages * kTileBytes<E>;
    const int first = group * kGroupRows;
    const ScoreMap<kExtended> map(a);
    const float scale = map.factor;
    const auto wait_full = [&](uint64_t* full, int tile) {
        barrier_wait(shared_address(full + tile % kStages), tile / kStages & 1);
    };
    const auto release = [&](uint64_t* empty, int tile) {
        if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(empty + tile % kStages));
    };
    int tile = 0;  // of all items
    for (int n = 0;; ++n) {
        const int index = take_item(b, n);
        if (index < 0) return;
        const Item<kExtended> item(a.plan, index, a.tokens);
        copy_queries<T, E>(queries, a, item, first);
        named_barrier(1 + group);

        GroupRows<T, E, kExtended> state;
        state.maximum[0] = state.maximum[1] = kExtended ? kNoScore : -INFINITY;
        state.sum[0] = state.sum[1] = 0;
#pragma unroll
        for (int i = 0; i < E / 2; ++i) {
            state.out[i] = 0;
        }
        float score[kKeys / 2];
        bool moved;
        wait_full(b.keys_full, tile);
        fence_async_proxy();
        state.issue_scores(score, queries, keys + tile % kStages * kTileBytes<E>);
        products_wait<0>();
        pin(score);
        release(b.keys_empty, tile);
        state.mask(score, item, first, item.start, a.plan, map);
        state.soften(score, scale, moved);
        state.pack(score);
        for (int begin = item.start + kKeys; begin < item.length; begin += kKeys) {
            wait_full(b.values_full, tile);
            wait_full(b.keys_full, tile + 1);
            fence_async_proxy();  // the copies were ordinary writes
            state.issue_scores(score, queries, keys + (tile + 1) % kStages * kTileBytes<E>);
            pin(state.out);
            state.issue_values(values + tile % kStages * kTileBytes<E>);
            products_wait<1>();
            pin(score);
            release(b.keys_empty, tile + 1);
            state.mask(score, item, first, begin, a.plan, map);
            const float2 shrink = state.soften(score, scale, moved);
            pin(score);  // or the compiler moves the exponentials behind the wait, where they overlap with nothing
            products_wait<0>();
            pin(state.out);
            release(b.values_empty, tile);
            if (moved) state.rescale(shrink);
            state.pack(score);
            ++tile;
        }
        wait_full(b.values_full, tile);
        fence_async_proxy();
        pin(state.out);
        state.issue_values(values + tile % kStages * kTileBytes<E>);
        products_wait<0>();
        pin(state.out);
        release(b.values_empty, tile);
        ++tile;
        named_barrier(1 + group);  // the group's products have read the queries
        store_rows(state, my_rows, a, item, first);
        named_barrier(1 + group);
    }
}

template <class T, int E, bool kExtended>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(AttentionArgs a, const __grid_constant__ CacheBoxes boxes) {
    BATCHINFER_DYNAMIC_SHARED(unaligned, 1);
    __shared__ Barriers b;
    unsigned char* shared = unaligned + (-shared_address(unaligned) & 1023);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&b.keys_full[i]), kCopyThreads);
            barrier_init(shared_address(&b.values_full[i]), kCopyThreads);
            barrier_init(shared_address(&b.keys_empty[i]), 8);  // computing warps
            barrier_init(shared_address(&b.values_empty[i]), 8);
        }
        for (int i = 0; i < kItemsAhead; ++i) {
            barrier_init(shared_address(&b.item_full[i]), 1);
            barrier_init(shared_address(&b.item_empty[i]), kThreads / kWarp);
        }
        fence_async_proxy();
    }
    __syncthreads();
    if (threadIdx.x < kCopyThreads) {
        registers_give<56>();
        copy_tiles<T, E, kExtended>(a, boxes, b, shared_address(shared) + kQueryBytes<E>);
        if (threadIdx.x == 0) {
            int32_t* queue = a.plan.queues + 2;
            __threadfence();
            if (atomicAdd(queue + 1, 1) == gridDim.x - 1) queue[0] = queue[1] = 0;
        }
    } else {
        registers_take<224>();
        compute<T, E, kExtended>(a, b, shared, threadIdx.x / 128 - 1);
    }
}

#else
template <class T, int E, bool kExtended>
__global__ void prefill_kernel(AttentionArgs, const __grid_constant__ CacheBoxes) {}
#endif  // BATCHINFER_WGMMA

template <class T, int E, bool kExtended>
void launch(const AttentionArgs& a, Stream stream) {
    static const int blocks = persistent_blocks(prefill_kernel<T, E, kExtended>, kThreads, kSharedBytes<E>);
    const AttentionPlan& p = a.plan;
    const int64_t rows = int64_t{p.pages} * p.kv_heads * p.page_size;
    const int box_rows = std::min(p.page_size, kKeys);
    const CacheBoxes boxes{box_map(a.k_cache, rows, E, box_rows), box_map(a.v_cache, rows, E, box_rows), box_rows};
    gpuLaunch(prefill_kernel<T, E, kExtended>, blocks, kThreads, kSharedBytes<E>, native(stream), a, boxes);
    check_launch("attention (prefill, 9.0)");
}

}  // namespace

void attention_prefill_sm90(const AttentionArgs& a, Stream stream) {
    with_matrix_shape(a, [&](auto t, auto width, auto extended) { launch<decltype(t), width, extended>(a, stream); });
}

}  // namespace batchinfer::gpu
#endif  // BATCHINFER_SM90A
