// A rank's part of a cross entropy over a sharded vocabulary, on CPUs.
#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

// Contiguous int64 columns of this rank's logits: [M].
at::Tensor local_target(const at::Tensor& target, int64_t vocab_start_index) {
  return target.to(at::kLong).sub(vocab_start_index);
}

// The maximum, the sum of exponentials, the target's logit and the sum of each row: [4, M].
at::Tensor vocab_ce_stats(const at::Tensor& logits,  // [M, V/n]
                          const at::Tensor& target,  // [M]
                          int64_t vocab_start_index) {
  BelowAutograd guard;
  const auto z = strided_rows(logits);
  const int64_t rows = z.size(0), columns = z.size(1);
  const auto column = local_target(target, vocab_start_index);
  const auto stats = at::empty({4, rows}, opmath_options(logits));
  const CrossEntropyArgs args{logits.scalar_type(), columns, rows_at(z),
                              column.const_data_ptr<int64_t>()};
  const auto kernel = TPKERNELS_KERNEL(cross_entropy_stats);
  for_rows(rows, std::max<int64_t>(columns, 1),
           [&](int64_t row, int64_t last) { kernel(args, row, last, rows, stats.data_ptr()); });
  return stats;
}

// The gradient's other inputs.
struct GradInputs {
  const at::Tensor& target;    // [M]
  const at::Tensor& log_norm;  // [M]
  const at::Tensor& scale;     // [M]
  int64_t vocab_start_index;
  double smoothing;
  int64_t num_classes;
};

// out [M, V/n] may be z.
void grad_into(const at::Tensor& out, const at::Tensor& z, const GradInputs& in) {
  const int64_t rows = z.size(0), columns = z.size(1);
  const auto column = local_target(in.target, in.vocab_start_index);
  const auto norm = opmath_vector(in.log_norm, z);
  const auto factor = opmath_vector(in.scale, z);
  const CrossEntropyGradArgs args{
      z.scalar_type(), columns,         rows_at(z),   column.const_data_ptr<int64_t>(),
      data_of(norm),   data_of(factor), in.smoothing, in.num_classes,
      rows_at(out)};
  const auto kernel = TPKERNELS_KERNEL(cross_entropy_grad);
  for_rows(rows, columns, [&](int64_t row, int64_t last) { kernel(args, row, last); });
}

// (softmax(logits) - (1 - smoothing) onehot(target) - smoothing / num_classes) * scale: [M, V/n].
at::Tensor vocab_ce_grad(const at::Tensor& logits,    // [M, V/n]
                         const at::Tensor& target,    // [M]
                         const at::Tensor& log_norm,  // [M]
                         const at::Tensor& scale,     // [M]
                         int64_t vocab_start_index, double smoothing, int64_t num_classes) {
  BelowAutograd guard;
  const auto out = at::empty(logits.sizes(), logits.options());
  grad_into(out, strided_rows(logits),
            {target, log_norm, scale, vocab_start_index, smoothing, num_classes});
  return out;
}

void vocab_ce_grad_(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& log_norm,
                    const at::Tensor& scale, int64_t vocab_start_index, double smoothing,
                    int64_t num_classes) {
  BelowAutograd guard;
  const auto rows = strided_rows(logits);
  grad_into(rows, rows, {target, log_norm, scale, vocab_start_index, smoothing, num_classes});
  if (!rows.is_alias_of(logits)) logits.copy_(rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) {
  m.impl("vocab_ce_stats", &vocab_ce_stats);
  m.impl("vocab_ce_grad", &vocab_ce_grad);
  m.impl("vocab_ce_grad_", &vocab_ce_grad_);
}

}  // namespace tpkernels
