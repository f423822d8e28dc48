// A rank's part of a cross-entropy over a sharded vocabulary, on CPUs.
#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

// Contiguous int64 columns of this rank's logits
at::Tensor local_target(const at::Tensor& target, int64_t first, int64_t rows) {
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows, "target must be of shape [", rows,
                    "], got ", target.sizes());
  return target.to(at::kLong).sub(first);
}

at::Tensor vocab_ce_stats(const at::Tensor& logits, const at::Tensor& target, int64_t first) {
  BelowAutograd guard;
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be of shape [M, V], got ", logits.sizes());
  const auto z = strided_rows(logits);
  const int64_t rows = z.size(0), columns = z.size(1);
  const auto column = local_target(target, first, rows),
             stats = at::empty({4, rows}, opmath_options(logits));
  const CrossEntropyArgs args{checked_dtype(logits), columns, rows_at(z),
                              column.const_data_ptr<int64_t>()};
  const auto kernel = TPKERNELS_KERNEL(cross_entropy_stats);
  for_rows(rows, std::max<int64_t>(columns, 1),
           [&](int64_t row, int64_t last) { kernel(args, row, last, rows, stats.data_ptr()); });
  return stats;
}

void grad_into(const at::Tensor& out, const at::Tensor& z, const at::Tensor& target,
               const at::Tensor& log_norm, const at::Tensor& scale, int64_t first, double on_target,
               double everywhere) {
  const int64_t rows = z.size(0), columns = z.size(1);
  const auto column = local_target(target, first, rows);
  const auto norm = opmath_vector(log_norm, rows, z, "log_norm"),
             factor = opmath_vector(scale, rows, z, "scale");
  const CrossEntropyArgs args{checked_dtype(z), columns, rows_at(z),
                              column.const_data_ptr<int64_t>()};
  const auto kernel = TPKERNELS_KERNEL(cross_entropy_grad);
  for_rows(rows, columns, [&](int64_t row, int64_t last) {
    kernel(args, row, last, data_of(norm), data_of(factor), on_target, everywhere, rows_at(out));
  });
}

at::Tensor vocab_ce_grad(const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& log_norm, const at::Tensor& scale, int64_t first,
                         double on_target, double everywhere) {
  BelowAutograd guard;
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be of shape [M, V], got ", logits.sizes());
  const auto out = at::empty(logits.sizes(), logits.options());
  grad_into(out, strided_rows(logits), target, log_norm, scale, first, on_target, everywhere);
  return out;
}

void vocab_ce_grad_(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& log_norm,
                    const at::Tensor& scale, int64_t first, double on_target, double everywhere) {
  BelowAutograd guard;
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be of shape [M, V], got ", logits.sizes());
  const auto rows = strided_rows(logits);
  grad_into(rows, rows, target, log_norm, scale, first, on_target, everywhere);
  if (!rows.is_alias_of(logits)) logits.copy_(rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) {
  m.impl("vocab_ce_stats", &vocab_ce_stats);
  m.impl("vocab_ce_grad", &vocab_ce_grad);
  m.impl("vocab_ce_grad_", &vocab_ce_grad_);
}

}  // namespace tpkernels
