#include "cross_entropy.h"

#include <ATen/ops/where.h>
#include <torch/library.h>

#include "../op.h"
#include "channel.h"
#include "comm_buffer.h"

namespace tpkernels {

namespace {

// The rank's own rows of maximum, sum of exponentials, target logit and sum: [4, M].
at::Tensor local_stats(const at::Tensor& logits, const at::Tensor& target,
                       int64_t vocab_start_index) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t);
  return typed_op<"tpkernels::vocab_ce_stats", Signature>().call(logits, target, vocab_start_index);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> vocab_ce(const at::Tensor& logits,
                                                        const at::Tensor& target,
                                                        int64_t vocab_start_index,
                                                        int64_t num_classes, int64_t ignore_index,
                                                        double smoothing, const std::string& group,
                                                        const std::string& tag) {
  BelowAutograd guard;
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Channel channel(group, tag);
  const auto stats = local_stats(logits, target, vocab_start_index);
  const auto local_max = stats[0], exp_sum = stats[1], target_logit = stats[2], total = stats[3];
  // Two spare entries of the maximum tell whether all shards are equally wide.
  auto maxima = empty_comm_buffer({rows + 2}, stats.options());
  maxima.narrow(0, 0, rows).copy_(local_max);  // mutant:loss.maxima
  maxima[rows].fill_(width);
  maxima[rows + 1].fill_(-width);                             // mutant:loss.width
  channel.all_reduce(maxima, 0, c10d::ReduceOp::MAX).wait();  // mutant:loss.max
  const auto max = maxima.narrow(0, 0, rows);

  auto sums = empty_comm_buffer({smoothing != 0 ? 3 : 2, rows}, stats.options());
  sums[0].copy_(exp_sum * (local_max - max).exp_());
  const auto is_local =
      (target >= vocab_start_index).logical_and_(target < vocab_start_index + width);
  sums[1].copy_(at::where(is_local, target_logit - max, 0));
  if (smoothing != 0) sums[2].copy_(total - width * max);  // mutant:loss.smoothed
  channel.all_reduce(sums).wait();                         // mutant:loss.sums

  const auto log_sum = sums[0].log();
  auto loss = log_sum - (1 - smoothing) * sums[1];  // mutant:loss.result
  if (smoothing != 0) loss.sub_(sums[2], smoothing / num_classes);
  return {loss.masked_fill_(target == ignore_index, 0), log_sum + max, maxima.narrow(0, rows, 2)};
}

static void register_cross_entropy(torch::Library& m) { m.impl("vocab_ce", &vocab_ce); }

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_cross_entropy(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_cross_entropy(m); }

}  // namespace tpkernels
