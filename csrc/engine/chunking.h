// Cuts a GEMM's rows into chunks, so that one chunk's all-reduce runs under the next chunk's GEMM.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace tpkernels {

// Chunks start at multiples of this many rows.
inline int64_t row_alignment(int64_t rows, int64_t chunks, int64_t row_bytes) {
  constexpr int64_t GEMM_TILE = 128, BYTES = 16;
  if (rows / GEMM_TILE >= chunks) return GEMM_TILE;
  return BYTES / std::gcd<int64_t>(BYTES, std::max<int64_t>(row_bytes, 1));
}

// Row boundaries [0, ..., rows] of at most `chunks` chunks, in proportions 1 2 3 ... 3 2 1. The
// first chunk is small because its GEMM hides no all-reduce, the last one because no GEMM hides its
// all-reduce. Boundaries are multiples of 128 rows (full GEMM tiles) where there are enough rows,
// otherwise of as many rows as keep each slice 16-byte aligned.
inline std::vector<int64_t> chunk_bounds(int64_t rows, int64_t chunks, int64_t row_bytes) {
  TORCH_CHECK(chunks >= 1, "chunks must be at least 1, got ", chunks);
  const int64_t unit = row_alignment(rows, chunks, row_bytes);
  const int64_t units = (rows + unit - 1) / unit;
  const int64_t count = std::max<int64_t>(std::min(chunks, units), 1);
  std::vector<int64_t> weights(count);
  for (int64_t i = 0; i < count; i++) weights[i] = std::min(i, count - 1 - i) + 1;
  const int64_t total = std::accumulate(weights.begin(), weights.end(), int64_t{0});

  std::vector<int64_t> bounds(count + 1, 0);
  int64_t weight = 0, end = 0;  // of chunks 0 .. i together; the end in units
  for (int64_t i = 0; i < count; i++) {
    weight += weights[i];
    const int64_t rounded = (2 * units * weight + total) / (2 * total);
    const int64_t later_chunks = count - 1 - i;            // each needs a unit
    const int64_t at_least = end < units ? end + 1 : end;  // and so does this one
    end = std::max(std::min(rounded, units - later_chunks), at_least);
    bounds[i + 1] = std::min(rows, end * unit);
  }
  return bounds;
}

// Rows bounds[i] .. bounds[i + 1] of t.
inline at::Tensor slice_rows(const at::Tensor& t, const std::vector<int64_t>& bounds, size_t i) {
  return t.narrow(0, bounds[i], bounds[i + 1] - bounds[i]);
}

}  // namespace tpkernels
