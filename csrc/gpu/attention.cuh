// What the attention kernels share: how a step becomes work items, and how an item finds its sequence and its pages.
//
// Three kernels. Sequences with one token in the step go to attention_decode.cu, cut into (part of the KV range, kv
// head) items; the others to attention_prefill.cu, cut into (tile of query rows, kv head) items. A row is one query
// head of one token, and the heads of a kv head stand together, token by token, so that they share its keys. Other
// dtypes, head widths and GPUs without matrix units that mma.cuh knows take attention_generic.cu.
//
// Both lists are made by one small kernel a step and read by a persistent grid that draws item numbers from a counter.
// So the launch never depends on the data, and a captured step can be replayed with other lengths. Of prompts the list
// is a running sum over the sequences; of decoding, whose items take 10 to 30 us, it has all that a block must know of
// a part in one place. The split is fixed: a sequence's sums depend on no neighbour but those that it shares pages
// with.
//
// Shared beginnings (Hydragen, Juravsky et al. 2024, arXiv:2402.05099, gives the idea). A tile of 16 rows has room for
// the query heads of several sequences, and a block for several tiles. What decoding sequences that stand side by side
// have in common at their beginning, by the page table, is read once for so many as fit: as parts of their own, whose
// results each sequence adds up with those of its other parts. With 4 heads on a kv head that is a sixteenth of the
// reads: of DRAM the L2 cache would save as many, but 1,000 sequences that share 2,048 positions keep it busy three
// times as long as their own positions keep DRAM.
//
// Windows and soft caps (Gemma 2, arXiv:2408.00118) are for kernels with kExtended; the others are compiled as if there
// were none, and took no instruction more. With a window nothing is shared, and work items start where it starts.
//
// C is the element type of the caches, where it may be another one than T, that of queries and results: e4m3
// (codes.cuh).
#pragma once

#include <type_traits>

#include "gpu/codes.cuh"
#include "gpu/mma.cuh"

namespace batchinfer::gpu {

template <class C>
inline constexpr bool kCodes = std::is_same_v<C, e4m3>;

inline constexpr int kDecodeRows = 16;      // rows of a tile of a decode item
inline constexpr int kDecodeThreads = 128;  // of a block
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;
inline constexpr int kPrefillRows = 128;  // rows of a prefill item

// Positions of a part for which a warp is enough. A block has four of them under way then, and nothing to add up. Half
// as many: 8B, 64 prompts of 16 samples, 9.2 s instead of 9.0; twice as many: 9.0, but 64 sequences of 200 to 1,500
// positions take 5 to 10 % longer.
inline constexpr int kShortPart = 256;

// Positions that are worth reading together: by no more sequences than fit a tile, and by more. Shorter beginnings are
// left to the L2 cache, as additional parts cost time: of those samples 16 share 288 positions, and if that were too
// few, they took 9.5 s.
inline constexpr int kLeastShared = 512, kLeastSharedByMany = 128;

// Sequences of a shared tile: a power of two, so that the groups of 1,024 sequences do not straddle.
__host__ __device__ __forceinline__ int sequences_per_tile(int group) {
    int count = 1;
    while (2 * count * group <= kDecodeRows) {
        count *= 2;
    }
    return count;
}

// From q.k to the score in base 2: cap_all(), then a product with `factor`.
template <bool kExtended>
struct ScoreMap {
    float factor, inner, outer;

    __device__ __forceinline__ explicit ScoreMap(const AttentionArgs& a) : factor(a.scale * kLog2e) {
        if constexpr (kExtended) {
            inner = a.softcap > 0 ? 2 * factor / a.softcap : 0;
            outer = a.softcap * kLog2e;
            if (a.softcap > 0) factor = 1;
        }
    }
    // outer * tanh(inner / (2 log2(e)) * score), within 4e-7 * outer. tanh.approx is within 5e-4.
    template <int N>
    __device__ __forceinline__ void cap_all(float (&score)[N]) const {
        if (outer == 0) return;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            score[i] = outer * (1 - __fdividef(2, 1 + exp2_fast(inner * score[i])));
        }
    }
};

// Where (kv head, position) stands in the caches [pages, kv_heads, page_size, head_width]; page_size is a power of two.
struct Pages {
    const int32_t* row;
    int kv_head, kv_heads, head_width, pages, log_page;

    __device__ __forceinline__ Pages(const AttentionPlan& p, const int32_t* row_, int kv_head_)
        : row(row_), kv_head(kv_head_), kv_heads(p.kv_heads), head_width(p.head_width), pages(p.pages) {
        log_page = 31 - __clz(p.page_size);
    }
    // The caches as [rows, head_width]; 80 GB of rows of 64 bytes still count in 31 bits.
    __device__ __forceinline__ int cache_row(int position) const {
        const int page = min(max(__ldg(row + (position >> log_page)), 0), pages - 1);
        return ((page * kv_heads + kv_head) << log_page) + (position & ((1 << log_page) - 1));
    }
    __device__ __forceinline__ int64_t offset(int position) const { return int64_t{cache_row(position)} * head_width; }
};

// Largest s with start[s] <= item, for item < start[count]; all lanes of a warp together, kWarp + 1 parts a step.
__device__ __forceinline__ int find_sequence(const int32_t* start, int count, int item) {
    const int lane = threadIdx.x % kWarp;
    int low = 0, high = count;  // start[low] <= item < start[high]
    while (high - low > 1) {
        const int stride = (high - low + kWarp) / (kWarp + 1);
        const int probe = min(low + (lane + 1) * stride, high);
        const int steps = count_lanes(start[probe] <= item);  // a run of lanes from the first
        high = min(low + (steps + 1) * stride, high);
        low += steps * stride;
    }
    return low;
}

// Hands a block its item numbers until the list is empty: its own number first, then numbers drawn from a counter. The
// draw is asked for when an item's loop is done, so that its latency passes with the writing of the results; earlier
// would take items from blocks that have none. The last block to finish puts the counters back to zero.
class Queue {
  public:
    __device__ __forceinline__ Queue(int32_t* counters, int items, int* mailbox)
        : counters_(counters), items_(items), mailbox_(mailbox), drawn_(blockIdx.x) {}
    __device__ __forceinline__ void draw() {
        if (threadIdx.x == 0) drawn_ = gridDim.x + atomicAdd(counters_, 1);
    }
    // The item drawn or -1, the same in all threads. Also a barrier.
    __device__ __forceinline__ int next() {
        __syncthreads();
        if (threadIdx.x == 0) *mailbox_ = drawn_;
        __syncthreads();
        const int item = *mailbox_;
        return item < items_ ? item : -1;
    }
    __device__ __forceinline__ void finish() {
        if (threadIdx.x != 0) return;
        __threadfence();
        if (atomicAdd(counters_ + 1, 1) == gridDim.x - 1) counters_[0] = counters_[1] = 0;
    }

  private:
    int32_t* counters_;
    int items_;
    int* mailbox_;
    int drawn_;
};

// Calls f with a value of the element type, the head width and whether kExtended is needed, these two as constants.
template <class F>
void with_matrix_shape(const AttentionArgs& a, F&& f) {
    const auto with_width = [&](auto t, auto extended) {
        a.plan.head_width == 128 ? f(t, std::integral_constant<int, 128>(), extended)
                                 : f(t, std::integral_constant<int, 64>(), extended);
    };
    const auto with_type = [&](auto extended) {
        a.dtype == GpuDtype::bfloat16 ? with_width(bf16(), extended) : with_width(f16(), extended);
    };
    a.plan.window || a.softcap > 0 ? with_type(std::true_type()) : with_type(std::false_type());
}

// The same for a cache of e4m3 codes, which is for bf16 alone: calls f with the head width. Its kernels always have
// kExtended, so that there are half as many.
template <class F>
void with_width_of_codes(const AttentionArgs& a, F&& f) {
    a.plan.head_width == 128 ? f(std::integral_constant<int, 128>()) : f(std::integral_constant<int, 64>());
}

}  // namespace batchinfer::gpu
