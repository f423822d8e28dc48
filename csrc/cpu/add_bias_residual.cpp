// The epilogue of a row-parallel layer's all-reduce, on CPUs.
#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

// self [..., N] = self + bias [N] + residual [..., N]
void add_bias_residual_(const at::Tensor& self, const at::Tensor& bias,
                        const at::Tensor& residual) {
  BelowAutograd guard;
  const auto dtype = self.scalar_type();
  const auto y = as_rows(self), rest = strided_rows(residual, dtype);
  const auto b = opmath_vector(bias, self);
  const auto kernel = TPKERNELS_KERNEL(add_bias_residual);
  for_rows(y.size(0), y.size(1), [&](int64_t row, int64_t last) {
    kernel(dtype, y.size(1), rows_at(y), data_of(b), rows_at(rest), row, last);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { m.impl("add_bias_residual_", &add_bias_residual_); }

}  // namespace tpkernels
