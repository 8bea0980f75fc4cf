// Attention of sequences with one token in the step: bound by reading the KV cache once.
//
// A block of 128 threads takes one (part of a sequence, kv head). The up to 16 query heads of the kv head are the rows
// of one matrix-unit tile, so keys and values are read once for all of them; with 4 heads three quarters of the
// products are wasted, which by the unit's rate is a fifth of the time that the bytes take, or serve three more
// sequences that share the part. How the warps divide the work depends on the part:
//
//   positions  They take chunks in turn, with no block barrier until what they have is added up.
//   rows       Of a part that more sequences share than fit a tile, each warp has sequences of its own and computes all
//              chunks, while it copies every fourth: with 4 heads on a kv head, what is read serves 16 sequences.
//   nothing    With short parts each warp has one of its own. A part costs 8 us whatever its length, in which a block
//              waits: for its number, its place, its page, its first chunk, its arrival among the others.
//
// A sequence of several parts leaves normalised partial results; who finishes last adds them up in order. A warp that
// begins when the others are done (who share a beginning mostly find it so) keeps its own results in registers: 6 % of
// the time of 1,000 sequences of 8B with 2,048 positions in common.
#include "gpu/decode_rows.cuh"

namespace batchinfer::gpu {
namespace {

#if BATCHINFER_MMA

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
        value.x = fmaf(weight, part.x, value.x), value.y = fmaf(weight, part.y, value.y);
        value.z = fmaf(weight, part.z, value.z), value.w = fmaf(weight, part.w, value.w);
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
    __shared__ float warp_lse[kDecodeWarps][kDecodeRows];
    float* const warp_out = reinterpret_cast<float*>(shared);  // [kDecodeWarps][kDecodeRows][E]
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
    for (int i = 4 * threadIdx.x; i < rows * E; i += 4 * kDecodeThreads) {
        const int row = i / E, member = row / heads.count, head = heads.first + row % heads.count;
        float total;
        const float4 value =
            merge_row(warp_out + i, kDecodeRows * E, &warp_lse[0][row], kDecodeRows, kDecodeWarps, total);
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

// How many of a member's parts are done.
__device__ __forceinline__ int32_t* arrivals_of(const AttentionPlan& p, const DecodePart& part, const Heads& heads,
                                                int member) {
    return p.arrivals + (part.sequence + member) * p.kv_heads * Heads::row_tiles(p) + heads.number;
}

// Counts a member's part as done, whether it was the last of them.
__device__ __forceinline__ bool arrive(const AttentionPlan& p, const DecodePart& part, const Heads& heads, int member) {
    const int s = part.sequence + member, parts = p.partial_start[s + 1] - p.partial_start[s];
    int32_t* arrived = arrivals_of(p, part, heads, member);
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

// Of a sequence whose other parts were done when this, its last one, began: adds `state` up with them. The operations
// are merge_row()'s on what store_rows() would have stored, and so are the bits.
template <class T, int E>
__device__ __forceinline__ void store_with_others(const AttentionArgs& a, const DecodePart& part, const Heads& heads,
                                                  const RowState<T, E>& state) {
    __threadfence();  // what others had stored before they arrived
    const AttentionPlan& p = a.plan;
    const int lane = threadIdx.x % kWarp;
    const WarpRows<T, E> mine(state);
    if (lane == 0) *arrivals_of(p, part, heads, 0) = 0;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const int row = Tile::row(lane, r);
        if (row >= heads.count) continue;
        const int64_t from = int64_t{p.partial_start[part.sequence]} * p.heads + heads.first + row;
        float top = mine.lse[r];
        for (int i = 0; i < part.number; ++i) {
            top = fmaxf(top, p.partial_lse[from + int64_t{i} * p.heads]);
        }
        Tile value[E / 16] = {};
        float sum = 0;
        const auto add = [&](float weight, auto number) {
            sum += weight;
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
#pragma unroll
                for (int i = 0; i < Tile::kNumbers; ++i) {
                    if (Tile::row_of(i) == r) value[n].x[i] = fmaf(weight, number(n, i), value[n].x[i]);
                }
            }
        };
        for (int i = 0; i < part.number; ++i) {
            const int64_t at = from + int64_t{i} * p.heads;
            const float* its = p.partial_out + at * E;
            add(exp2_fast(p.partial_lse[at] - top), [&](int n, int k) { return its[n * 16 + Tile::column(lane, k)]; });
        }
        add(exp2_fast(mine.lse[r] - top), [&](int n, int k) { return state.out[n].x[k] * mine.inverse[r]; });
        const float inverse = 1 / sum;
        const int64_t to = first_row(a, part) + heads.first + row;
#pragma unroll
        for (int n = 0; n < E / 16; ++n) {
            store_row<T>(value[n], r, inverse,
                         [&](int column) { return static_cast<T*>(a.out) + to * E + n * 16 + column; });
        }
        if (Tile::leads(lane)) a.lse[to] = (top + log2f(sum)) * kLn2;
    }
}

template <class T, class C, int E, bool kExtended>
__global__ void BATCHINFER_LAUNCH_BOUNDS(kDecodeThreads, kBlocks<E>) decode_kernel(AttentionArgs a) {
    BATCHINFER_DYNAMIC_SHARED(shared, 128);
    __shared__ int mailbox;
    __shared__ bool last[kDecodeWarps * kDecodeRows];
    const AttentionPlan& p = a.plan;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int each = sequences_per_tile(p.heads / p.kv_heads), all_heads = p.kv_heads * Heads::row_tiles(p);
    const int long_items = p.part_counts[0] * all_heads;   // of a block
    const int short_tasks = p.part_counts[1] * all_heads;  // of a warp

    Queue queue(p.queues, long_items + (short_tasks + kDecodeWarps - 1) / kDecodeWarps, &mailbox);
    for (int index = queue.next(); index >= 0; index = queue.next()) {
        if (index >= long_items) {
            const int task = (index - long_items) * kDecodeWarps + warp;
            if (task < short_tasks) {
                const DecodePart part = p.short_parts[task / all_heads];
                const Heads heads(p, task % all_heads);
                const bool others_done =
                    part.number > 0 && *const_cast<volatile int32_t*>(arrivals_of(p, part, heads, 0)) == part.number;
                const auto state = attend<kExtended, Share::nothing, T, C, E>(a, part, heads, 0, heads.count, shared);
                if (any_lane(lane == 0 && others_done)) {  // it is lane 0's count that all go by
                    store_with_others(a, part, heads, state);
                    queue.draw();
                    continue;
                }
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
            if (last[member]) add_up<T, E>(a, part, heads, member, threadIdx.x, kDecodeThreads);
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
    static const int blocks = persistent_blocks(decode_kernel<T, C, E, kExtended>, kDecodeThreads, kShared);
    gpuLaunch(decode_kernel<T, C, E, kExtended>, blocks, kDecodeThreads, kShared, native(stream), a);
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
