// Penalise: repetition, presence and frequency penalties and banned tokens, on the logits in place. How often a token
// occurs in the history is counted in local memory, for 8,192 token ids at a time, as csrc/gpu/penalties.cu does.
#pragma once

#include "sycl/sample.h"

namespace batchinfer::gpu {

struct Penalise {
    static constexpr int kIds = 8192;
    static constexpr uint32_t kInPrompt = 0x80000000u;  // the other bits count occurrences in the output

    struct Local {
        uint32_t seen[kIds];
    };
    using Args = SampleArgs;
    static constexpr int kThreads = kSampleThreads;

    static void run(const Item& item, Local& local, const Args& a) {
        const int64_t r = item.get_group(0);
        float* logits = a.logits + r * a.vocab;
        if (a.repetition) punish(item, local, a, r, logits);
        if (!a.banned_ids) return;
        sycl::group_barrier(item.get_group());
        const Segment banned(a.banned_start, r, a.banned_size);
        for (int64_t i = banned.begin + thread_of(item); i < banned.end; i += kThreads) {
            const int id = a.banned_ids[i];
            if (id >= 0 && id < a.vocab) logits[id] = -INFINITY;
        }
    }

    static void punish(const Item& item, Local& local, const Args& a, int64_t r, float* logits) {
        const Segment history(a.history_start, r, a.history_size);
        const int64_t output = history.begin + a.history_prompt[r];
        for (int base = 0; base < a.vocab && history.begin < history.end; base += kIds) {
            for (int i = thread_of(item); i < kIds; i += kThreads) {
                local.seen[i] = 0;
            }
            sycl::group_barrier(item.get_group());
            for (int64_t i = history.begin + thread_of(item); i < history.end; i += kThreads) {
                const uint32_t id = static_cast<uint32_t>(a.history_ids[i] - base);
                if (id >= kIds) continue;
                if (i < output) {
                    LocalCounter(local.seen[id]).fetch_or(kInPrompt);
                } else {
                    LocalCounter(local.seen[id]).fetch_add(1u);
                }
            }
            sycl::group_barrier(item.get_group());
            for (int i = thread_of(item); i < kIds && base + i < a.vocab; i += kThreads) {
                if (local.seen[i] == 0) continue;
                logits[base + i] = punished(a, r, logits[base + i], local.seen[i] & ~kInPrompt);
            }
            sycl::group_barrier(item.get_group());
        }
    }

    // A logit whose token occurs in the history, `count` times in the output.
    static float punished(const Args& a, int64_t r, float x, uint32_t count) {
        if (x != x) x = -INFINITY;
        x = x > 0 ? exact::div(x, a.repetition[r]) : exact::mul(x, a.repetition[r]);
        if (count == 0) return x;
        return exact::sub(exact::sub(x, a.presence[r]), exact::mul(a.frequency[r], static_cast<float>(count)));
    }

    // Row r's part of a list, inside it whatever `start` says.
    struct Segment {
        int64_t begin, end;

        Segment(const int32_t* start, int64_t r, int64_t size)
            : begin(sycl::clamp(int64_t{start[r]}, int64_t{0}, size)),
              end(sycl::clamp(int64_t{start[r + 1]}, begin, size)) {}
    };
};

}  // namespace batchinfer::gpu
