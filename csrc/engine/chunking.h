// Cuts a GEMM's rows into chunks, so that one chunk's all-reduce runs under the next chunk's GEMM.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace tpkernels {

// Row boundaries [0, ..., rows] of at most `chunks` chunks, in proportions 1 2 3 ... 3 2 1. The
// first chunk is small because its GEMM hides no all-reduce, the last one because no GEMM hides its
// all-reduce. Boundaries are multiples of 128 rows (full GEMM tiles) where there are enough rows,
// otherwise of as many rows as keep each slice 16-byte aligned.
std::vector<int64_t> chunk_bounds(int64_t rows, int64_t chunks, int64_t row_bytes);

// Rows bounds[i] .. bounds[i + 1] of t.
at::Tensor slice_rows(const at::Tensor& t, const std::vector<int64_t>& bounds, size_t i);

}  // namespace tpkernels
