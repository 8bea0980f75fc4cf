#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/page_allocator.h"

namespace batchinfer {

/// Page of each position range: entry (slot, j) holds positions j * page_size .. (j + 1) * page_size - 1 of the
/// sequence in that slot. Entries beyond a sequence's length are left over from earlier ones.
struct PageTable {
    PageTable(int32_t slots, int32_t columns)
        : slots(slots), columns(columns), entries(static_cast<size_t>(slots) * columns, 0) {}
    PageId* row(int32_t slot) { return entries.data() + static_cast<size_t>(slot) * columns; }
    const PageId* row(int32_t slot) const { return entries.data() + static_cast<size_t>(slot) * columns; }

    int32_t slots;
    int32_t columns;
    std::vector<PageId> entries;
};

/// What the device computes in one step: flat arrays over T tokens, S sequences, N sampled rows. Arrays of these
/// lengths have room for the largest step, and their first num_tokens, num_seqs or num_samples entries are valid.
///
/// The K/V of all tokens of the step is written before any of them attends, and before pages are copied, layer by
/// layer; so a sequence may attend to pages that another sequence of the same step fills.
struct Step {
    static constexpr int32_t kUnknownToken = -1;

    int64_t index = 0;
    int32_t num_tokens = 0;
    int32_t num_seqs = 0;
    int32_t num_samples = 0;
    int32_t num_decode = 0;  // leading sequences past their prompt; one token each, and its draft

    std::vector<int32_t> token_ids;  // [T]; kUnknownToken: what the slot sampled in the step before
    std::vector<int32_t> positions;  // [T]
    std::vector<int64_t> kv_index;   // [T]; page * page_size + offset, where the token's K/V goes

    std::vector<int32_t> q_start;   // [S + 1]; sequence i has tokens q_start[i] .. q_start[i + 1] - 1
    std::vector<int32_t> kv_len;    // [S]; length of sequence i with this step's tokens
    std::vector<int32_t> seq_slot;  // [S]
    std::vector<int64_t> seq_ids;   // [S]

    // A sequence with d draft tokens behind its newest one has 1 + d rows, one after the other.
    std::vector<int32_t> sample_row;    // [N]; token of the step whose logits are sampled
    std::vector<int32_t> sample_slot;   // [N]
    std::vector<int64_t> sample_seq;    // [N]
    std::vector<int32_t> sample_count;  // [N]; tokens that the sequence generated before this one, draft included

    // These grow as needed.
    std::vector<int32_t> new_slots;  // slots given out in this step, and to which sequences
    std::vector<int64_t> new_seqs;
    // Pages that become copies of others, of which none is a copy itself.
    std::vector<PageId> copy_source;    // [C], no more than there are slots
    std::vector<PageId> copy_target;    // [C]
    std::vector<int32_t> page_updates;  // [U, 3]; (slot, column, page): changed entries of the page table, each once

    std::shared_ptr<const PageTable> page_table;

    Step(int32_t max_tokens, int32_t max_sequences, int32_t max_samples, std::shared_ptr<const PageTable> page_table);

    void clear(int64_t new_index);
    /// Appends one token of a sequence, at `position`, whose K/V goes to token `kv` of the cache.
    void add_token(int64_t seq_id, int32_t slot, int32_t position, int32_t id, int64_t kv) {
        token_ids[num_tokens] = id;
        positions[num_tokens] = position;
        kv_index[num_tokens] = kv;
        ++num_tokens;
        end_sequence(seq_id, slot, position + 1);
    }
    /// Appends tokens at positions first .. first + ids.size() - 1 of a sequence; `pages`: its row of the page table.
    void add_tokens(int64_t seq_id, int32_t slot, int32_t first, std::span<const int32_t> ids, const PageId* pages,
                    int32_t page_size);
    /// The token before the last `after` ones added is sampled from.
    void add_sample(int64_t seq_id, int32_t slot, int32_t tokens_before, int32_t after = 0) {
        sample_row[num_samples] = num_tokens - 1 - after;
        sample_slot[num_samples] = slot;
        sample_seq[num_samples] = seq_id;
        sample_count[num_samples] = tokens_before;
        ++num_samples;
    }
    void add_copy(PageId source, PageId target) {
        copy_source.push_back(source);
        copy_target.push_back(target);
    }
    void add_page_update(int32_t slot, int32_t column, PageId page) {
        page_updates.insert(page_updates.end(), {slot, column, page});
    }

  private:
    void end_sequence(int64_t seq_id, int32_t slot, int32_t length) {
        kv_len[num_seqs] = length;
        seq_slot[num_seqs] = slot;
        seq_ids[num_seqs] = seq_id;
        q_start[++num_seqs] = num_tokens;
    }
};

}  // namespace batchinfer
