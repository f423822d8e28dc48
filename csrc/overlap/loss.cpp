#include "loss.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../cpu/gemm.h"
#include "../op.h"
#include "comm.h"

namespace tpkernels {

namespace {

at::Tensor stats_of(const at::Tensor& logits, const at::Tensor& target, int64_t first) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("tpkernels::vocab_ce_stats", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>();
  return op.call(logits, target, first);
}

void to_gradient_(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& log_norm, const at::Tensor& scale,
                  int64_t first, double on_target, double everywhere) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tpkernels::vocab_ce_grad_", "")
          .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, double, double)>();
  op.call(logits, target, log_norm, scale, first, on_target, everywhere);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> vocab_ce(const at::Tensor& logits, const at::Tensor& target, int64_t first,
                                                        int64_t num_classes, int64_t ignore_index, double smoothing,
                                                        const std::string& group, const std::string& tag) {
  BelowAutograd guard;
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Channel channel(group, tag);
  const auto stats = stats_of(logits, target, first);
  const auto top = stats[0], exp_sum = stats[1], target_logit = stats[2], total = stats[3];
  // Two spare entries of the maximum tell whether all shards are equally wide.
  auto peaks = empty_comm_buffer({rows + 2}, stats.options());
  peaks.narrow(0, 0, rows).copy_(top);  // mutant:loss.peaks
  peaks[rows].fill_(width);
  peaks[rows + 1].fill_(-width);  // mutant:loss.width
  channel.all_reduce(peaks, 0, c10d::ReduceOp::MAX).wait();  // mutant:loss.max
  const auto peak = peaks.narrow(0, 0, rows);

  auto sums = empty_comm_buffer({smoothing != 0 ? 3 : 2, rows}, stats.options());
  sums[0].copy_(exp_sum * (top - peak).exp_());
  sums[1].copy_(at::where((target >= first).logical_and_(target < first + width), target_logit - peak, 0));
  if (smoothing != 0) sums[2].copy_(total - width * peak);  // mutant:loss.smoothed
  channel.all_reduce(sums).wait();  // mutant:loss.sums

  const auto log_sum = sums[0].log();
  auto loss = log_sum - (1 - smoothing) * sums[1];  // mutant:loss.result
  if (smoothing != 0) loss.sub_(sums[2], smoothing / num_classes);
  return {loss.masked_fill_(target == ignore_index, 0), log_sum + peak, peaks.narrow(0, rows, 2)};
}

std::vector<at::Tensor> vocab_linear_ce(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                        const at::Tensor& target, const std::optional<at::Tensor>& scale, int64_t first,
                                        int64_t num_classes, int64_t ignore_index, double smoothing, int64_t chunk_rows,
                                        bool input_grad, bool weight_grad, bool bias_grad, const std::string& group,
                                        const std::string& tag) {
  BelowAutograd guard;
  const int64_t rows = input.size(0), width = weight.size(0);
  const auto wide = weight.options().dtype(c10::promoteTypes(weight.scalar_type(), at::kFloat));
  const int64_t count = std::max<int64_t>(1, (rows + chunk_rows - 1) / chunk_rows);
  const Channel channel(group, tag + "_input", count);
  auto loss = at::empty({rows}, wide);
  auto logits_buffer = at::empty({std::min(rows, chunk_rows), width}, input.options());
  at::Tensor d_input, d_weight, d_bias;
  if (input_grad) d_input = empty_comm_buffer(input.sizes(), input.options());
  if (weight_grad) d_weight = at::zeros(weight.sizes(), wide);
  if (bias_grad) d_bias = at::zeros({width}, wide);

  std::vector<Pending> pending;
  pending.reserve(count);
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = i * chunk_rows, size = std::min(chunk_rows, rows - begin);  // mutant:linear_loss.chunk
    const auto x = input.narrow(0, begin, size), t = target.narrow(0, begin, size);
    auto logits = logits_buffer.narrow(0, 0, size);
    linear_out(logits, x, weight, bias, scale.has_value());
    const auto [loss_i, log_norm, widths] = vocab_ce(logits, t, first, num_classes, ignore_index, smoothing, group, tag);
    loss.narrow(0, begin, size).copy_(loss_i);
    if (!scale) continue;
    to_gradient_(logits, t, log_norm, scale->narrow(0, begin, size), first, 1 - smoothing, smoothing / num_classes);  // mutant:linear_loss.gradient
    if (input_grad) {  // its all-reduce runs under the weight's gradient and the next chunk's logits
      auto slice = d_input.narrow(0, begin, size);  // mutant:linear_loss.slice
      LinearGrads({logits}, x, weight).input_out(slice, 0);  // mutant:linear_loss.gemm
      pending.push_back(channel.all_reduce(slice, i));  // mutant:linear_loss.launch
    }
    if (weight_grad) add_weight_grad_(d_weight, logits, x);  // mutant:linear_loss.weight
    if (bias_grad) d_bias.add_(logits.sum(0, /*keepdim=*/false, d_bias.scalar_type()));  // mutant:linear_loss.bias
  }
  for (auto& p : pending) p.wait();  // mutant:linear_loss.wait
  std::vector<at::Tensor> results{loss};
  if (input_grad) results.push_back(d_input);
  if (weight_grad) results.push_back(d_weight.to(weight.scalar_type()));
  if (bias_grad) results.push_back(d_bias.to(weight.scalar_type()));
  return results;
}

}  // namespace tpkernels
