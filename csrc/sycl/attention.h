// Attention over pages: one kernel for decoding and prompts, and one that adds up what splits of a sequence found.
//
// A row is one query head of one token; the heads of a kv head stand together, token by token, so that they share its
// keys. A group takes a tile of 16 rows and goes through the keys by 16: they lie in local memory, a lane has the score
// of one key, and then one in 16 elements of the result. A sub-group has every eighth row. All sums are float32.
//
// The work list is a running sum over the sequences, read by a grid of fixed size: no launch depends on lengths. A
// sequence with one token in the step is split at fixed positions, so that few long sequences still fill the device; a
// beginning that a group of them shares is read once for all, as in csrc/gpu, and its results are parts of each. Its
// sums depend on no neighbour but those. Prompts are not split.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

inline constexpr int kTileRows = 16;
inline constexpr int kBlockKeys = kSubGroup;  // pages hold whole blocks

// Positions; csrc/gpu/attention.cuh says why a shorter shared beginning is left to the caches.
inline constexpr int kLeastShared = 512;

// Decoding sequences are taken in fixed groups of so many as have their query heads in one tile: a power of two.
inline int group_size(const AttentionPlan& p) {
    int count = 1;
    while (2 * count * (p.heads / p.kv_heads) <= kTileRows) {
        count *= 2;
    }
    return count;
}

inline int group_start(const AttentionPlan& p, int s) {
    return s / group_size(p) * group_size(p);
}

// Members of the group that begins with this sequence.
inline int members_of(const AttentionPlan& p, int first) {
    return smaller_of(group_size(p), p.sequences - first);
}

// How a sequence is cut into items: (part of its keys, tile of rows) for every kv head. The parts of its group's shared
// beginning come first; their items, of one tile each, are the first member's.
struct Cut {
    int first;  // key of the first part of its own
    int together, alone, tiles;

    int parts() const { return together + alone; }
};

inline Cut cut_of(const AttentionPlan& p, const Sequence& q, int shared) {
    Cut cut{0, 0, 1, (q.tokens * (p.heads / p.kv_heads) + kTileRows - 1) / kTileRows};
    if (q.tokens == 1) {
        cut.first = shared ? shared : window_start(p, q.length - 1) / kBlockKeys * kBlockKeys;
        cut.together = (shared + p.split - 1) / p.split;
        cut.alone = (keys_end(q, cut.first) - cut.first + p.split - 1) / p.split;
    }
    return cut;
}

// decode_start: running sum of the items of all sequences; partial_start: of the parts of those that have several;
// shared: leading positions that a sequence's group reads together. The plan's other lists and counters are not used.
struct PlanAttention {
    using Args = AttentionPlan;
    static constexpr int kThreads = 256;  // whole groups

    struct alignas(16) Local {
        int common[kThreads];
    };

    static void run(const Item& item, Local& local, const Args& p) {
        const auto group = item.get_group();
        const int t = thread_of(item);
        int items = 0, parts = 0;
        for (int base = 0; base < p.sequences; base += kThreads) {
            const int s = base + t;
            sycl::group_barrier(group);  // all have read what the last round wrote
            if (s < p.sequences) local.common[t] = common_length(p, s);
            sycl::group_barrier(group);
            int my_items = 0, my_parts = 0;
            if (s < p.sequences) {
                const int first = group_start(p, s), shared = shared_length(p, local, first, base);
                const Cut cut = cut_of(p, sequence_of(p, s, INT32_MAX), shared);
                my_items = (cut.alone * cut.tiles + (s == first ? cut.together : 0)) * p.kv_heads;
                my_parts = cut.parts() > 1 ? cut.parts() : 0;
                p.shared[s] = shared;
            }
            const int items_here = sycl::inclusive_scan_over_group(group, my_items, sycl::plus<int>());
            const int parts_here = sycl::inclusive_scan_over_group(group, my_parts, sycl::plus<int>());
            if (s < p.sequences)
                p.decode_start[s + 1] = items + items_here, p.partial_start[s + 1] = parts + parts_here;
            items += sycl::group_broadcast(group, items_here, kThreads - 1);
            parts += sycl::group_broadcast(group, parts_here, kThreads - 1);
        }
        if (t == 0) p.decode_start[0] = p.partial_start[0] = 0;
    }

    // Leading positions, in whole pages, that a decoding sequence has in the same pages as the first of its group. Its
    // last position is never among them: every sequence keeps a part of its own.
    static int common_length(const Args& p, int s) {
        const Sequence q = sequence_of(p, s, INT32_MAX), lead = sequence_of(p, group_start(p, s), INT32_MAX);
        if (q.tokens != 1 || lead.tokens != 1 || p.window != 0) return 0;
        const int pages = (smaller_of(q.length, lead.length) - 1) / p.page_size;
        int same = 0;
        while (same < pages && q.page_row[same] == lead.page_row[same]) {
            ++same;
        }
        return same * p.page_size;
    }

    // What all of a group have in common; 0 where that is not worth it, or nobody shares.
    static int shared_length(const Args& p, const Local& local, int first, int base) {
        const int members = members_of(p, first);
        int shared = members > 1 ? INT32_MAX : 0;
        for (int m = 0; m < members; ++m) {
            shared = smaller_of(shared, local.common[first - base + m]);
        }
        return shared < kLeastShared ? 0 : shared;
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

// An item: a tile of rows of sequence s, one kv head, and a range of keys. Where it is of a shared beginning, its rows
// are those of all members of the group that s begins.
struct Task {
    Sequence q;
    int s, kv_head, heads;  // heads: of a kv head
    bool shared;
    int part, parts;
    int tile, rows;  // its first row in the sequence, and how many there are
    int begin, end;  // keys; whole blocks before the end

    int head(int row) const { return kv_head * heads + (tile + row) % heads; }
    int member(int row) const { return shared ? s + row / heads : s; }
    int token(int row) const { return shared ? 0 : (tile + row) / heads; }
    int64_t step_row(const AttentionPlan& p, int row, int step_tokens) const {
        const int first =
            shared ? smaller_of(sequence_of(p, member(row), step_tokens).token, step_tokens - 1) : q.token;
        return int64_t{first + token(row)} * p.heads + head(row);
    }
    int64_t partial(const AttentionPlan& p, int row) const { return partial_row(p, member(row), part, head(row)); }
    int last_key(int row) const { return q.length - q.tokens + token(row); }
    bool sees(const AttentionPlan& p, int row, int key) const {
        const int last = last_key(row);
        return key < end && (shared || (key <= last && key >= window_start(p, last)));
    }
};

// Item `number` of the list. Of (part, tile, kv head) the last runs fastest.
inline Task task_of(const AttentionPlan& p, int number, int step_tokens) {
    Task t;
    t.s = find_sequence(p.decode_start, p.sequences, number);
    t.q = sequence_of(p, t.s, step_tokens);
    t.heads = p.heads / p.kv_heads;
    const int shared = p.shared[t.s];
    const Cut cut = cut_of(p, sequence_of(p, t.s, INT32_MAX), shared);  // as the plan has it
    t.parts = cut.parts();
    const int leading = group_start(p, t.s) == t.s ? cut.together * p.kv_heads : 0;
    int within = number - p.decode_start[t.s];
    t.shared = within < leading;
    t.kv_head = within % p.kv_heads;
    if (t.shared) {
        t.tile = 0;
        t.rows = members_of(p, t.s) * t.heads;
        t.part = within / p.kv_heads;
        t.begin = t.part * p.split;
        t.end = smaller_of(shared, t.begin + p.split);
        return t;
    }
    within -= leading;
    t.tile = within / p.kv_heads % cut.tiles * kTileRows;
    t.rows = smaller_of(t.q.tokens * t.heads - t.tile, kTileRows);
    const int own = within / p.kv_heads / cut.tiles;
    t.part = cut.together + own;
    t.begin =
        shared ? shared + own * p.split : window_start(p, t.last_key(0)) / kBlockKeys * kBlockKeys + own * p.split;
    t.q.length = keys_end(t.q, t.begin);
    t.end = t.last_key(t.rows - 1) + 1;
    if (t.parts > 1) t.end = smaller_of(t.end, t.begin + p.split);
    return t;
}

// C: of the caches. kPieces: for head widths up to 16 * kPieces.
template <class T, class C, int kPieces>
struct Attend {
    using Args = AttentionArgs;
    static constexpr int kThreads = 128;
    static constexpr int kSubGroups = kThreads / kSubGroup;
    static constexpr int kRows = kTileRows / kSubGroups;  // of a sub-group
    static constexpr int kWidth = kSubGroup * kPieces;

    struct alignas(16) Local {
        float query[kTileRows][kWidth];
        float key[kBlockKeys][kWidth + 4];  // lanes read a column of it, four elements at a time: in different banks
        float value[kBlockKeys][kWidth];
    };

    // What a row has seen so far, spread over the lanes: `out` by elements, `sum` by keys.
    struct Seen {
        float out[kPieces] = {};
        float maximum = kNoScore, sum = 0;

        // A block of keys, of which each lane has the score of its own.
        void add(sycl::sub_group lanes, const Local& local, bool visible, float score) {
            const float top = sycl::fmax(maximum, sycl::reduce_over_group(lanes, score, sycl::maximum<float>()));
            const float shrink = sycl::exp2(maximum - top), weight = visible ? sycl::exp2(score - top) : 0;
            maximum = top;
            sum = sum * shrink + weight;
            for (float& x : out) {
                x *= shrink;
            }
            for (int k = 0; k < kBlockKeys; ++k) {
                const float its = sycl::group_broadcast(lanes, weight, k);
                const float* value = local.value[k] + lanes.get_local_linear_id();
                for (int piece = 0; piece < kPieces; ++piece) {
                    out[piece] = sycl::fma(its, value[piece * kSubGroup], out[piece]);
                }
            }
        }
    };

    static void run(const Item& item, Local& local, const Args& a) {
        const AttentionPlan& p = a.plan;
        const int items = p.decode_start[p.sequences], groups = item.get_group_range(1);
        for (int i = item.get_group(1); i < items; i += groups) {
            const Task task = task_of(p, i, a.tokens);
            if (task.rows > 0) attend(item, local, a, task);
        }
    }

    static void attend(const Item& item, Local& local, const Args& a, const Task& task) {
        const auto group = item.get_group();
        const auto lanes = item.get_sub_group();
        const int lane = lanes.get_local_linear_id(), first_row = lanes.get_group_linear_id();
        Seen seen[kRows];
        sycl::group_barrier(group);  // all have left the item before
        load_queries(lanes, local, a, task);
        for (int base = task.begin; base < task.end; base += kBlockKeys) {
            sycl::group_barrier(group);
            load_keys(lanes, local, a, task, base);
            sycl::group_barrier(group);
            for (int r = 0, row = first_row; r < kRows && row < task.rows; ++r, row += kSubGroups) {
                const bool visible = task.sees(a.plan, row, base + lane);
                const float score = visible ? score_of(a, local.query[row], local.key[lane]) : kNoScore;
                seen[r].add(lanes, local, visible, score);
            }
        }
        for (int r = 0, row = first_row; r < kRows && row < task.rows; ++r, row += kSubGroups) {
            store(lanes, a, task, row, seen[r]);
        }
    }

    static void load_queries(sycl::sub_group lanes, Local& local, const Args& a, const Task& task) {
        for (int row = lanes.get_group_linear_id(); row < task.rows; row += kSubGroups) {
            const T* from = static_cast<const T*>(a.q) + task.step_row(a.plan, row, a.tokens) * a.plan.head_width;
            for (int e = lanes.get_local_linear_id(); e < a.plan.head_width; e += kSubGroup) {
                local.query[row][e] = to_float(from[e]);
            }
        }
    }

    // A block of keys and values, one page's. Places from the end on hold no keys: 0, as 0 * NaN would be NaN.
    static void load_keys(sycl::sub_group lanes, Local& local, const Args& a, const Task& task, int base) {
        const AttentionPlan& p = a.plan;
        const int64_t page = clamp_index(task.q.page_row[base / p.page_size], p.pages);
        const int64_t from = ((page * p.kv_heads + task.kv_head) * p.page_size + base % p.page_size) * p.head_width;
        for (int key = lanes.get_group_linear_id(); key < kBlockKeys; key += kSubGroups) {
            const bool there = base + key < task.end;
            for (int e = lanes.get_local_linear_id(); e < p.head_width; e += kSubGroup) {
                const int64_t at = from + key * p.head_width + e;
                local.key[key][e] = there ? to_float(static_cast<const C*>(a.k_cache)[at]) : 0;
                local.value[key][e] = there ? to_float(static_cast<const C*>(a.v_cache)[at]) : 0;
            }
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

    // The result, or that of a part.
    static void store(sycl::sub_group lanes, const Args& a, const Task& task, int row, const Seen& seen) {
        const AttentionPlan& p = a.plan;
        const float total = sycl::reduce_over_group(lanes, seen.sum, sycl::plus<float>());
        const float lse = seen.maximum + sycl::log2(total);
        const int64_t whole = task.step_row(p, row, a.tokens), partial = task.parts > 1 ? task.partial(p, row) : 0;
        for (int piece = 0; piece < kPieces; ++piece) {
            const int e = piece * kSubGroup + lanes.get_local_linear_id();
            if (e >= p.head_width) break;
            const float value = seen.out[piece] / total;
            if (task.parts > 1) {
                p.partial_out[partial * p.head_width + e] = value;
            } else {
                static_cast<T*>(a.out)[whole * p.head_width + e] = from_float<T>(value);
            }
        }
        if (!lanes.leader()) return;
        (task.parts > 1 ? p.partial_lse[partial] : a.lse[whole]) = task.parts > 1 ? lse : lse * kLn2;
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
