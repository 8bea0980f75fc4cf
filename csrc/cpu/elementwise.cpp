// Embedding, norms, rope, activation, gather, page copy: index checks and the split over threads.
#include <cstring>
#include <stdexcept>

#include "cpu/backend.h"

namespace batchinfer {
namespace {

// Rows per thread below which waking another thread costs more than it saves: about 16 K floats, 2-4 us of work.
int64_t grain(int64_t floats_per_row) {
    return 1 + (int64_t{1} << 14) / (floats_per_row + 1);
}

template <class Index>
void check_indices(const char* op, const char* name, const Index* values, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] < 0 || values[i] >= limit) {
            throw std::invalid_argument(std::string(op) + ": " + name + "[" + std::to_string(i) + "]=" +
                                        std::to_string(values[i]) + " is not in [0, " + std::to_string(limit) + ")");
        }
    }
}

template <class Args>
void by_rows(Cpu& cpu, void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t rows,
             int64_t floats_per_row) {
    cpu.pool.parallel_for(rows, [&](int64_t begin, int64_t end, int) { kernel(a, begin, end); }, grain(floats_per_row));
}

}  // namespace

void embed(Cpu& cpu, const EmbedArgs& a) {
    check_indices("embed", "ids", a.ids, a.tokens, a.vocab);
    by_rows(cpu, cpu.kernels.embed, a, a.tokens, a.width);
}

void rms_norm(Cpu& cpu, const RmsNormArgs& a) {
    by_rows(cpu, cpu.kernels.rms_norm, a, a.tokens, a.width);
}

void layer_norm(Cpu& cpu, const LayerNormArgs& a) {
    by_rows(cpu, cpu.kernels.layer_norm, a, a.tokens, a.width);
}

void add(Cpu& cpu, const AddArgs& a) {
    by_rows(cpu, cpu.kernels.add, a, a.tokens, a.width);
}

void softcap(Cpu& cpu, const SoftcapArgs& a) {
    by_rows(cpu, cpu.kernels.softcap, a, a.rows, a.width);
}

void rope_and_cache(Cpu& cpu, const RopeAndCacheArgs& a) {
    if (a.cos_sin) check_indices("rope_and_cache", "positions", a.positions, a.tokens, a.max_positions);
    check_indices("rope_and_cache", "kv_index", a.kv_index, a.tokens, a.pages * a.page_size);
    by_rows(cpu, cpu.kernels.rope_and_cache, a, a.tokens, (a.heads + 2 * a.kv_heads) * a.head_width);
}

void silu_mul(Cpu& cpu, const GateArgs& a) {
    by_rows(cpu, cpu.kernels.silu_mul, a, a.tokens, 2 * a.width);
}

void gelu_mul(Cpu& cpu, const GateArgs& a) {
    by_rows(cpu, cpu.kernels.gelu_mul, a, a.tokens, 2 * a.width);
}

void activate(Cpu& cpu, const ActivateArgs& a) {
    by_rows(cpu, cpu.kernels.activate, a, a.tokens, a.width);
}

void gather_rows(Cpu& cpu, const GatherRowsArgs& a) {
    check_indices("gather_rows", "index", a.index, a.rows, a.x_rows);
    by_rows(cpu, cpu.kernels.gather_rows, a, a.rows, a.width);
}

void copy_pages(Cpu& cpu, const CopyPagesArgs& a) {
    check_indices("copy_pages", "source", a.source, a.copies, a.pages);
    check_indices("copy_pages", "target", a.target, a.copies, a.pages);
    cpu.pool.parallel_for(
        2 * a.copies,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                char* cache = static_cast<char*>(i < a.copies ? a.k_cache : a.v_cache);
                const int64_t from = a.source[i % a.copies], to = a.target[i % a.copies];
                std::memcpy(cache + to * a.page_bytes, cache + from * a.page_bytes, a.page_bytes);
            }
        },
        grain(a.page_bytes / sizeof(float)));
}

}  // namespace batchinfer
