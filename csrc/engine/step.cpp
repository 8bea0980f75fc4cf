#include "engine/step.h"

#include <utility>

namespace batchinfer {

Step::Step(int32_t max_tokens, int32_t max_sequences, int32_t max_samples, std::shared_ptr<const PageTable> table)
    : token_ids(max_tokens),
      positions(max_tokens),
      kv_index(max_tokens),
      q_start(max_sequences + 1),
      kv_len(max_sequences),
      seq_slot(max_sequences),
      seq_ids(max_sequences),
      sample_row(max_samples),
      sample_slot(max_samples),
      sample_seq(max_samples),
      sample_count(max_samples),
      page_table(std::move(table)) {}

void Step::clear(int64_t new_index) {
    index = new_index;
    num_tokens = num_seqs = num_samples = num_decode = 0;
    new_slots.clear();
    new_seqs.clear();
    copy_source.clear();
    copy_target.clear();
    page_updates.clear();
}

void Step::add_tokens(int64_t seq_id, int32_t slot, int32_t first, std::span<const int32_t> ids, const PageId* pages,
                      int32_t page_size) {
    int32_t column = first / page_size;
    int32_t offset = first % page_size;
    int32_t position = first;
    for (const int32_t id : ids) {
        token_ids[num_tokens] = id;
        positions[num_tokens] = position++;
        kv_index[num_tokens] = static_cast<int64_t>(pages[column]) * page_size + offset;
        ++num_tokens;
        if (++offset == page_size) {
            offset = 0;
            ++column;
        }
    }
    end_sequence(seq_id, slot, position);
}

}  // namespace batchinfer
