#include "cpu/kernels/attention.h"

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/key_block.h"
#include "cpu/kernels/online_softmax.h"
#include "cpu/kernels/tile.h"

namespace batchinfer::BATCHINFER_ISA {
namespace {

// How the staged words are read, and queries and probabilities written for it.
struct F32Cache {
    using Keys = F32Weights;
    using Values = F32Weights;
    using Factor = float;
    static constexpr int64_t kValuesPerWord = 1;
    static constexpr bool kPaired = false, kScaled = false;
};
#if BATCHINFER_BF16_DOT
// Queries and probabilities are rounded to bfloat16, as on a GPU; their sum is not.
struct Bf16Cache {
    using Keys = Bf16DotWeights;
    using Values = Bf16DotWeights;
    using Factor = bf16;
    static constexpr int64_t kValuesPerWord = 1;
    static constexpr bool kPaired = true, kScaled = false;
};
// Codes are bfloat16 numbers; the scales of keys go into the scores, those of values into the probabilities. Those of
// e4m3 are 1.
struct CodesCache : Bf16Cache {
    static constexpr bool kScaled = true;
};
#else
struct Bf16Cache {
    using Keys = Bf16Weights;
    using Values = Bf16Columns;
    using Factor = float;
    static constexpr int64_t kValuesPerWord = 2;
    static constexpr bool kPaired = false, kScaled = false;
};
struct CodesCache : F32Cache {
    static constexpr bool kScaled = true;
};
#endif

constexpr int64_t kSplitBlocks = kSplit / kKeyBlock;

int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

CacheShape cache_shape(const AttentionArgs& a) {
    const bool scaled = a.cache_dtype == Dtype::int8, codes = scaled || a.cache_dtype == Dtype::e4m3;
    const bool half = codes ? CodesCache::kPaired : a.cache_dtype == Dtype::bfloat16;
    const int64_t per_word = half ? 2 : 1, words = a.head_width / per_word;
    return {a, codes ? a.head_width + (scaled ? kScaleBytes<int8_t> : 0) : words * 4, words,
            padded_width(a.head_width) / per_word, half && Bf16Cache::kPaired};
}

// Sizes in bytes of an item's buffers, each rounded up to a cache line.
struct Sizes {
    int64_t block, q, states, scores, probabilities, positions;

    Sizes(const AttentionArgs& a, int64_t rows)
        : block(lines(KeyBlock::bytes(cache_shape(a)))),
          q(lines(round_up(a.head_width, kDepthBlock) * rows * sizeof(float))),
          states(lines(rows * state_floats(a.head_width) * sizeof(float))),
          scores(lines(kTileRows * kDepthBlock * sizeof(float))),
          probabilities(scores),
          positions(lines(rows * sizeof(int64_t))) {}

    int64_t total() const { return block + q + 2 * states + scores + probabilities + positions; }

  private:
    static int64_t lines(int64_t bytes) { return round_up(bytes, 64); }
};

// An item's buffers in the thread's scratch memory.
struct Work {
    const AttentionArgs& a;
    int64_t rows, width, group;
    CacheShape cache;
    KeyBlock block;
    void* q;              // Factors [head width / kDepthBlock, rows, kDepthBlock]
    float* running;       // [rows, state_floats]: the open split
    float* total;         // [rows, state_floats]: closed splits
    float* scores;        // [tile rows, kDepthBlock]
    void* probabilities;  // Factors [tile rows, kDepthBlock]
    int64_t* position;    // [rows]

    Work(const AttentionArgs& args, int64_t num_rows, void* scratch)
        : a(args),
          rows(num_rows),
          width(padded_width(args.head_width)),
          group(args.heads / args.kv_heads),
          cache(cache_shape(args)),
          block(cache, scratch) {
        const Sizes size(args, rows);
        char* next = static_cast<char*>(scratch) + size.block;
        const auto take = [&](int64_t bytes) {
            char* p = next;
            next += bytes;
            return p;
        };
        q = take(size.q);
        running = reinterpret_cast<float*>(take(size.states));
        total = reinterpret_cast<float*>(take(size.states));
        scores = reinterpret_cast<float*>(take(size.scores));
        probabilities = take(size.probabilities);
        position = reinterpret_cast<int64_t*>(take(size.positions));
    }

    State running_of(int64_t row) const { return {running + row * state_floats(a.head_width), width}; }
    State total_of(int64_t row) const { return {total + row * state_floats(a.head_width), width}; }
};

size_t scratch_bytes(const AttentionArgs& a, int64_t rows) {
    return Sizes(a, rows).total();
}

template <class Factor>
void load_queries(const Work& w, const QueryRange& queries, int64_t kv_head, int64_t row) {
    const AttentionArgs& a = w.a;
    for (int64_t i = 0; i < queries.tokens * w.group; ++i, ++row) {
        const int64_t token = queries.token + i / w.group, head = kv_head * w.group + i % w.group;
        const float* q = a.q + (token * a.heads + head) * a.head_width;
        for (int64_t e = 0; e < a.head_width; e += Vec::W) {
            Factor* out = static_cast<Factor*>(w.q) + (e / kDepthBlock * w.rows + row) * kDepthBlock + e % kDepthBlock;
            Vec::load(q + e, static_cast<int>(min(a.head_width - e, Vec::W))).store(out);
        }
        w.position[row] = queries.position + i / w.group;
    }
}

// R rows from `row` on against `count` positions of the loaded block, the first of which is `start`.
template <class Cache, int R>
void attend_tile(const Work& w, int64_t row, int64_t start, int64_t count, Ahead& ahead) {
    using Keys = typename Cache::Keys;
    using Values = typename Cache::Values;
    constexpr int C = R <= kWideTileRows ? 4 : 2;
    constexpr int64_t kColumns = C * Vec::W;
    static_assert(kKeyBlock % kColumns == 0 && kKeyBlock <= kDepthBlock);
    const Vec scale = Vec::broadcast(w.a.scale);
    for (int64_t n = 0; n < count; n += kColumns) {
        Vec sum[R][C];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                sum[r][c] = Vec::zero();
        }
        constexpr int64_t kRow = kDepthBlock / Keys::kDepth;
        const auto* q = static_cast<const typename Keys::Activation*>(w.q) + row * kRow;
        const auto* keys = reinterpret_cast<const typename Keys::Word*>(w.block.keys) + n;
        for (int64_t e = 0; e < w.a.head_width; e += kDepthBlock, q += w.rows * kRow) {
            const int64_t steps = min(w.a.head_width - e, kDepthBlock) / (Keys::kParts * Keys::kDepth);
            accumulate<Keys>(sum, steps, q, keys, kKeyBlock, 2 * Vec::W);
            keys += steps * kKeyBlock;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                Vec score = sum[r][c] * scale;
                if constexpr (Cache::kScaled) score = score * Vec::load(w.block.key_scales + n + c * Vec::W);
                score.store(w.scores + r * kDepthBlock + n + c * Vec::W);
            }
        }
    }
    ahead.ask();
    float factor[R];
    for (int r = 0; r < R; ++r) {
        float* scores = w.scores + r * kDepthBlock;
        const int64_t position = w.position[row + r];
        if (w.a.softcap > 0.0f) softcap({scores, 1, round_up(count, Vec::W), w.a.softcap}, 0, 1);
        factor[r] = softmax(scores, window_start(position, w.a.window) - start, position - start + 1, count,
                            w.running_of(row + r), Cache::kScaled ? w.block.value_scales : nullptr,
                            static_cast<typename Cache::Factor*>(w.probabilities) + r * kDepthBlock);
    }
    ahead.ask();
    const int64_t stride = state_floats(w.a.head_width);
    const auto add_values = [&]<int D>(int64_t e, Vec(&sum)[R][D]) {
        float* out = w.running + row * stride + e;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec f = Vec::broadcast(factor[r]);
#pragma GCC unroll 4
            for (int c = 0; c < D; ++c)
                sum[r][c] = Vec::load(out + r * stride + c * Vec::W) * f;
        }
        const auto* p = static_cast<const typename Values::Activation*>(w.probabilities);
        if constexpr (Cache::kPaired) {
            const auto* values = w.block.values + e;
            accumulate<Values>(sum, (count + 1) / 2, p, values, w.width, 2 * Vec::W);
        } else {
            const auto* end = p + count;
            for (const KeyBlock::Run* run = w.block.runs; run->count > 0 && p < end; p += run++->count) {
                const auto* values =
                    reinterpret_cast<const typename Values::Word*>(run->values) + e / Cache::kValuesPerWord;
                accumulate<Values>(sum, min(run->count, end - p), p, values, w.cache.padded,
                                   2 * Vec::W / Cache::kValuesPerWord);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < D; ++c)
                sum[r][c].store(out + r * stride + c * Vec::W);
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

using AttendTile = void (*)(const Work&, int64_t row, int64_t start, int64_t count, Ahead&);

// Entry r is for r + 1 rows.
template <class Cache>
struct ByRows {
    AttendTile entry[kTileRows];
    template <int R>
    constexpr void fill() {
        entry[R - 1] = attend_tile<Cache, R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr ByRows() : entry{} { fill<kTileRows>(); }
};
constexpr ByRows<F32Cache> kF32ByRows;
constexpr ByRows<Bf16Cache> kBf16ByRows;
constexpr ByRows<CodesCache> kCodesByRows;

// f of what stands for the dtype of the cache.
template <class F>
auto with_cache(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::bfloat16:
            return f(Bf16Cache{}, kBf16ByRows.entry);
        case Dtype::int8:
        case Dtype::e4m3:
            return f(CodesCache{}, kCodesByRows.entry);
        default:
            return f(F32Cache{}, kF32ByRows.entry);
    }
}

int64_t furthest(const Work& w, int64_t begin, int64_t end) {
    int64_t position = -1;
    for (int64_t r = begin; r < end; ++r)
        position = w.position[r] > position ? w.position[r] : position;
    return position;
}

// The first position that any of the rows [begin, end) sees.
int64_t earliest(const Work& w, int64_t begin, int64_t end) {
    int64_t position = INT64_MAX;
    for (int64_t r = begin; r < end; ++r)
        position = min(position, window_start(w.position[r], w.a.window));
    return position;
}

// Rows [begin, end) against key blocks [first, last) of one sequence, as far as they see. `after`: what comes next.
void attend_blocks(const Work& w, const int32_t* pages, int64_t kv_head, int64_t begin, int64_t end, int64_t first,
                   int64_t last, const Positions& after, Ahead& ahead) {
    const int64_t length = furthest(w, begin, end) + 1;
    const AttendTile* by_rows = with_cache(w.a.cache_dtype, [](auto, const AttendTile* entry) { return entry; });
    const int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
    first = max(first, earliest(w, begin, end) / kKeyBlock);
    last = min(last, (length + kKeyBlock - 1) / kKeyBlock);
    const auto positions = [&](int64_t block) {
        return Positions{pages, kv_head, block * kKeyBlock, min(kKeyBlock, length - block * kKeyBlock)};
    };
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kKeyBlock;
        if (start % kSplit == 0 && start > 0) {
            for (int64_t r = begin; r < end; ++r) {
                w.total_of(r).add(w.running_of(r));
                w.running_of(r).clear();
            }
        }
        const Positions now = positions(block);
        // KeyBlock::load asks for every W positions, a tile twice.
        const int64_t portions = (now.count + Vec::W - 1) / Vec::W + 2 * tiles;
        ahead.aim(w.cache, block + 1 < last ? positions(block + 1) : after, portions);
        w.block.load(w.cache, now, ahead);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t row = begin + (end - begin) * i / tiles, next = begin + (end - begin) * (i + 1) / tiles;
            const int64_t seen = furthest(w, row, next) + 1 - start;  // by any row of the tile
            if (seen > 0 && earliest(w, row, next) < start + kKeyBlock)
                by_rows[next - row - 1](w, row, start, min(seen, kKeyBlock), ahead);
        }
    }
}

// The start of a sequence's pages that a query range reads from block `first` on.
Positions beginning(const AttentionArgs& a, const QueryRange& queries, int64_t kv_head, int64_t first) {
    first = max(first, window_start(queries.position, a.window) / kKeyBlock);
    const int64_t start = first * kKeyBlock, length = queries.position + queries.tokens;
    return {queries.pages, kv_head, start, start < length ? min(kKeyBlock, length - start) : 0};
}

Positions beginning(const AttentionArgs& a, const AttentionItem& item) {
    return beginning(a, item.queries[0], item.kv_head, item.partial ? item.split * kSplitBlocks : 0);
}

void finish(const AttentionArgs& a, const QueryRange& queries, int64_t kv_head, int64_t index, State state) {
    const int64_t group = a.heads / a.kv_heads;
    const int64_t row = (queries.token + index / group) * a.heads + kv_head * group + index % group;
    const Vec sum = Vec::broadcast(state.sum());
    const int64_t at = row * a.head_width;
    for (int64_t e = 0; e < a.head_width; e += 2 * Vec::W) {
        Vec pair[2] = {Vec::load(state.values + e) / sum, Vec::load(state.values + e + Vec::W) / sum};
        if (a.cache_dtype == Dtype::bfloat16 && !Bf16Cache::kPaired) interleave(pair);  // as Bf16Columns left them
        for (int64_t i = 0; i < 2 && e + i * Vec::W < a.head_width; ++i) {
            const int count = static_cast<int>(min(a.head_width - e - i * Vec::W, Vec::W));
            const int64_t first = at + e + i * Vec::W;
            a.out_dtype == Dtype::bfloat16 ? pair[i].store(static_cast<bf16*>(a.out) + first, count)
                                           : pair[i].store(static_cast<float*>(a.out) + first, count);
        }
    }
    a.lse[row] = state.maximum() + __builtin_logf(state.sum());
}

void attend(const AttentionArgs& a, const AttentionItem& item, const AttentionItem* next, void* scratch) {
    const int64_t group = a.heads / a.kv_heads;
    int64_t rows = 0;
    for (int64_t i = 0; i < item.num_queries; ++i)
        rows += item.queries[i].tokens * group;
    const Work w(a, rows, scratch);
    for (int64_t i = 0, row = 0; i < item.num_queries; row += item.queries[i++].tokens * group) {
        with_cache(a.cache_dtype, [&](auto cache, const AttendTile*) {
            load_queries<typename decltype(cache)::Factor>(w, item.queries[i], item.kv_head, row);
        });
    }
    for (int64_t r = 0; r < rows; ++r) {
        w.running_of(r).clear();
        w.total_of(r).clear();
    }
    const Positions after = next ? beginning(a, *next) : Positions{};
    Ahead ahead;
    if (item.partial) {
        attend_blocks(w, item.queries->pages, item.kv_head, 0, rows, item.split * kSplitBlocks,
                      (item.split + 1) * kSplitBlocks, after, ahead);
        __builtin_memcpy(item.partial, w.running, rows * state_floats(a.head_width) * sizeof(float));
        return;
    }
    const int64_t shared = item.shared_blocks;
    attend_blocks(w, item.queries->pages, item.kv_head, 0, rows, 0, shared,
                  beginning(a, item.queries[0], item.kv_head, shared), ahead);
    for (int64_t i = 0, row = 0; i < item.num_queries; ++i) {
        const QueryRange& queries = item.queries[i];
        const int64_t count = queries.tokens * group;
        attend_blocks(w, queries.pages, item.kv_head, row, row + count, shared, INT64_MAX,
                      i + 1 < item.num_queries ? beginning(a, item.queries[i + 1], item.kv_head, shared) : after,
                      ahead);
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
