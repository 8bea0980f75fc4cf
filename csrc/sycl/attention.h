// Attention over pages: one kernel for decoding and prompts, and one that adds up what splits of a sequence found.
//
// A row is one query head of one token; the heads of a kv head stand together, token by token, so that they share its
// keys. A group takes a tile of 16 rows and goes through the keys by 16: they lie in local memory, a lane has the score
// of one key, and then one in 16 elements of the result. A sub-group has two rows. All sums are float32.
//
// The work list is a running sum over the sequences, read by a grid of fixed size: no launch depends on lengths. A
// sequence with one token in the step is split at fixed positions, so that few long sequences still fill the device;
// its sums depend on no neighbour. Prompts are not split, and shared beginnings are read by each sequence for itself.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

inline constexpr int kTileRows = 16;
inline constexpr int kBlockKeys = kSubGroup;  // pages hold whole blocks

// How a sequence is cut into items: (part of its keys, tile of rows) for every kv head.
struct Cut {
    int first;  // key of the first part
    int parts, tiles;
};

inline Cut cut_of(const AttentionPlan& p, const Sequence& q) {
    Cut cut{0, 1, (q.tokens * (p.heads / p.kv_heads) + kTileRows - 1) / kTileRows};
    if (q.tokens == 1) {
        cut.first = window_start(p, q.length - 1) / kBlockKeys * kBlockKeys;
        cut.parts = (q.length - cut.first + p.split - 1) / p.split;
    }
    return cut;
}

// decode_start: running sum of the items of all sequences; partial_start: of the parts of those that have several.
struct PlanAttention {
    using Args = AttentionPlan;
    using Local = NoLocal;
    static constexpr int kThreads = 256;

    static void run(const Item& item, Local&, const Args& p) {
        const auto group = item.get_group();
        int items = 0, parts = 0;
        for (int base = 0; base < p.sequences; base += kThreads) {
            const int s = base + thread_of(item);
            int my_items = 0, my_parts = 0;
            if (s < p.sequences) {
                const Cut cut = cut_of(p, sequence_of(p, s, INT32_MAX));
                my_items = cut.parts * cut.tiles * p.kv_heads;
                my_parts = cut.parts > 1 ? cut.parts : 0;
            }
            const int items_here = sycl::inclusive_scan_over_group(group, my_items, sycl::plus<int>());
            const int parts_here = sycl::inclusive_scan_over_group(group, my_parts, sycl::plus<int>());
            if (s < p.sequences)
                p.decode_start[s + 1] = items + items_here, p.partial_start[s + 1] = parts + parts_here;
            items += sycl::group_broadcast(group, items_here, kThreads - 1);
            parts += sycl::group_broadcast(group, parts_here, kThreads - 1);
        }
        if (thread_of(item) == 0) p.decode_start[0] = p.partial_start[0] = 0;
    }
};

// Largest s with start[s] <= item, for item < start[count].
inline int find_sequence(const int32_t* start, int count, int item) {
    int low = 0, high = count;  // start[low] <= item < start[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (start[middle] <= item ? low : high) = middle;
    }
    return low;
}

// Of partial results, a row for each part of a sequence and head.
inline int64_t partial_row(const AttentionPlan& p, int s, int part, int head) {
    return int64_t{p.partial_start[s] + part} * p.heads + head;
}

// kPieces: for head widths up to 16 * kPieces.
template <class T, int kPieces>
struct Attend {
    using Args = AttentionArgs;
    static constexpr int kThreads = 128;
    static constexpr int kRows = kTileRows / (kThreads / kSubGroup);  // of a sub-group
    static constexpr int kWidth = kSubGroup * kPieces;

    struct alignas(16) Local {
        float query[kTileRows][kWidth];
        float key[kBlockKeys][kWidth + 4];  // lanes read a column of it, four elements at a time: in different banks
        float value[kBlockKeys][kWidth];
    };

    static void run(const Item& item, Local& local, const Args& a) {
        const AttentionPlan& p = a.plan;
        const int items = p.decode_start[p.sequences], groups = item.get_group_range(1);
        for (int i = item.get_group(1); i < items; i += groups) {
            attend(item, local, a, i);
        }
    }

    static void attend(const Item& item, Local& local, const Args& a, int number) {
        const AttentionPlan& p = a.plan;
        const auto group = item.get_group();
        const auto lanes = item.get_sub_group();
        const int thread = thread_of(item), lane = lanes.get_local_linear_id();
        const int heads = p.heads / p.kv_heads;  // of a kv head
        const int s = find_sequence(p.decode_start, p.sequences, number);
        const Sequence q = sequence_of(p, s, a.tokens);
        const int first_row = lanes.get_group_linear_id() * kRows;

        // Of (part, tile, kv head) the last runs fastest.
        const int parts = larger_of(p.partial_start[s + 1] - p.partial_start[s], 1);
        const int tiles = (p.decode_start[s + 1] - p.decode_start[s]) / (parts * p.kv_heads);
        const int within = number - p.decode_start[s], kv_head = within % p.kv_heads;
        const int tile = within / p.kv_heads % tiles * kTileRows, part = within / p.kv_heads / tiles;
        const int rows = smaller_of(q.tokens * heads - tile, kTileRows);  // of this tile
        const auto head_of = [&](int row) { return kv_head * heads + (tile + row) % heads; };
        const auto token_of = [&](int row) { return (tile + row) / heads; };
        const auto last_key = [&](int row) { return q.length - q.tokens + token_of(row); };
        if (rows <= 0) return;

        const int begin = window_start(p, last_key(0)) / kBlockKeys * kBlockKeys + part * p.split;
        int end = last_key(rows - 1) + 1;
        if (parts > 1) end = smaller_of(end, begin + p.split);

        sycl::group_barrier(group);  // all have left the item before
        for (int i = thread; i < kTileRows * p.head_width; i += kThreads) {
            const int row = i / p.head_width, e = i % p.head_width;
            const int64_t at = (int64_t{q.token + token_of(row)} * p.heads + head_of(row)) * p.head_width + e;
            local.query[row][e] = row < rows ? to_float(static_cast<const T*>(a.q)[at]) : 0;
        }
        float out[kRows][kPieces] = {}, maximum[kRows], sum[kRows] = {};  // sum: this lane's share
        for (int r = 0; r < kRows; ++r) {
            maximum[r] = kNoScore;
        }
        for (int base = begin; base < end; base += kBlockKeys) {
            sycl::group_barrier(group);
            load_keys(local, a, q, kv_head, base, end, thread);
            sycl::group_barrier(group);
            for (int r = 0; r < kRows; ++r) {
                const int row = first_row + r, last = last_key(row), key = base + lane;
                const bool visible = row < rows && key <= last && key >= window_start(p, last) && key < end;
                const float score = visible ? score_of(a, local.query[row], local.key[lane]) : kNoScore;
                const float top = sycl::fmax(maximum[r], sycl::reduce_over_group(lanes, score, sycl::maximum<float>()));
                const float shrink = sycl::exp2(maximum[r] - top), weight = visible ? sycl::exp2(score - top) : 0;
                maximum[r] = top;
                sum[r] = sum[r] * shrink + weight;
                for (int piece = 0; piece < kPieces; ++piece) {
                    out[r][piece] *= shrink;
                }
                for (int k = 0; k < kBlockKeys; ++k) {
                    const float its = sycl::group_broadcast(lanes, weight, k);
                    for (int piece = 0; piece < kPieces; ++piece) {
                        out[r][piece] = sycl::fma(its, local.value[k][piece * kSubGroup + lane], out[r][piece]);
                    }
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const float total = sycl::reduce_over_group(lanes, sum[r], sycl::plus<float>());
            const int row = first_row + r;
            if (row >= rows) continue;
            const float lse = maximum[r] + sycl::log2(total);
            const int64_t whole = int64_t{q.token + token_of(row)} * p.heads + head_of(row);
            const int64_t partial = partial_row(p, s, part, head_of(row));
            for (int piece = 0; piece < kPieces; ++piece) {
                const int e = piece * kSubGroup + lane;
                if (e >= p.head_width) break;
                const float value = out[r][piece] / total;
                if (parts > 1) {
                    p.partial_out[partial * p.head_width + e] = value;
                } else {
                    static_cast<T*>(a.out)[whole * p.head_width + e] = from_float<T>(value);
                }
            }
            if (lane != 0) continue;
            (parts > 1 ? p.partial_lse[partial] : a.lse[whole]) = parts > 1 ? lse : lse * kLn2;
        }
    }

    // A block of keys and values, one page's. Places from `end` on hold no keys: 0, as 0 * NaN would be NaN.
    static void load_keys(Local& local, const Args& a, const Sequence& q, int kv_head, int base, int end, int thread) {
        const AttentionPlan& p = a.plan;
        const int64_t page = clamp_index(q.page_row[base / p.page_size], p.pages);
        const int64_t from = ((page * p.kv_heads + kv_head) * p.page_size + base % p.page_size) * p.head_width;
        for (int i = thread; i < kBlockKeys * p.head_width; i += kThreads) {
            const int key = i / p.head_width, e = i % p.head_width;
            const bool there = base + key < end;
            local.key[key][e] = there ? to_float(static_cast<const T*>(a.k_cache)[from + i]) : 0;
            local.value[key][e] = there ? to_float(static_cast<const T*>(a.v_cache)[from + i]) : 0;
        }
    }

    // In base 2. Eight sums: with 256 elements a single one would lose two bits.
    static float score_of(const Args& a, const float* query, const float* key) {
        sycl::float4 sums[2] = {};
        for (int e = 0; e < a.plan.head_width; e += 8) {
            for (int half = 0; half < 2; ++half) {
                sums[half] = sycl::fma(*reinterpret_cast<const sycl::float4*>(query + e + 4 * half),
                                       *reinterpret_cast<const sycl::float4*>(key + e + 4 * half), sums[half]);
            }
        }
        const sycl::float4 sum = sums[0] + sums[1];
        const float product = sum[0] + sum[1] + (sum[2] + sum[3]);
        return a.softcap > 0 ? a.softcap * kLog2e * sycl::tanh(product * a.scale / a.softcap)
                             : product * (a.scale * kLog2e);
    }
};

// One sub-group a sequence and head, for the sequences that have several parts.
template <class T>
struct MergeParts {
    using Args = AttentionArgs;
    using Local = NoLocal;
    static constexpr int kThreads = 128;
    static constexpr int kHeads = kThreads / kSubGroup;  // of a group

    static void run(const Item& item, Local&, const Args& a) {
        const AttentionPlan& p = a.plan;
        const auto lanes = item.get_sub_group();
        const int lane = lanes.get_local_linear_id();
        const int s = item.get_group(0), head = item.get_group(1) * kHeads + lanes.get_group_linear_id();
        const int parts = p.partial_start[s + 1] - p.partial_start[s];
        if (parts == 0 || head >= p.heads) return;  // whole sub-groups
        const Sequence q = sequence_of(p, s, a.tokens);
        if (q.tokens == 0) return;
        const float* lse = p.partial_lse + partial_row(p, s, 0, head);
        float top = kNoScore, total = 0;
        for (int i = 0; i < parts; ++i) {
            top = sycl::fmax(top, lse[int64_t{i} * p.heads]);
        }
        for (int i = 0; i < parts; ++i) {
            total += sycl::exp2(lse[int64_t{i} * p.heads] - top);
        }
        const int64_t row = int64_t{q.token} * p.heads + head;
        for (int e = lane; e < p.head_width; e += kSubGroup) {
            float value = 0;
            for (int i = 0; i < parts; ++i) {
                const float weight = sycl::exp2(lse[int64_t{i} * p.heads] - top) / total;
                value += weight * p.partial_out[partial_row(p, s, i, head) * p.head_width + e];
            }
            static_cast<T*>(a.out)[row * p.head_width + e] = from_float<T>(value);
        }
        if (lane == 0) a.lse[row] = (top + sycl::log2(total)) * kLn2;
    }
};

}  // namespace batchinfer::gpu
