// Brings the keys and values of a block of positions from their pages into the form that the attention tiles read.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/codes.h"
#include "cpu/kernels/transpose.h"
#include "cpu/vec.h"

namespace batchinfer::BATCHINFER_ISA {

// Positions [start, start + count) of a sequence, at most kKeyBlock of them, for one key/value head.
struct Positions {
    const int32_t* pages;
    int64_t kv_head, start, count;
};

// A cache's tokens in 32-bit words: one float, or two bfloat16. Codes become one of these when they are loaded.
struct CacheShape {
    const AttentionArgs& a;
    int64_t row_bytes;  // of a token's key or value where it lies
    int64_t words;      // the same, as the tiles read it
    int64_t padded;     // the same, up to whole pairs of vectors
    bool paired;        // values are read as words of two positions of one column

    bool codes() const { return a.cache_dtype == Dtype::int8 || a.cache_dtype == Dtype::e4m3; }
};

// Calls f(first, count, byte) for every stretch of the positions that lies in one page, from `byte` of the cache on.
template <class F>
inline void for_pages(const CacheShape& c, const Positions& p, F f) {
    const int64_t page_size = c.a.page_size;
    const int32_t* page = p.pages + p.start / page_size;
    int64_t offset = p.start % page_size;
    for (int64_t t = 0, n; t < p.count; t += n, ++page, offset = 0) {
        n = page_size - offset < p.count - t ? page_size - offset : p.count - t;
        f(t, n, ((*page * c.a.kv_heads + p.kv_head) * page_size + offset) * c.row_bytes);
    }
}

// Prefetches a coming block a little at a time, between pieces of work: pages are too short for the processor to see a
// pattern, and all requests at once would only block the load units. With a context in memory this is worth 15-35 %, in
// L2 it costs 7 %.
class Ahead {
  public:
    // The block is asked for in `portions` calls of ask().
    void aim(const CacheShape& c, const Positions& p, int64_t portions) {
        current_ = ranges_ = 0;
        int64_t bytes = 0;
        for_pages(c, p, [&](int64_t, int64_t n, int64_t at) {
            range_[ranges_++] = {static_cast<const char*>(c.a.k_cache) + at, n * c.row_bytes};
            range_[ranges_++] = {static_cast<const char*>(c.a.v_cache) + at, n * c.row_bytes};
            bytes += 2 * n * c.row_bytes;
        });
        portion_ = (bytes / portions + 63) / 64 * 64;
    }

    // The next portion of the block, if it is not all asked for.
    void ask() {
        for (int64_t left = portion_; left > 0 && current_ < ranges_;) {
            Range& r = range_[current_];
            const char* const end = r.bytes < left ? r.at + r.bytes : r.at + left;
            for (const char* at = r.at; at < end; at += 64)
                __builtin_prefetch(at, 0, 2);
            left -= end - r.at;
            r.bytes -= end - r.at;
            r.at = end;
            current_ += r.bytes == 0;
        }
    }

  private:
    struct Range {
        const char* at;
        int64_t bytes;
    };
    Range range_[2 * kKeyBlock];
    int ranges_ = 0, current_ = 0;
    int64_t portion_ = 0;  // bytes
};

// A block as the tiles read it. Keys are transposed: scores of W positions are then sums of vectors. Values are
// read where they lie, in runs, unless rows need padding to whole vectors, or positions to be paired.
struct KeyBlock {
    struct Run {
        const uint32_t* values;  // CacheShape::padded words per position
        int64_t count;
    };
    uint32_t* keys;    // [words, kKeyBlock]; what stands beyond the last position is of no meaning
    uint32_t* values;  // [kKeyBlock, padded], or paired [kKeyBlock / 2, 2 * padded]
    Run* runs;         // [kKeyBlock + 1], ends with a count of 0
    // Of codes: the scales [kKeyBlock], 0 beyond the last position, and the rows of both as numbers.
    float *key_scales, *value_scales;
    uint32_t *key_rows, *value_rows;  // [kKeyBlock, words]

    static int64_t bytes(const CacheShape& c) {
        const int64_t decoded = c.codes() ? 2 * (1 + c.words) : 0;
        return (c.words + c.padded + decoded) * kKeyBlock * sizeof(uint32_t) + (kKeyBlock + 1) * sizeof(Run);
    }

    KeyBlock(const CacheShape& c, void* memory)
        : keys(static_cast<uint32_t*>(memory)),
          values(keys + c.words * kKeyBlock),
          runs(reinterpret_cast<Run*>(values + c.padded * kKeyBlock)),
          key_scales(reinterpret_cast<float*>(runs + kKeyBlock + 1)),
          value_scales(key_scales + kKeyBlock),
          key_rows(reinterpret_cast<uint32_t*>(value_scales + kKeyBlock)),
          value_rows(key_rows + c.words * kKeyBlock) {}

    void load(const CacheShape& c, const Positions& p, Ahead& ahead) const {
        const uint32_t* key[kKeyBlock];
        if (c.codes()) {
            c.a.cache_dtype == Dtype::int8 ? decode<int8_t>(c, p) : decode<e4m3>(c, p);
            for (int64_t t = 0; t < p.count; ++t)
                key[t] = key_rows + t * c.words;
        } else {
            find_rows(c, p, key);
        }
        if (c.paired) {
            pair_values(c);
        } else if (c.words != c.padded) {
            pad_values(c, p.count);
        }
        for (int64_t t = p.count; t % Vec::W != 0; ++t)
            key[t] = key[p.count - 1];
        for (int64_t t = 0; t < p.count; t += Vec::W) {
            transpose_keys(key + t, c.words, keys + t);
            ahead.ask();
        }
    }

  private:
    void find_rows(const CacheShape& c, const Positions& p, const uint32_t** key) const {
        Run* run = runs;
        for_pages(c, p, [&](int64_t t, int64_t n, int64_t at) {
            const auto* k = reinterpret_cast<const uint32_t*>(static_cast<const char*>(c.a.k_cache) + at);
            const auto* v = reinterpret_cast<const uint32_t*>(static_cast<const char*>(c.a.v_cache) + at);
            for (const int64_t end = t + n; t < end; ++t, k += c.words)
                key[t] = k;
            *run++ = {v, n};
        });
        run->count = 0;
    }

    // Codes -> rows of numbers, one run of values.
    template <class Code>
    void decode(const CacheShape& c, const Positions& p) const {
        c.paired ? decode_as<bf16, Code>(c, p) : decode_as<float, Code>(c, p);
    }
    template <class T, class Code>
    void decode_as(const CacheShape& c, const Positions& p) const {
        const int64_t width = c.a.head_width;
        for_pages(c, p, [&](int64_t t, int64_t n, int64_t at) {
            const auto* k = static_cast<const Code*>(c.a.k_cache) + at;
            const auto* v = static_cast<const Code*>(c.a.v_cache) + at;
            for (const int64_t end = t + n; t < end; ++t, k += c.row_bytes, v += c.row_bytes) {
                key_scales[t] = decode_head(k, width, reinterpret_cast<T*>(key_rows + t * c.words));
                value_scales[t] = decode_head(v, width, reinterpret_cast<T*>(value_rows + t * c.words));
            }
        });
        for (int64_t t = p.count; t < kKeyBlock; ++t)
            key_scales[t] = value_scales[t] = 0.0f;
        runs[0] = {value_rows, p.count};
        runs[1].count = 0;
    }

    static int lanes(All) { return Vec::W; }
    static int lanes(int count) { return count; }

    template <class Count>
    static Words load_words(const uint32_t* p, Count count) {
        return bits_as<Words>(Vec::load(reinterpret_cast<const float*>(p), count).v);
    }
    static void store_words(Words w, uint32_t* out) { __builtin_memcpy(out, &w, sizeof(w)); }

    // Keys of W positions [W, words] -> [words, kKeyBlock].
    static void transpose_keys(const uint32_t* const* key, int64_t words, uint32_t* out) {
        for_vectors(words, [&](int64_t first, auto n) {
            Words square[Vec::W];
#pragma GCC unroll 16
            for (int i = 0; i < Vec::W; ++i)
                square[i] = load_words(key[i] + first, n);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < Vec::W; ++i) {
                if (i >= lanes(n)) return;
                store_words(square[i], out + (first + i) * kKeyBlock);
            }
        });
    }

    // All runs -> pairs in `values`; padding and what an odd last position is paired with are zero.
    void pair_values(const CacheShape& c) const {
        uint32_t* out = values;
        const uint32_t* even = nullptr;  // waits for its partner
        const auto write = [&](const uint32_t* odd) {
            for_vectors(c.words, [&](int64_t j, auto n) {
                Words pair[2] = {load_words(even + j, n), odd ? load_words(odd + j, n) : Words{}};
                interleave_halves(pair);
                store_words(pair[0], out + 2 * j);
                store_words(pair[1], out + 2 * j + Vec::W);
            });
            out += 2 * c.padded;
            even = nullptr;
        };
        for (const Run* run = runs; run->count > 0; ++run) {
            for (int64_t i = 0; i < run->count; ++i) {
                const uint32_t* row = run->values + i * c.words;
                even ? write(row) : void(even = row);
            }
        }
        if (even) write(nullptr);
    }

    // All runs -> one run in `values`, padding zero.
    void pad_values(const CacheShape& c, int64_t count) const {
        uint32_t* out = values;
        for (const Run* run = runs; run->count > 0; ++run) {
            for (int64_t i = 0; i < run->count; ++i, out += c.padded) {
                for_vectors(c.words, [&](int64_t j, auto n) {
                    store_words(load_words(run->values + i * c.words + j, n), out + j);
                });
                const int64_t filled = (c.words + Vec::W - 1) / Vec::W * Vec::W;
                for (int64_t j = filled; j < c.padded; j += Vec::W)
                    store_words(Words{}, out + j);
            }
        }
        runs[0] = {values, count};
        runs[1].count = 0;
    }
};

}  // namespace batchinfer::BATCHINFER_ISA
