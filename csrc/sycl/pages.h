// copy_pages: whole pages of both caches, 16 bytes a work-item; see csrc/gpu/pages.cu.
#pragma once

#include "sycl/device.h"

namespace batchinfer::gpu {

struct CopyPages {
    using Args = CopyPagesArgs;
    using Local = NoLocal;
    using Word = sycl::uint4;
    static constexpr int kThreads = 256;

    // Rows are the copies in k_cache, then those in v_cache.
    static void run(const Item& item, Local&, const Args& a) {
        const int64_t words = a.page_bytes / sizeof(Word), i = item.get_global_id(1);
        const int64_t row = item.get_group(0), copy = row % a.copies;
        const int64_t from = a.source[copy], to = a.target[copy];
        if (i >= words || from < 0 || from >= a.pages || to < 0 || to >= a.pages) return;
        Word* cache = static_cast<Word*>(row < a.copies ? a.k_cache : a.v_cache);
        cache[to * words + i] = cache[from * words + i];
    }
};

}  // namespace batchinfer::gpu
