// Shared by the CPU implementations of ops: from tensors to rows, from rows to threads. Their
// arguments fit: ../checks/ has looked at them.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "../op.h"
#include "kernels.h"

namespace tpkernels {

using OptionalTensor = std::optional<at::Tensor>;

#ifdef TPKERNELS_X86_KERNELS
template <typename Function>
Function* best_of(Function* basic, Function* avx2, Function* avx512) {
  static const auto capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
  return basic;
}
#define TPKERNELS_KERNEL(name) best_of(&DEFAULT::name, &AVX2::name, &AVX512::name)
#else
#define TPKERNELS_KERNEL(name) (&DEFAULT::name)
#endif

inline at::TensorOptions opmath_options(const at::Tensor& t) {
  return t.options().dtype(at::toOpMathType(t.scalar_type()));
}

// [M, N] with contiguous rows: a view where the strides allow.
inline at::Tensor strided_rows(const at::Tensor& t) {
  const auto rows = as_rows(t);
  const bool contiguous_rows = rows.stride(1) == 1 || rows.size(1) <= 1;
  return contiguous_rows ? rows : rows.contiguous();
}

// The same, converted to `dtype`.
inline at::Tensor strided_rows(const at::Tensor& t, c10::ScalarType dtype) {
  return strided_rows(t.to(dtype));
}

inline StridedRows rows_at(const at::Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

// The vector in opmath of `like`'s dtype. Undefined if there is no `t`.
inline at::Tensor opmath_vector(const OptionalTensor& t, const at::Tensor& like) {
  if (!t) return {};
  return t->to(at::toOpMathType(like.scalar_type())).contiguous();
}

inline const void* data_of(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread, as in torch

// Calls f(row, last) on several threads where there is work for them.
template <typename F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  if (columns > 0) at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / columns), f);
}

// Calls f(row, last, sums) for blocks of rows, each with its own `sums` [width] to add to, and
// returns the sum over the blocks. Neither the blocks nor the bits depend on the number of threads.
template <typename F>
at::Tensor sum_over_rows(int64_t rows, int64_t columns, int64_t width,
                         const at::TensorOptions& options, const F& f) {
  constexpr int64_t BLOCK = 32;  // few: each element of `sums` is a plain running sum
  auto sums = at::zeros({(rows + BLOCK - 1) / BLOCK, width}, options);
  for_rows(sums.size(0), columns * BLOCK, [&](int64_t i, int64_t last) {
    for (; i < last; i++)
      f(i * BLOCK, std::min(rows, (i + 1) * BLOCK),
        static_cast<char*>(sums.data_ptr()) + i * width * sums.element_size());
  });
  return sums.sum(0);
}

}  // namespace tpkernels
