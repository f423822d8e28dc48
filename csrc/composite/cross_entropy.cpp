// A rank's part of a cross entropy over a sharded vocabulary, on any device, in a few ATen calls.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../op.h"

namespace tpkernels {

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

// Returns two [M, 1]: true where this rank has the target's column, and that column (0 elsewhere).
std::array<at::Tensor, 2> local_target(const at::Tensor& target, int64_t vocab_start_index,
                                       int64_t columns) {
  const auto column = target.to(at::kLong).sub(vocab_start_index).unsqueeze_(1);
  const auto inside = column.ge(0).logical_and_(column.lt(columns));
  return {inside, column * inside};
}

at::Tensor vocab_ce_stats(const at::Tensor& logits, const at::Tensor& target,
                          int64_t vocab_start_index) {
  BelowAutograd guard;
  const auto z = logits.to(at::toOpMathType(logits.scalar_type()));
  const int64_t rows = z.size(0), columns = z.size(1);
  auto stats = at::zeros({4, rows}, z.options());
  stats[0].fill_(-INF);
  if (columns == 0) return stats;
  const auto max = z.amax(1, /*keepdim=*/true);
  stats[0].copy_(max.squeeze(1));
  stats[1].copy_((z - max.masked_fill(max == -INF, 0)).exp_().sum(1));
  const auto [inside, column] = local_target(target, vocab_start_index, columns);
  stats[2].copy_(at::where(inside, z.gather(1, column), 0).squeeze(1));
  stats[3].copy_(z.sum(1));
  return stats;
}

at::Tensor vocab_ce_grad(const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& log_norm, const at::Tensor& scale,
                         int64_t vocab_start_index, double smoothing, int64_t num_classes) {
  BelowAutograd guard;
  const auto opmath = at::toOpMathType(logits.scalar_type());
  auto grad = (logits.to(opmath) - log_norm.unsqueeze(1)).exp_().sub_(smoothing / num_classes);
  if (logits.size(1) > 0) {
    const auto [inside, column] = local_target(target, vocab_start_index, logits.size(1));
    grad.scatter_add_(1, column, inside.to(opmath).mul_(-(1 - smoothing)));
  }
  const auto factor = scale.unsqueeze(1);
  return grad.mul_(factor).masked_fill_(factor == 0, 0).to(logits.scalar_type());
}

void vocab_ce_grad_(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& log_norm,
                    const at::Tensor& scale, int64_t vocab_start_index, double smoothing,
                    int64_t num_classes) {
  const auto grad =
      vocab_ce_grad(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes);
  BelowAutograd guard;
  logits.copy_(grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("vocab_ce_stats", &vocab_ce_stats);
  m.impl("vocab_ce_grad", &vocab_ce_grad);
  m.impl("vocab_ce_grad_", &vocab_ce_grad_);
}

}  // namespace tpkernels
