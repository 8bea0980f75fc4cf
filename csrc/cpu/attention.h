// Paged attention: a list of work items, planned once for a step and used by every layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels/attention.h"
#include "cpu/parallel.h"

namespace batchinfer {

class AttentionPlan {
  public:
    // Throws std::invalid_argument naming the sequence whose arrays contradict each other or point outside the page
    // table or the cache. Copies what it needs of the arrays. `threads` decides how the work is cut, but no bit
    // of the result (kernels/attention.h says why).
    AttentionPlan(const AttentionPlanArgs&, const AttentionKernel&, int threads);
    AttentionPlan(const AttentionPlan&) = delete;  // ranges point into pages_
    AttentionPlan& operator=(const AttentionPlan&) = delete;

    // Anew, in the memory that the plan has; after a throw it is of no use.
    void make(const AttentionPlanArgs&, int threads);

    // `args` must have the shape that the plan was made for, and `kernel` be the same.
    void run(const AttentionArgs& args, const AttentionKernel& kernel, ThreadPool& pool);

    const AttentionPlanArgs& shape() const { return shape_; }  // its pointers may be stale
    int64_t tokens() const { return tokens_; }
    size_t num_items() const { return items_.size(); }

  private:
    // Indices instead of pointers: the vectors grow while the plan is made.
    struct Item {
        int64_t queries, num_queries, kv_head, shared_blocks;
        int64_t split, partial;  // -1: whole rows
        double cost;
    };
    struct Merge {
        int64_t queries, kv_head, partial, splits;
    };

    std::vector<QueryRange> copy_sequences();
    void cut(const std::vector<QueryRange>& sequences, int threads);
    int64_t first_block(const QueryRange&) const;
    double cost(const QueryRange&, int64_t shared) const;
    int64_t common_blocks(const QueryRange&, const QueryRange&) const;
    AttentionItem item(int64_t index);
    void add_items(int64_t first, int64_t count, int64_t shared, double limit);

    AttentionPlanArgs shape_;
    int64_t group_, state_floats_;
    int64_t tokens_ = 0, max_rows_ = 0;
    std::vector<int32_t> pages_;
    std::vector<QueryRange> queries_;
    std::vector<Item> items_;  // most expensive first
    std::vector<Merge> merges_;
    std::vector<float> partial_;  // of split items; the same memory for every layer
};

}  // namespace batchinfer
