// Attention of sequences with several tokens in the step: bound by the matrix unit. The loop of FlashAttention-2
// (Dao 2023, arXiv:2307.08691) over paged keys.
//
// A block takes 128 rows of one kv head against tiles of 64 positions; a warp holds 32 of them, so that each key and
// value fragment read from shared memory feeds two products. With 16 rows a warp, shared memory would be the bound: 144
// KB a tile of 64 x 64 are 1,125 cycles at 128 bytes a cycle, its products 750. 32 rows of width 128 take 128 registers
// for the output and 64 for the scores, so the queries stay in shared memory. Two buffers of keys and values and one
// barrier a tile; 96 KB a block, so that two blocks a multiprocessor cover each other's softmax. On an H100 this
// reaches 347 TFLOP/s (8,192 tokens, causal, width 128), half of what these matrix instructions can do there. Within a
// sequence the last tiles, which see the most keys, come first in the work list. For AMD's GPUs the figures are others,
// as below, and nothing was measured.
#include "gpu/attention.cuh"

namespace batchinfer::gpu {
namespace {

// AMD's GPUs have 64 KB of shared memory: smaller tiles, and one block a multiprocessor, so of more warps.
constexpr int kThreads = kAsyncCopies ? 128 : 256;
constexpr int kKeys = kAsyncCopies ? 64 : 16;  // positions of a tile

template <int E>
constexpr int kTileBytes = kKeys * E * 2;  // of keys, or of values
template <int E>
constexpr int kQueryBytes = kPrefillRows * E * 2;
template <int E>
constexpr int kSharedBytes = kQueryBytes<E> + 4 * kTileBytes<E>;
// Of codes two buffers take as much as one of bf16, and another one has the tile in hand as bf16.
template <class C, int E>
constexpr int kBufferBytes = 2 * kTileBytes<E> / (kCodes<C> ? 2 : 1);

#if BATCHINFER_MMA

constexpr int kWarps = kThreads / kWarp;
constexpr int kMTiles = kPrefillRows / kWarps / 16;  // matrix-unit tiles of a warp's rows
constexpr float kSlack = 8;

// Address of 16-byte piece `piece` of row `row`, permuted against bank conflicts; E * 2 bytes a row.
template <int E>
__device__ __forceinline__ int place(int row, int piece) {
    return row * E * 2 + (piece ^ row % 8) * 16;
}
// Of a row as the cache has it.
template <class C, int E>
__device__ __forceinline__ int place_of(int row, int piece) {
    return kCodes<C> ? row * E + piece * 16 : place<E>(row, piece);
}

// Rows of a work item: query heads of consecutive tokens.
struct Rows {
    int first, count;  // of the sequence's tokens x group rows; count may be less than kPrefillRows
    int group, heads;
    int before;    // position of the sequence's first token in the step
    int64_t base;  // row 0 of the sequence and kv head in [tokens, heads]

    // Last position that a row may see; the first is window_start() of it.
    __device__ __forceinline__ int limit(int row) const { return before + (first + row) / group; }

    __device__ __forceinline__ int64_t global(int row) const {
        const int r = first + row;
        return base + int64_t{r / group} * heads + r % group;
    }
};

template <class T, int E>
__device__ __forceinline__ void copy_queries(SharedAddress to, const T* q, const Rows& rows) {
    constexpr int kPieces = E / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < kPrefillRows * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const bool wanted = row < rows.count;
        copy_async(to + place<E>(row, piece), q + rows.global(wanted ? row : 0) * E + piece * 8, wanted);
    }
}

// Keys and values of positions begin .. begin + kKeys; zeros at or after `length`.
template <class C, int E>
__device__ __forceinline__ void copy_tile(SharedAddress to, const C* k, const C* v, const Pages& pages, int begin,
                                          int length) {
    constexpr int kEach = 16 / sizeof(C), kPieces = E / kEach;
    constexpr int kRowsAtOnce = kThreads / kPieces;  // a page holds whole runs of 16
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
    if (kRowsAtOnce > 16 && row >= 16) return;
#pragma unroll
    for (int run = 0; run < kKeys; run += 16) {
        const int64_t source = pages.offset(min(begin + run, length - 1) & ~15) + row * E + piece * kEach;
#pragma unroll
        for (int i = 0; i < 16; i += kRowsAtOnce) {
            const bool wanted = begin + run + i + row < length;
            const SharedAddress target = to + place_of<C, E>(run + i + row, piece);
            copy_async(target, k + source + i * E, wanted);
            copy_async(target + kBufferBytes<C, E> / 2, v + source + i * E, wanted);
        }
    }
}

// Running softmax of a warp's rows. Row (m, r) of a lane: 16 m + Tile::row(lane, r) of the warp.
template <class T, int E, bool kExtended>
struct WarpRows {
    Tile out[kMTiles][E / 16];
    float maximum[kMTiles][Tile::kRows], sum[kMTiles][Tile::kRows];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                maximum[m][r] = kExtended ? kNoScore : -INFINITY;
                sum[m][r] = 0;
            }
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
                out[m][n] = {};
            }
        }
    }

    __device__ __forceinline__ void add_tile(SharedAddress queries, SharedAddress keys, int begin, const Rows& rows,
                                             const AttentionPlan& p, const ScoreMap<kExtended>& map) {
        const int warp = threadIdx.x / kWarp;
        Tile score[kMTiles][kKeys / 16] = {};
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            Operand query[kMTiles];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                load_left(query[m], [&](int row, int piece) {
                    return queries + place<E>((warp * kMTiles + m) * 16 + row, 2 * k + piece);
                });
            }
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                Operand key;
                load_right(key, [&](int row, int piece) { return keys + place<E>(n * 16 + row, 2 * k + piece); });
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    multiply_add<T>(score[m][n], query[m], key);
                }
            }
        }
        if constexpr (kExtended) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
                for (int n = 0; n < kKeys / 16; ++n) {
                    map.cap_all(score[m][n].x);
                }
            }
            if (begin < window_start(p, rows.limit(kPrefillRows - 1))) mask_window(score, begin, rows, p);
        }
        if (begin + kKeys > rows.limit(0) + 1) mask(score, begin, rows);
        soften(score, map.factor);
        const SharedAddress values = keys + kTileBytes<E>;
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            Operand weight[kMTiles];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                weight[m] = rounded<T>(score[m][k]);
            }
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
                Operand value;
                load_right_transposed(
                    value, [&](int row, int piece) { return values + place<E>(k * 16 + row, 2 * n + piece); });
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    multiply_add<T>(out[m][n], weight[m], value);
                }
            }
        }
    }

  private:
    __device__ __forceinline__ void mask(Tile (&score)[kMTiles][kKeys / 16], int begin, const Rows& rows) {
        const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMTiles * 16;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                const int visible = rows.limit(first + m * 16 + Tile::row(lane, r)) - begin - Tile::column(lane, 0);
                hide(score[m], r, [&](int column) { return column > visible; });
            }
        }
    }

    __device__ __forceinline__ void mask_window(Tile (&score)[kMTiles][kKeys / 16], int begin, const Rows& rows,
                                                const AttentionPlan& p) {
        const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMTiles * 16;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                const int hidden =
                    window_start(p, rows.limit(first + m * 16 + Tile::row(lane, r))) - begin - Tile::column(lane, 0);
                hide(score[m], r, [&](int column) { return column < hidden; });
            }
        }
    }

    // Of the lane's row r; hidden() is asked for columns as the first lane has them.
    template <class Hidden>
    __device__ __forceinline__ static void hide(Tile (&score)[kKeys / 16], int r, Hidden hidden) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
            for (int i = 0; i < Tile::kNumbers; ++i) {
                if (Tile::row_of(i) == r && hidden(n * 16 + Tile::column(0, i))) score[n].x[i] = -INFINITY;
            }
        }
    }

    // Scores to weights, 2**(score - maximum). The maximum is left behind until some row of the warp exceeds it by
    // kSlack: weights up to 2**kSlack are as exact, and the output is rescaled a few times instead of at every tile.
    // Tiles come in ascending order and, without a window, every row sees position 0: the maximum is finite from the
    // first tile on.
    __device__ __forceinline__ void soften(Tile (&score)[kMTiles][kKeys / 16], float scale) {
        float top[kMTiles][Tile::kRows];
        bool exceeded = false;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                float most = -INFINITY;
#pragma unroll
                for (int n = 0; n < kKeys / 16; ++n) {
                    most = fmaxf(most, highest(score[m][n], r));
                }
                most = across_row(most, [](float a, float b) { return fmaxf(a, b); });
                top[m][r] = fmaxf(maximum[m][r], most * scale);
                exceeded |= top[m][r] > maximum[m][r] + kSlack;
            }
        }
        if (any_lane(exceeded)) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                float shrink[Tile::kRows];
#pragma unroll
                for (int r = 0; r < Tile::kRows; ++r) {
                    shrink[r] = exp2_fast(maximum[m][r] - top[m][r]);
                    maximum[m][r] = top[m][r];
                    sum[m][r] *= shrink[r];
                }
#pragma unroll
                for (int n = 0; n < E / 16; ++n) {
#pragma unroll
                    for (int i = 0; i < Tile::kNumbers; ++i) {
                        out[m][n].x[i] *= shrink[Tile::row_of(i)];
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
                for (int i = 0; i < Tile::kNumbers; ++i) {
                    const int r = Tile::row_of(i);
                    score[m][n].x[i] = exp2_fast(score[m][n].x[i] * scale - maximum[m][r]);
                    sum[m][r] += score[m][n].x[i];
                }
            }
        }
    }
};

// Through the warp's own query rows in shared memory, so that global writes are 16 bytes a lane.
template <class T, int E, bool kExtended>
__device__ __forceinline__ void store_rows(WarpRows<T, E, kExtended>& state, unsigned char* queries,
                                           const AttentionArgs& a, const Rows& rows) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMTiles * 16;
    sync_warp();  // after the last products, whose lanes read each other's rows
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            const float sum = across_row(state.sum[m][r], [](float x, float y) { return x + y; });
            const float inverse = 1 / sum;
            const int row = first + m * 16 + Tile::row(lane, r);
            if (Tile::leads(lane) && row < rows.count) {
                a.lse[rows.global(row)] = (state.maximum[m][r] + log2f(sum)) * kLn2;
            }
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
                store_row<T>(state.out[m][n], r, inverse, [&](int column) {
                    return reinterpret_cast<T*>(queries + place<E>(row, 2 * n + column / 8)) + column % 8;
                });
            }
        }
    }
    sync_warp();
    constexpr int kPieces = E / 8;
#pragma unroll 4
    for (int i = lane; i < kMTiles * 16 * kPieces; i += kWarp) {
        const int row = first + i / kPieces, piece = i % kPieces;
        if (row < rows.count) {
            *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + rows.global(row) * E + piece * 8) =
                *reinterpret_cast<const uint4*>(queries + place<E>(row, piece));
        }
    }
}

template <class T, class C, int E, bool kExtended>
__global__ void BATCHINFER_LAUNCH_BOUNDS(kThreads, 2) prefill_kernel(AttentionArgs a) {
    BATCHINFER_DYNAMIC_SHARED(shared, 128);
    __shared__ int mailbox;
    const AttentionPlan& p = a.plan;
    const int group = p.heads / p.kv_heads;
    constexpr int kWidened = kQueryBytes<E>, kTiles = kWidened + (kCodes<C> ? 2 * kTileBytes<E> : 0);
    const SharedAddress queries = shared_address(shared), tiles = queries + kTiles;
    const C* k_cache = static_cast<const C*>(a.k_cache);
    const C* v_cache = static_cast<const C*>(a.v_cache);

    Queue queue(p.queues + 2, p.prefill_start[p.sequences], &mailbox);
    for (int index = queue.next(); index >= 0; index = queue.next()) {
        const int s = find_sequence(p.prefill_start, p.sequences, index);
        const Sequence q = sequence_of(p, s, a.tokens);
        const int row_tiles = (q.tokens * group + kPrefillRows - 1) / kPrefillRows;
        const int inside = index - p.prefill_start[s], kv_head = inside % p.kv_heads;
        Rows rows;
        rows.first = (row_tiles - 1 - inside / p.kv_heads) * kPrefillRows;
        rows.count = min(q.tokens * group - rows.first, kPrefillRows);
        rows.group = group, rows.heads = p.heads;
        rows.base = int64_t{q.token} * p.heads + kv_head * group;
        rows.before = q.length - q.tokens;
        const int length = rows.limit(rows.count - 1) + 1;
        const Pages pages(p, q.page_row, kv_head);

        copy_queries<T, E>(queries, static_cast<const T*>(a.q), rows);
        const int start = kExtended ? window_start(p, rows.limit(0)) & ~(kKeys - 1) : 0;
        copy_tile<C, E>(tiles, k_cache, v_cache, pages, start, length);
        copy_commit();
        WarpRows<T, E, kExtended> state;
        state.clear();
        int buffer = 0;
        for (int begin = start; begin < length; begin += kKeys, buffer ^= 1) {
            copy_wait<0>();
            __syncthreads();  // this tile is there for all, and all have left the other buffer
            if (begin + kKeys < length) {
                copy_tile<C, E>(tiles + (buffer ^ 1) * kBufferBytes<C, E>, k_cache, v_cache, pages, begin + kKeys,
                                length);
                copy_commit();
            }
            SharedAddress keys = tiles + buffer * kBufferBytes<C, E>;
            if constexpr (kCodes<C>) {
                widen_rows<E, 2 * kKeys, kThreads>(shared + kTiles + buffer * kBufferBytes<C, E>, shared + kWidened,
                                                   threadIdx.x);
                __syncthreads();
                keys = queries + kWidened;
            }
            state.add_tile(queries, keys, begin, rows, p, ScoreMap<kExtended>(a));
        }
        queue.draw();
        store_rows(state, shared, a, rows);
    }
    queue.finish();
}

#else
template <class T, class C, int E, bool kExtended>
__global__ void prefill_kernel(AttentionArgs) {}
#endif  // BATCHINFER_MMA

template <class T, class C, int E, bool kExtended>
void launch(const AttentionArgs& a, Stream stream) {
    static const int blocks = persistent_blocks(prefill_kernel<T, C, E, kExtended>, kThreads, kSharedBytes<E>);
    gpuLaunch(prefill_kernel<T, C, E, kExtended>, blocks, kThreads, kSharedBytes<E>, native(stream), a);
    check_launch("attention (prefill)");
}

}  // namespace

void attention_prefill(const AttentionArgs& a, Stream stream) {
    if (a.cache_dtype == GpuDtype::e4m3) {
        return with_width_of_codes(a, [&](auto width) { launch<bf16, e4m3, width, true>(a, stream); });
    }
    with_matrix_shape(
        a, [&](auto t, auto width, auto extended) { launch<decltype(t), decltype(t), width, extended>(a, stream); });
}

}  // namespace batchinfer::gpu
