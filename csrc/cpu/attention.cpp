#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/scratch.h"

namespace batchinfer {
namespace {

// Query rows of an item: many rows share the work of bringing keys and values into cache, but there must be enough
// items for all threads. 104 rows of 64 floats with their sums are 60 KiB.
constexpr int64_t kMinRows = 32, kMaxRows = 104;
// Cost of bringing in a key block, in units of one row's work on it (measured: 2-4).
constexpr double kStageCost = 3.0;
// Rows of an item whose splits may run side by side: their partial sums are written out.
constexpr int64_t kMaxSplitRows = 64;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

int64_t length(const QueryRange& q) {
    return q.position + q.tokens;
}
int64_t key_blocks(const QueryRange& q) {
    return ceil_div(length(q), kKeyBlock);
}

[[noreturn]] void fail(int64_t sequence, const std::string& what) {
    throw std::invalid_argument("plan_attention: sequence " + std::to_string(sequence) + ": " + what);
}

}  // namespace

AttentionPlan::AttentionPlan(const AttentionPlanArgs& args, const AttentionKernel& kernel, int threads)
    : state_floats_(kernel.state_floats(args.head_width)) {
    make(args, threads);
}

void AttentionPlan::make(const AttentionPlanArgs& args, int threads) {
    shape_ = args;
    group_ = args.heads / args.kv_heads;
    tokens_ = max_rows_ = 0;
    pages_.clear();
    queries_.clear();
    items_.clear();
    merges_.clear();
    partial_.clear();
    const std::vector<QueryRange> sequences = copy_sequences();
    cut(sequences, threads);
    std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

// One range for every sequence that has tokens in the step; checks the arrays.
std::vector<QueryRange> AttentionPlan::copy_sequences() {
    const AttentionPlanArgs& a = shape_;
    std::vector<QueryRange> sequences;
    std::vector<int64_t> first_page;
    for (int64_t i = 0; i < a.sequences; ++i) {
        const int64_t tokens = a.q_start[i + 1] - a.q_start[i], length = a.kv_len[i];
        if (a.q_start[0] != 0 || tokens < 0) fail(i, "q_start must begin with 0 and never decrease");
        if (tokens > length) {
            fail(i, std::to_string(tokens) + " tokens in the step, but kv_len is " + std::to_string(length));
        }
        if (a.slot[i] < 0 || a.slot[i] >= a.slots) {
            fail(i, "slot " + std::to_string(a.slot[i]) + " is not in [0, " + std::to_string(a.slots) + ")");
        }
        const int64_t pages = ceil_div(length, a.page_size);
        if (pages > a.slot_pages) {
            fail(i, "kv_len " + std::to_string(length) + " needs " + std::to_string(pages) + " pages, a slot has " +
                        std::to_string(a.slot_pages));
        }
        if (tokens == 0) continue;
        const int32_t* row = a.page_table + a.slot[i] * a.slot_pages;
        for (int64_t p = 0; p < pages; ++p) {
            if (row[p] < 0 || row[p] >= a.pages) {
                fail(i, "page_table entry " + std::to_string(p) + " is " + std::to_string(row[p]) + ", not in [0, " +
                            std::to_string(a.pages) + ")");
            }
        }
        first_page.push_back(pages_.size());
        pages_.insert(pages_.end(), row, row + pages);
        sequences.push_back({nullptr, a.q_start[i], tokens, length - tokens});
        tokens_ = a.q_start[i + 1];
    }
    for (size_t i = 0; i < sequences.size(); ++i)
        sequences[i].pages = pages_.data() + first_page[i];
    return sequences;
}

// Sequences -> query ranges -> items. Ranges with few rows whose leading pages are the same become one item.
void AttentionPlan::cut(const std::vector<QueryRange>& sequences, int threads) {
    const int64_t rows = std::clamp(tokens_ * group_ * shape_.kv_heads / (4 * threads), kMinRows, kMaxRows);
    const int64_t most_tokens = std::max<int64_t>(1, rows / group_);
    std::vector<QueryRange> small;
    double total = 0.0;
    for (const QueryRange& s : sequences) {
        const int64_t parts = ceil_div(s.tokens, most_tokens);
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t begin = s.tokens * i / parts, end = s.tokens * (i + 1) / parts;
            const QueryRange range = {s.pages, s.token + begin, end - begin, s.position + begin};
            (2 * range.tokens * group_ <= rows ? small : queries_).push_back(range);
            total += cost(range, 0) * shape_.kv_heads;
        }
    }
    const double limit = total / (2 * threads);
    for (size_t i = 0; i < queries_.size(); ++i)
        add_items(i, 1, 0, limit);

    std::sort(small.begin(), small.end(), [&](const QueryRange& a, const QueryRange& b) {
        return std::lexicographical_compare(a.pages, a.pages + ceil_div(length(a), shape_.page_size), b.pages,
                                            b.pages + ceil_div(length(b), shape_.page_size));
    });
    for (size_t begin = 0, end; begin < small.size(); begin = end) {
        int64_t shared = key_blocks(small[begin]), item_rows = small[begin].tokens * group_;
        double item_cost = cost(small[begin], 0);
        for (end = begin + 1; end < small.size(); ++end) {
            const int64_t now_shared = std::min(shared, common_blocks(small[end - 1], small[end]));
            item_rows += small[end].tokens * group_;
            item_cost += cost(small[end], now_shared);
            // Blocks saved: (members - 1) * shared.
            const int64_t members = end - begin, saved = (members - 1) * shared;
            if (now_shared <= first_block(small[end]) || members * now_shared < saved || item_rows > rows ||
                item_cost > limit)
                break;
            shared = now_shared;
        }
        queries_.insert(queries_.end(), small.begin() + begin, small.begin() + end);
        add_items(queries_.size() - (end - begin), end - begin, end - begin > 1 ? shared : 0, limit);
    }
}

// The first key block that any token of a range sees.
int64_t AttentionPlan::first_block(const QueryRange& q) const {
    return window_start(q.position, shape_.window) / kKeyBlock;
}

// Work of one key/value head on a range, without bringing in its sequence's first `shared` blocks.
double AttentionPlan::cost(const QueryRange& q, int64_t shared) const {
    const int64_t first = first_block(q), staged = key_blocks(q) - std::max(first, shared);
    return (key_blocks(q) - first) * static_cast<double>(q.tokens * group_) + staged * kStageCost;
}

// Leading key blocks that lie in the same pages.
int64_t AttentionPlan::common_blocks(const QueryRange& a, const QueryRange& b) const {
    const int64_t pages = ceil_div(std::min(length(a), length(b)), shape_.page_size);
    const int64_t common = std::mismatch(a.pages, a.pages + pages, b.pages).first - a.pages;
    return std::min(common * shape_.page_size, std::min(length(a), length(b))) / kKeyBlock;
}

// Items of queries_[first, first + count), one for each key/value head; a very long one is cut into its splits.
void AttentionPlan::add_items(int64_t first, int64_t count, int64_t shared, double limit) {
    int64_t rows = 0;
    const int64_t first_seen = first_block(queries_[first]);
    double item_cost = std::max<int64_t>(0, shared - first_seen) * kStageCost;
    for (int64_t i = first; i < first + count; ++i) {
        rows += queries_[i].tokens * group_;
        item_cost += cost(queries_[i], shared);
    }
    max_rows_ = std::max(max_rows_, rows);
    const int64_t first_split = first_seen * kKeyBlock / kSplit;
    const int64_t splits = ceil_div(length(queries_[first]), kSplit) - first_split;
    const bool split = count == 1 && splits > 1 && rows <= kMaxSplitRows && item_cost > limit;
    for (int64_t head = 0; head < shape_.kv_heads; ++head) {
        if (!split) {
            items_.push_back({first, count, head, shared, -1, -1, item_cost});
            continue;
        }
        merges_.push_back({first, head, static_cast<int64_t>(partial_.size()), splits});
        for (int64_t s = 0; s < splits; ++s) {
            items_.push_back(
                {first, 1, head, 0, first_split + s, static_cast<int64_t>(partial_.size()), item_cost / splits});
            partial_.resize(partial_.size() + rows * state_floats_);
        }
    }
}

AttentionItem AttentionPlan::item(int64_t i) {
    const Item& item = items_[i];
    float* partial = item.partial < 0 ? nullptr : partial_.data() + item.partial;
    return {&queries_[item.queries], item.num_queries, item.kv_head, item.shared_blocks, partial, item.split};
}

void AttentionPlan::run(const AttentionArgs& args, const AttentionKernel& kernel, ThreadPool& pool) {
    const size_t bytes = kernel.scratch_bytes(args, max_rows_);
    const int64_t items = items_.size(), merges = merges_.size();
    if (items == 0) return;
    std::atomic<int64_t> next{0};
    pool.run([&](int, int) {
        std::byte* scratch = thread_scratch(bytes);
        int64_t i = next++, following;
        for (; i < items; i = following) {
            following = next++;  // taken early, so that its keys can be prefetched
            const AttentionItem now = item(i), then = item(following < items ? following : i);
            kernel.attend(args, now, following < items ? &then : nullptr, scratch);
        }
    });
    pool.parallel_for(merges, [&](int64_t begin, int64_t end, int) {
        std::byte* scratch = thread_scratch(bytes);
        for (int64_t i = begin; i < end; ++i) {
            const Merge& m = merges_[i];
            kernel.merge(args, queries_[m.queries], m.kv_head, partial_.data() + m.partial, m.splits, scratch);
        }
    });
}

}  // namespace batchinfer
