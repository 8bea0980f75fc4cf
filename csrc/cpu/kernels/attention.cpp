#include "cpu/kernels/attention.h"

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/transpose.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

constexpr float kNegInf = -__builtin_inff();

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Head width in the buffers: whole tiles of two vectors.
int64_t padded_width(int64_t head_width) { return round_up(head_width, 2 * Vec::W); }

// Running sums of a row: weighted values [padded width], then the maximum of the scores and the sum of exponentials.
struct State {
    float* values;
    int64_t width;

    float& maximum() const { return values[width]; }
    float& sum() const { return values[width + 1]; }

    void clear() const {
        for (int64_t i = 0; i < width; i += Vec::W) Vec::zero().store(values + i);
        maximum() = kNegInf;
        sum() = 0.0f;
    }

    void add(State other) const {
        if (other.maximum() == kNegInf) return;  // the row lies before the other split
        const float top = maximum() > other.maximum() ? maximum() : other.maximum();
        const Vec mine = exp(Vec::broadcast(maximum() - top)), theirs = exp(Vec::broadcast(other.maximum() - top));
        for (int64_t i = 0; i < width; i += Vec::W) {
            fma(Vec::load(values + i), mine, Vec::load(other.values + i) * theirs).store(values + i);
        }
        const Vec total = fma(Vec::broadcast(sum()), mine, Vec::broadcast(other.sum()) * theirs);
        maximum() = top;
        sum() = total.v[0];
    }
};

int64_t state_floats(int64_t head_width) { return padded_width(head_width) + Vec::W; }

// The buffers of one item, carved out of the thread's scratch memory.
struct Work {
    const AttentionArgs& a;
    int64_t rows, width, group;
    float* q;          // [head width / kDepthBlock, rows, kDepthBlock], scaled
    float* running;    // [rows, state_floats]: the open split
    float* total;      // [rows, state_floats]: closed splits
    float* keys;       // [head width, kKeyBlock]
    float* values;     // [kKeyBlock, width]
    float* scores;     // [tile rows, kDepthBlock]
    int64_t* position;  // [rows]
    size_t bytes = 0;   // of all buffers

    // With scratch null only `bytes` is of use.
    Work(const AttentionArgs& args, int64_t num_rows, void* scratch)
        : a(args), rows(num_rows), width(padded_width(args.head_width)), group(args.heads / args.kv_heads) {
        const auto take = [&](int64_t floats) {
            char* p = scratch ? static_cast<char*>(scratch) + bytes : nullptr;
            bytes += round_up(floats * sizeof(float), 64);
            return reinterpret_cast<float*>(p);
        };
        q = take(round_up(a.head_width, kDepthBlock) * rows);
        running = take(rows * state_floats(a.head_width));
        total = take(rows * state_floats(a.head_width));
        keys = take(a.head_width * kKeyBlock);
        values = take(kKeyBlock * width);
        scores = take(kTileRows * kDepthBlock);
        position = reinterpret_cast<int64_t*>(take(2 * rows));
    }

    State running_of(int64_t row) const { return {running + row * state_floats(a.head_width), width}; }
    State total_of(int64_t row) const { return {total + row * state_floats(a.head_width), width}; }
};

size_t scratch_bytes(const AttentionArgs& a, int64_t rows) {
    return Work(a, rows, nullptr).bytes;
}

void load_queries(const Work& w, const QueryRange& queries, int64_t kv_head, int64_t row) {
    const AttentionArgs& a = w.a;
    const Vec scale = Vec::broadcast(a.scale);
    for (int64_t i = 0; i < queries.tokens * w.group; ++i, ++row) {
        const int64_t token = queries.token + i / w.group, head = kv_head * w.group + i % w.group;
        const float* q = a.q + (token * a.heads + head) * a.head_width;
        for (int64_t e = 0; e < a.head_width; e += Vec::W) {
            float* out = w.q + (e / kDepthBlock * w.rows + row) * kDepthBlock + e % kDepthBlock;
            (Vec::load(q + e, static_cast<int>(min(a.head_width - e, Vec::W))) * scale).store(out);
        }
        w.position[row] = queries.position + i / w.group;
    }
}

// Keys [count, head width] -> [head width, kKeyBlock], in float.
void stage_keys(const Work& w, const void* const* token, int64_t count) {
    const bool half = w.a.cache_dtype == Dtype::bfloat16;
    const int64_t words = half ? w.a.head_width / 2 : w.a.head_width;
    for (int64_t t = 0; t < count; t += Vec::W) {
        for (int64_t first = 0; first < words; first += Vec::W) {
            const int n = static_cast<int>(min(words - first, Vec::W));
            Words square[Vec::W];
            for (int i = 0; i < Vec::W; ++i) {
                const float* p = static_cast<const float*>(token[min(t + i, count - 1)]) + first;
                square[i] = bits_as<Words>(n == Vec::W ? Vec::load(p).v : Vec::load(p, n).v);
            }
            transpose(square);
            float* out = w.keys + t;
            if (half) {
                out += 2 * first * kKeyBlock;
                for (int i = 0; i < n; ++i, out += 2 * kKeyBlock) {
                    Vec{bits_as<Floats>(square[i] << 16)}.store(out);
                    Vec{bits_as<Floats>(square[i] & 0xffff0000u)}.store(out + kKeyBlock);
                }
            } else {
                out += first * kKeyBlock;
                for (int i = 0; i < n; ++i, out += kKeyBlock) Vec{bits_as<Floats>(square[i])}.store(out);
            }
        }
    }
}

// Values [count, head width] -> [count, width], in float, padding zero.
template <class T>
void stage_values(const Work& w, const void* const* token, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
        const T* p = static_cast<const T*>(token[t]);
        float* out = w.values + t * w.width;
        int64_t e = 0;
        for (; e + Vec::W <= w.a.head_width; e += Vec::W) Vec::load(p + e).store(out + e);
        if (e < w.a.head_width) Vec::load(p + e, static_cast<int>(w.a.head_width - e)).store(out + e), e += Vec::W;
        for (; e < w.width; e += Vec::W) Vec::zero().store(out + e);
    }
}

// Brings positions [start, start + count) of the item's head into `keys` and `values`.
void stage(const Work& w, const int32_t* pages, int64_t kv_head, int64_t start, int64_t count) {
    const AttentionArgs& a = w.a;
    const int64_t row = a.head_width * (a.cache_dtype == Dtype::bfloat16 ? 2 : 4);
    const void *key[kKeyBlock], *value[kKeyBlock];
    for (int64_t t = 0; t < count;) {
        const int64_t offset = (start + t) % a.page_size;
        const int64_t run = min(count - t, a.page_size - offset);
        const int64_t at = ((pages[(start + t) / a.page_size] * a.kv_heads + kv_head) * a.page_size + offset) * row;
        for (int64_t i = 0; i < run; ++i, ++t) {
            key[t] = static_cast<const char*>(a.k_cache) + at + i * row;
            value[t] = static_cast<const char*>(a.v_cache) + at + i * row;
        }
    }
    stage_keys(w, key, count);
    a.cache_dtype == Dtype::bfloat16 ? stage_values<bf16>(w, value, count) : stage_values<float>(w, value, count);
}

// Replaces the scores of a row by exponentials and updates its maximum and sum. `seen`: scores that the row may see,
// of `count` computed. Returns the factor for what was summed before.
float softmax(float* scores, int64_t seen, int64_t count, State state) {
    if (seen <= 0) {
        for (int64_t i = 0; i < count; i += Vec::W) Vec::zero().store(scores + i);
        return 1.0f;
    }
    Vec top = Vec::broadcast(state.maximum());
    for (int64_t i = 0; i < count; i += Vec::W) {
        Vec s = Vec::load(scores + i);
        if (i + Vec::W > seen) {
            const Ints visible = lane_index() < static_cast<int>(seen - i);
            s = select(visible, s, Vec::broadcast(kNegInf));
            s.store(scores + i);
        }
        top = max(s, top);
    }
    const float maximum = reduce_max(top);
    const Vec shift = Vec::broadcast(maximum);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < count; i += Vec::W) {
        const Vec p = exp(Vec::load(scores + i) - shift);
        p.store(scores + i);
        sum = sum + p;
    }
    const float factor = maximum == state.maximum() ? 1.0f : exp(Vec::broadcast(state.maximum() - maximum)).v[0];
    state.maximum() = maximum;
    state.sum() = state.sum() * factor + reduce_sum(sum);
    return factor;
}

// R rows from `row` on against `count` staged positions, the first of which is `start`.
template <int R>
void attend_tile(const Work& w, int64_t row, int64_t start, int64_t count) {
    constexpr int C = R <= kWideTileRows ? 4 : 2;
    constexpr int64_t kColumns = C * Vec::W;
    static_assert(kKeyBlock % kColumns == 0 && kKeyBlock <= kDepthBlock);
    for (int64_t n = 0; n < count; n += kColumns) {
        Vec sum[R][C];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
        }
        const float* q = w.q + row * kDepthBlock;
        for (int64_t e = 0; e < w.a.head_width; e += kDepthBlock, q += w.rows * kDepthBlock) {
            accumulate<F32Weights>(sum, min(w.a.head_width - e, kDepthBlock), q, w.keys + e * kKeyBlock + n, kKeyBlock,
                                   2 * Vec::W);
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sum[r][c].store(w.scores + r * kDepthBlock + n + c * Vec::W);
        }
    }
    float factor[R];
    for (int r = 0; r < R; ++r) {
        const int64_t seen = w.position[row + r] - start + 1;
        factor[r] = softmax(w.scores + r * kDepthBlock, seen, count, w.running_of(row + r));
    }
    const int64_t stride = state_floats(w.a.head_width);
    const auto add_values = [&]<int D>(int64_t e, Vec(&sum)[R][D]) {
        float* out = w.running + row * stride + e;
        for (int r = 0; r < R; ++r) {
            const Vec f = Vec::broadcast(factor[r]);
            for (int c = 0; c < D; ++c) sum[r][c] = Vec::load(out + r * stride + c * Vec::W) * f;
        }
        accumulate<F32Weights>(sum, count, w.scores, w.values + e, w.width, 2 * Vec::W);
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < D; ++c) sum[r][c].store(out + r * stride + c * Vec::W);
        }
    };
    int64_t e = 0;
    for (; e + kColumns <= w.width; e += kColumns) {
        Vec sum[R][C];
        add_values(e, sum);
    }
    for (; e < w.width; e += 2 * Vec::W) {
        Vec sum[R][2];
        add_values(e, sum);
    }
}

using AttendTile = void (*)(const Work&, int64_t row, int64_t start, int64_t count);

// Entry r is for r + 1 rows.
struct ByRows {
    AttendTile entry[kTileRows];
    template <int R>
    constexpr void fill() {
        entry[R - 1] = attend_tile<R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr ByRows() : entry{} { fill<kTileRows>(); }
};
constexpr ByRows kByRows;

// Rows [begin, end), all of the same pages, against key blocks [first, last).
void attend_blocks(const Work& w, const int32_t* pages, int64_t kv_head, int64_t begin, int64_t end, int64_t first,
                   int64_t last) {
    int64_t furthest = -1;
    for (int64_t r = begin; r < end; ++r) furthest = w.position[r] > furthest ? w.position[r] : furthest;
    const int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kKeyBlock;
        if (start > furthest) return;
        if (start % kSplit == 0 && start > 0) {
            for (int64_t r = begin; r < end; ++r) {
                w.total_of(r).add(w.running_of(r));
                w.running_of(r).clear();
            }
        }
        stage(w, pages, kv_head, start, min(kKeyBlock, furthest + 1 - start));
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t row = begin + (end - begin) * i / tiles, next = begin + (end - begin) * (i + 1) / tiles;
            int64_t seen = 0;  // by any row of the tile
            for (int64_t r = row; r < next; ++r) {
                seen = w.position[r] - start + 1 > seen ? w.position[r] - start + 1 : seen;
            }
            if (seen > 0) kByRows.entry[next - row - 1](w, row, start, min(seen, kKeyBlock));
        }
    }
}

void finish(const AttentionArgs& a, const QueryRange& queries, int64_t kv_head, int64_t index, State state) {
    const int64_t group = a.heads / a.kv_heads;
    const int64_t row = (queries.token + index / group) * a.heads + kv_head * group + index % group;
    const Vec sum = Vec::broadcast(state.sum());
    for (int64_t e = 0; e < a.head_width; e += Vec::W) {
        const int count = static_cast<int>(min(a.head_width - e, Vec::W));
        (Vec::load(state.values + e) / sum).store(a.out + row * a.head_width + e, count);
    }
    a.lse[row] = state.maximum() + __builtin_logf(state.sum());
}

void attend(const AttentionArgs& a, const AttentionItem& item, void* scratch) {
    const int64_t group = a.heads / a.kv_heads;
    int64_t rows = 0;
    for (int64_t i = 0; i < item.num_queries; ++i) rows += item.queries[i].tokens * group;
    const Work w(a, rows, scratch);
    for (int64_t i = 0, row = 0; i < item.num_queries; row += item.queries[i++].tokens * group) {
        load_queries(w, item.queries[i], item.kv_head, row);
    }
    for (int64_t r = 0; r < rows; ++r) {
        w.running_of(r).clear();
        w.total_of(r).clear();
    }
    if (item.partial) {
        constexpr int64_t blocks = kSplit / kKeyBlock;
        attend_blocks(w, item.queries->pages, item.kv_head, 0, rows, item.split * blocks, (item.split + 1) * blocks);
        __builtin_memcpy(item.partial, w.running, rows * state_floats(a.head_width) * sizeof(float));
        return;
    }
    attend_blocks(w, item.queries->pages, item.kv_head, 0, rows, 0, item.shared_blocks);
    for (int64_t i = 0, row = 0; i < item.num_queries; ++i) {
        const QueryRange& queries = item.queries[i];
        const int64_t count = queries.tokens * group;
        attend_blocks(w, queries.pages, item.kv_head, row, row + count, item.shared_blocks, INT64_MAX);
        for (int64_t r = 0; r < count; ++r, ++row) {
            w.total_of(row).add(w.running_of(row));
            finish(a, queries, item.kv_head, r, w.total_of(row));
        }
    }
}

void merge(const AttentionArgs& a, const QueryRange& queries, int64_t kv_head, const float* partial, int64_t splits,
           void* scratch) {
    const int64_t rows = queries.tokens * (a.heads / a.kv_heads), size = state_floats(a.head_width);
    const int64_t width = padded_width(a.head_width);
    const State total = {static_cast<float*>(scratch), width};
    for (int64_t r = 0; r < rows; ++r) {
        total.clear();
        for (int64_t s = 0; s < splits; ++s) {
            total.add({const_cast<float*>(partial) + (s * rows + r) * size, width});
        }
        finish(a, queries, kv_head, r, total);
    }
}

}  // namespace

const AttentionKernel attention_kernel = {scratch_bytes, state_floats, attend, merge};

}  // namespace batchinfer::BATCHINFER_ISA
