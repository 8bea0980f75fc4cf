// Attention of sequences with several tokens in the step: bound by the matrix unit. The loop of FlashAttention-2
// (Dao 2023, arXiv:2307.08691) over paged keys.
//
// A block of four warps takes 128 rows of one kv head against tiles of 64 positions; a warp holds 32 rows, so that each
// key and value fragment read from shared memory feeds two products. With 16 rows a warp, shared memory would be the
// bound: 144 KB a tile of 64 x 64 are 1,125 cycles at 128 bytes a cycle, its products 750. 32 rows of width 128 take
// 128 registers for the output and 64 for the scores, so the queries stay in shared memory. Two buffers of keys and
// values and one barrier a tile; 96 KB a block, so that two blocks a multiprocessor cover each other's softmax. On an
// H100 this reaches 347 TFLOP/s (8,192 tokens, causal, width 128), half of what these matrix instructions can do there.
// Within a sequence the last tiles, which see the most keys, come first in the work list.
#include "gpu/attention.cuh"

namespace batchinfer::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kKeys = 64;  // positions of a tile

template <int E>
constexpr int kTileBytes = kKeys * E * 2;  // of keys, or of values
template <int E>
constexpr int kQueryBytes = kPrefillRows * E * 2;
template <int E>
constexpr int kSharedBytes = kQueryBytes<E> + 4 * kTileBytes<E>;

#if BATCHINFER_MMA

constexpr int kMTiles = kPrefillRows / kWarps / 16;  // matrix-unit tiles of a warp's rows
constexpr float kSlack = 8;

// Address of 16-byte piece `piece` of row `row`, permuted against bank conflicts; E * 2 bytes a row.
template <int E>
__device__ __forceinline__ uint32_t place(int row, int piece) {
    return row * E * 2 + (piece ^ row % 8) * 16;
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
__device__ __forceinline__ void copy_queries(uint32_t to, const T* q, const Rows& rows) {
    constexpr int kPieces = E / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < kPrefillRows * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const bool wanted = row < rows.count;
        copy_async(to + place<E>(row, piece), q + rows.global(wanted ? row : 0) * E + piece * 8, wanted);
    }
}

// Keys and values of positions begin .. begin + kKeys; zeros at or after `length`.
template <class T, int E>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* k, const T* v, const Pages& pages, int begin,
                                          int length) {
    constexpr int kPieces = E / 8, kRowsAtOnce = kThreads / kPieces;  // 8 or 16: a page holds whole runs of 16
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
#pragma unroll
    for (int run = 0; run < kKeys; run += 16) {
        const int64_t source = pages.offset(min(begin + run, length - 1) & ~15) + row * E + piece * 8;
#pragma unroll
        for (int i = 0; i < 16; i += kRowsAtOnce) {
            const bool wanted = begin + run + i + row < length;
            copy_async(to + place<E>(run + i + row, piece), k + source + i * E, wanted);
            copy_async(to + kTileBytes<E> + place<E>(run + i + row, piece), v + source + i * E, wanted);
        }
    }
}

// Running softmax of a warp's 32 rows. Row (m, h) of a lane: 16 m + 8 h + lane / 4 of the warp.
template <class T, int E, bool kExtended>
struct WarpRows {
    float out[kMTiles][E / 8][4], maximum[kMTiles][2], sum[kMTiles][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            maximum[m][0] = maximum[m][1] = kExtended ? kNoScore : -INFINITY;
            sum[m][0] = sum[m][1] = 0;
#pragma unroll
            for (int n = 0; n < E / 8; ++n) {
                out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0;
            }
        }
    }

    __device__ __forceinline__ void add_tile(uint32_t queries, uint32_t keys, int begin, const Rows& rows,
                                             const AttentionPlan& p, const ScoreMap<kExtended>& map) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        float score[kMTiles][kKeys / 8][4] = {};
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            uint32_t query[kMTiles][4];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                load_tiles(query[m], queries + place<E>((warp * kMTiles + m) * 16 + lane % 16, 2 * k + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t key[4];
                load_tiles(key, keys + place<E>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    multiply_add<T>(score[m][2 * n], query[m], key[0], key[1]);
                    multiply_add<T>(score[m][2 * n + 1], query[m], key[2], key[3]);
                }
            }
        }
        if constexpr (kExtended) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    map.cap_all(score[m][n]);
                }
            }
            if (begin < window_start(p, rows.limit(kPrefillRows - 1))) mask_window(score, begin, rows, p);
        }
        if (begin + kKeys > rows.limit(0) + 1) mask(score, begin, rows);
        soften(score, map.factor);
        const uint32_t values = keys + kTileBytes<E>;
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            uint32_t weight[kMTiles][4];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                const auto& left = score[m][2 * k];
                const auto& right = score[m][2 * k + 1];
                weight[m][0] = pack2<T>(left[0], left[1]), weight[m][1] = pack2<T>(left[2], left[3]);
                weight[m][2] = pack2<T>(right[0], right[1]), weight[m][3] = pack2<T>(right[2], right[3]);
            }
#pragma unroll
            for (int n = 0; n < E / 16; ++n) {
                uint32_t value[4];
                load_tiles_transposed(value, values + place<E>(k * 16 + lane % 16, 2 * n + lane / 16));
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    multiply_add<T>(out[m][2 * n], weight[m], value[0], value[1]);
                    multiply_add<T>(out[m][2 * n + 1], weight[m], value[2], value[3]);
                }
            }
        }
    }

  private:
    __device__ __forceinline__ void mask(float (&score)[kMTiles][kKeys / 8][4], int begin, const Rows& rows) {
        const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMTiles * 16 + lane / 4;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int visible = rows.limit(first + m * 16 + h * 8) - begin - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    if (n * 8 > visible) score[m][n][2 * h] = -INFINITY;
                    if (n * 8 + 1 > visible) score[m][n][2 * h + 1] = -INFINITY;
                }
            }
        }
    }

    __device__ __forceinline__ void mask_window(float (&score)[kMTiles][kKeys / 8][4], int begin, const Rows& rows,
                                                const AttentionPlan& p) {
        const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMTiles * 16 + lane / 4;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int hidden = window_start(p, rows.limit(first + m * 16 + h * 8)) - begin - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    if (n * 8 < hidden) score[m][n][2 * h] = -INFINITY;
                    if (n * 8 + 1 < hidden) score[m][n][2 * h + 1] = -INFINITY;
                }
            }
        }
    }

    // Scores to weights, 2**(score - maximum). The maximum is left behind until some row of the warp exceeds it by
    // kSlack: weights up to 2**kSlack are as exact, and the output is rescaled a few times instead of at every tile.
    // Tiles come in ascending order and, without a window, every row sees position 0: the maximum is finite from the
    // first tile on.
    __device__ __forceinline__ void soften(float (&score)[kMTiles][kKeys / 8][4], float scale) {
        float top[kMTiles][2];
        bool exceeded = false;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = -INFINITY;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    highest = fmaxf(highest, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                }
                highest = fmaxf(highest, shuffle_xor(highest, 1));
                highest = fmaxf(highest, shuffle_xor(highest, 2));
                top[m][h] = fmaxf(maximum[m][h], highest * scale);
                exceeded |= top[m][h] > maximum[m][h] + kSlack;
            }
        }
        if (any_lane(exceeded)) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float shrink = exp2_fast(maximum[m][h] - top[m][h]);
                    maximum[m][h] = top[m][h];
                    sum[m][h] *= shrink;
#pragma unroll
                    for (int n = 0; n < E / 8; ++n) {
                        out[m][n][2 * h] *= shrink, out[m][n][2 * h + 1] *= shrink;
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[m][n][i] = exp2_fast(score[m][n][i] * scale - maximum[m][i / 2]);
                    sum[m][i / 2] += score[m][n][i];
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
        for (int h = 0; h < 2; ++h) {
            float sum = state.sum[m][h];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const float inverse = 1 / sum;
            const int row = first + m * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && row < rows.count) a.lse[rows.global(row)] = (state.maximum[m][h] + log2f(sum)) * kLn2;
#pragma unroll
            for (int n = 0; n < E / 8; ++n) {
                *reinterpret_cast<uint32_t*>(queries + place<E>(row, n) + lane % 4 * 4) =
                    pack2<T>(state.out[m][n][2 * h] * inverse, state.out[m][n][2 * h + 1] * inverse);
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

template <class T, int E, bool kExtended>
__global__ void __launch_bounds__(kThreads, 2) prefill_kernel(AttentionArgs a) {
    BATCHINFER_DYNAMIC_SHARED(shared, 128);
    __shared__ int mailbox;
    const AttentionPlan& p = a.plan;
    const int group = p.heads / p.kv_heads;
    const uint32_t queries = shared_address(shared), tiles = queries + kQueryBytes<E>;
    const T* k_cache = static_cast<const T*>(a.k_cache);
    const T* v_cache = static_cast<const T*>(a.v_cache);

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
        copy_tile<T, E>(tiles, k_cache, v_cache, pages, start, length);
        copy_commit();
        WarpRows<T, E, kExtended> state;
        state.clear();
        int buffer = 0;
        for (int begin = start; begin < length; begin += kKeys, buffer ^= 1) {
            copy_wait<0>();
            __syncthreads();  // this tile is there for all, and all have left the other buffer
            if (begin + kKeys < length) {
                copy_tile<T, E>(tiles + (buffer ^ 1) * 2 * kTileBytes<E>, k_cache, v_cache, pages, begin + kKeys,
                                length);
                copy_commit();
            }
            state.add_tile(queries, tiles + buffer * 2 * kTileBytes<E>, begin, rows, p, ScoreMap<kExtended>(a));
        }
        queue.draw();
        store_rows(state, shared, a, rows);
    }
    queue.finish();
}

#else
template <class T, int E, bool kExtended>
__global__ void prefill_kernel(AttentionArgs) {}
#endif  // BATCHINFER_MMA

template <class T, int E, bool kExtended>
void launch(const AttentionArgs& a, Stream stream) {
    static const int blocks = persistent_blocks(prefill_kernel<T, E, kExtended>, kThreads, kSharedBytes<E>);
    gpuLaunch(prefill_kernel<T, E, kExtended>, blocks, kThreads, kSharedBytes<E>, native(stream), a);
    check_launch("attention (prefill)");
}

}  // namespace

void attention_prefill(const AttentionArgs& a, Stream stream) {
    with_matrix_shape(a, [&](auto t, auto width, auto extended) { launch<decltype(t), width, extended>(a, stream); });
}

}  // namespace batchinfer::gpu
