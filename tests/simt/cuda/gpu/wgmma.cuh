// csrc/gpu/wgmma.cuh for the emulator. Products are done at the wait, from what shared memory holds then: who gives a
// buffer back before it gets other products. Proxy fences and register hand-over change nothing here.
#pragma once

#include "gpu/mma.cuh"

#define BATCHINFER_WGMMA 1

namespace batchinfer::gpu {

inline void barrier_init(uint32_t barrier, int arrivals) {
    simt::block().phase_init(barrier, arrivals);
}
inline void barrier_arrive(uint32_t barrier) {
    simt::block().phase_arrive(barrier);
}
inline void barrier_arrive_after_copies(uint32_t barrier) {
    simt::block().phase_arrive_after_copies(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, SIMT_HERE) {
    simt::block().phase_wait(barrier, parity, {"mbarrier.try_wait", file, line});
}
inline void named_barrier(int name, SIMT_HERE) {
    simt::block().barrier(name, 128, {"bar.sync", file, line});
}
inline void fence_async_proxy() {}
template <int Registers>
void registers_take() {}
template <int Registers>
void registers_give() {}
template <int N>
void pin(float (&)[N]) {}

inline void products_begin() {}
inline void products_commit() {
    simt::Thread& thread = simt::block().thread();
    thread.product_groups.push_back(thread.products.size());
}

// Element (row, column) of an operand with the 128-byte swizzle: rows of 128 bytes, eight of which repeat after
// `stride` bytes; along the columns panels of 64 elements repeat after `panel_stride`. Address bits 4 to 6 are turned
// by bits 7 to 9 (PTX ISA, 9.7.15.5.1, matrix descriptor and swizzling).
inline uint16_t operand_element(uint64_t descriptor, int row, int column) {
    const uint32_t start = (descriptor & 0x3fff) * 16, panel_stride = (descriptor >> 16 & 0x3fff) * 16;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) * 16;
    if (descriptor >> 62 != 1) simt::block().fail("wgmma: only the 128-byte swizzle is emulated");
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + column / 64 * panel_stride + column % 64 * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    __builtin_memcpy(&bits, simt::block().at(address, 2), 2);
    return bits;
}

// This thread's part: rows 16 warp + lane / 4 and + 8, two columns of every eight.
inline void do_product(const simt::Product& p, size_t which) {
    const int lane = simt::block().lane(), group_row = simt::block().warp() % 4 * 16 + lane / 4, pair = lane % 4 * 2;
    float left[2][16];
    for (int h = 0; h < 2; ++h) {
        for (int k = 0; k < 16; ++k) {
            uint16_t bits;
            if (p.a_in_registers) {
                const simt::Thread& holder = simt::block().thread_of_warp(lane / 4 * 4 + k % 8 / 2);
                bits = static_cast<uint16_t>(holder.products[which].a[h + k / 8 * 2] >> k % 2 * 16);
            } else {
                bits = operand_element(p.a_operand, group_row + 8 * h, k);
            }
            left[h][k] = p.number(bits);
        }
    }
    for (int n = 0; n < p.count / 4; ++n) {
        for (int j = 0; j < 2; ++j) {
            const int column = 8 * n + pair + j;
            float sum[2] = {};
            for (int k = 0; k < 16; ++k) {
                const float right = p.number(p.b_transposed ? operand_element(p.b_operand, k, column)
                                                            : operand_element(p.b_operand, column, k));
                sum[0] += left[0][k] * right, sum[1] += left[1][k] * right;
            }
            for (int h = 0; h < 2; ++h) {
                float& c = p.c[4 * n + 2 * h + j];
                c = (p.add ? c : 0) + sum[h];
            }
        }
    }
}

template <int Left>
void products_wait(SIMT_HERE) {
    simt::Thread& thread = simt::block().thread();
    simt::vote("wgmma.wait_group", true, file, line);  // all lanes have started theirs
    const size_t groups = thread.product_groups.size() > Left ? thread.product_groups.size() - Left : 0;
    const size_t count = groups ? thread.product_groups[groups - 1] : 0;
    for (size_t i = 0; i < count; ++i) {
        do_product(thread.products[i], i);
    }
    simt::vote("wgmma.wait_group, done", true, file, line);
    thread.products.erase(thread.products.begin(), thread.products.begin() + count);
    thread.product_groups.erase(thread.product_groups.begin(), thread.product_groups.begin() + groups);
    for (size_t& end : thread.product_groups) {
        end -= count;
    }
}

template <class T, int Count>
struct Products {
    static float number(uint16_t bits) { return to_float(T{bits}); }
    static void scores(float (&c)[Count], uint64_t a, uint64_t b, int add) {
        simt::block().thread().products.push_back({c, Count, add != 0, false, false, a, b, {}, number});
    }
    static void values(float (&c)[Count], const uint32_t (&a)[4], uint64_t b) {
        simt::block().thread().products.push_back({c, Count, true, true, true, 0, b, {a[0], a[1], a[2], a[3]}, number});
    }
};

}  // namespace batchinfer::gpu
