// Activations as codes, in the order in which the products of codes read them.
#pragma once

#include "cpu/kernels/gemm.h"

namespace batchinfer::BATCHINFER_ISA {

inline constexpr int32_t kInt8Zero = 128;  // the code of 0 in a weight of format int8

// Activations of a task: codes in blocks of kDepthBlock values of k, row after row; behind them what belongs to a row.
struct PackedRows {
    const int8_t* codes;  // [blocks of k, rows, kDepthBlock], zeros behind the last
    const float* scale;   // [rows, scales]
    const float* moment;  // blocks: [rows, scales] scale * sum of the codes. int8: the sums as int32, [rows]
    int64_t rows, scales;

    PackedRows(const void* packed, int64_t rows, int64_t depth, int64_t scales)
        : codes(static_cast<const int8_t*>(packed)),
          scale(reinterpret_cast<const float*>(codes + (depth + kDepthBlock - 1) / kDepthBlock * kDepthBlock * rows)),
          moment(scale + rows * scales),
          rows(rows),
          scales(scales) {}

    const int8_t* at(int64_t row, int64_t k) const {
        return codes + (k / kDepthBlock * rows + row) * kDepthBlock + k % kDepthBlock;
    }

    // int8: the sum of a row's codes.
    int32_t total(int64_t row) const {
        int32_t sum;
        __builtin_memcpy(&sum, moment + row, sizeof(sum));
        return sum;
    }
};

}  // namespace batchinfer::BATCHINFER_ISA
