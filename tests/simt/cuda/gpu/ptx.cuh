// csrc/gpu/ptx.cuh for the emulator, by the fragment layouts of the PTX ISA (9.7.14.5, m16n8k16; ldmatrix; cp.async).
#pragma once

#include "gpu/device.cuh"

#define BATCHINFER_MMA 1

namespace batchinfer::gpu {

inline uint32_t shared_address(const void* p) {
    return simt::block().address_of(p);
}

inline void copy_async(uint32_t to, const void* from, bool wanted) {
    simt::block().copy(to, wanted ? from : nullptr);
}
inline void copy_commit() {
    simt::block().commit_copies();
}
template <int Left>
void copy_wait() {
    simt::block().finish_copies(Left);
}

struct Fragment {
    uint32_t r[4];
};

// Lane i of `row` gives the address of row i % 8 of tile i / 8. Addresses are checked here, so that AddressSanitizer
// need not look at 256 numbers an instruction.
template <bool kTransposed>
Fragment load_four_tiles(uint32_t row, const char* file, int line) {
    using simt::block;
    return block().together<Fragment>(simt::Site{"ldmatrix", file, line}, row,
                                      [](const uint32_t* rows, Fragment* out) __attribute__((no_sanitize_address)) {
                                          const uint16_t* of[kWarp];
                                          for (int i = 0; i < kWarp; ++i) {
                                              if (rows[i] % 16)
                                                  block().fail("ldmatrix from an address that 16 does not divide");
                                              of[i] = reinterpret_cast<const uint16_t*>(block().at(rows[i], 16));
                                          }
                                          for (int i = 0; i < kWarp; ++i) {
                                              const int outer = i / 4, inner = i % 4 * 2;
                                              for (int tile = 0; tile < 4; ++tile) {
                                                  const uint16_t* const* r = of + 8 * tile;
                                                  const uint32_t low = kTransposed ? r[inner][outer] : r[outer][inner];
                                                  const uint32_t high =
                                                      kTransposed ? r[inner + 1][outer] : r[outer][inner + 1];
                                                  out[i].r[tile] = low | high << 16;
                                              }
                                          }
                                      });
}
inline void load_tiles(uint32_t (&r)[4], uint32_t row, SIMT_HERE) {
    const Fragment f = load_four_tiles<false>(row, file, line);
    std::copy_n(f.r, 4, r);
}
inline void load_tiles_transposed(uint32_t (&r)[4], uint32_t row, SIMT_HERE) {
    const Fragment f = load_four_tiles<true>(row, file, line);
    std::copy_n(f.r, 4, r);
}

struct ProductOperands {
    uint32_t a[4], b[2];
};
struct ProductSums {
    float c[4];
};

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
    const ProductSums sums = simt::block().together<ProductSums>(
        simt::Site{"mma.sync", file, line}, ProductOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}},
        [](const ProductOperands* in, ProductSums* out) __attribute__((no_sanitize_address)) {
            float left[16][16], right[16][8];
            for (int i = 0; i < kWarp; ++i) {
                const int g = i / 4, t = i % 4 * 2;
                for (int j = 0; j < 4; ++j) {
                    const float2 pair = unpack2<T>(in[i].a[j]);
                    float* at = &left[g + j % 2 * 8][t + j / 2 * 8];
                    at[0] = pair.x, at[1] = pair.y;
                }
                for (int j = 0; j < 2; ++j) {
                    const float2 pair = unpack2<T>(in[i].b[j]);
                    right[t + 8 * j][g] = pair.x, right[t + 8 * j + 1][g] = pair.y;
                }
            }
            float sum[16][8] = {};
            for (int row = 0; row < 16; ++row) {
                for (int k = 0; k < 16; ++k) {
                    for (int column = 0; column < 8; ++column) {
                        sum[row][column] += left[row][k] * right[k][column];
                    }
                }
            }
            for (int i = 0; i < kWarp; ++i) {
                for (int j = 0; j < 4; ++j) {
                    out[i].c[j] = sum[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
                }
            }
        });
    for (int j = 0; j < 4; ++j) {
        c[j] += sums.c[j];
    }
}

}  // namespace batchinfer::gpu
