// The widths of tiles that gated products take.
#include <initializer_list>

#include "check.h"
#include "gpu/gated_tiles.h"

using batchinfer::gpu::gated_columns;

int main() {
    constexpr int kH100 = 132;
    // What was measured to be the fastest, or within 2 % of it: Llama-3.1-8B's MLP, Llama-3.2-1B's, Qwen3-0.6B's.
    for (int rows : {192, 256, 320, 384, 448, 512, 640, 768, 1024, 2048, 4096, 8192}) {
        CHECK(gated_columns(rows, 14336, kH100) == 112);
    }
    for (int rows : {192, 256, 448, 512, 768, 1024}) {
        CHECK(gated_columns(rows, 8192, kH100) == 128);
    }
    for (int rows : {384, 640}) {
        CHECK(gated_columns(rows, 8192, kH100) == 64);
    }
    for (int rows : {2048, 4096, 8192}) {
        CHECK(gated_columns(rows, 8192, kH100) == 112);
    }
    CHECK(gated_columns(256, 3072, kH100) == 64);
    CHECK(gated_columns(512, 3072, kH100) == 112);
    CHECK(gated_columns(2048, 3072, kH100) == 128);
    // Where cuBLAS was as fast, or faster.
    CHECK(gated_columns(160, 14336, kH100) == 0);
    CHECK(gated_columns(320, 8192, kH100) == 0);
    for (int rows : {384, 704, 768}) {
        CHECK(gated_columns(rows, 3072, kH100) == 0);
    }
    // One multiprocessor does tile after tile: the fewest columns in all.
    CHECK(gated_columns(200, 64, 1) == 64);
    CHECK(gated_columns(0, 8, kH100) == 0);
}
