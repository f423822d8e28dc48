// The output layer and its cross entropy, in chunks of rows: the whole logits never exist. The
// gradients are computed with the loss, and the all-reduce of a chunk's input gradient runs under
// the weight's gradient and the next chunk's logits.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../gemm/linear.h"
#include "../gemm/linear_gradients.h"
#include "../op.h"
#include "channel.h"
#include "comm_buffer.h"
#include "cross_entropy.h"

namespace tpkernels {

namespace {

void to_gradient_(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& log_norm,
                  const at::Tensor& scale, int64_t vocab_start_index, double smoothing,
                  int64_t num_classes) {
  using Signature = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         int64_t, double, int64_t);
  typed_op<"tpkernels::vocab_ce_grad_", Signature>().call(
      logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes);
}

// Undefined where no gradient of it is asked for. The parameters' are summed over the chunks, in
// float32 at least.
struct Gradients {
  at::Tensor input, weight, bias;
};

}  // namespace

// vocab_ce of logits = input @ weight^T + bias, `chunk_rows` rows at a time. Returns the loss [M].
// With `scale` the gradients asked for follow it: of the input (summed over the ranks), of the
// weight, of the bias.
std::vector<at::Tensor> vocab_linear_ce(
    const at::Tensor& input,                 // [M, K]
    const at::Tensor& weight,                // [V/n, K]
    const std::optional<at::Tensor>& bias,   // [V/n]
    const at::Tensor& target,                // [M]
    const std::optional<at::Tensor>& scale,  // [M], the gradient of each row's loss
    int64_t vocab_start_index, int64_t num_classes, int64_t ignore_index, double smoothing,
    int64_t chunk_rows, bool input_grad, bool weight_grad, bool bias_grad, const std::string& group,
    const std::string& tag) {
  BelowAutograd guard;
  const int64_t rows = input.size(0), width = weight.size(0);
  const auto opmath = weight.options().dtype(c10::promoteTypes(weight.scalar_type(), at::kFloat));
  const int64_t count = rows > 0 ? (rows - 1) / chunk_rows + 1 : 1;
  const Channel channel(group, tag + "_input", count);
  auto loss = at::empty({rows}, opmath);
  auto logits_buffer = at::empty({std::min(rows, chunk_rows), width}, input.options());
  Gradients d;
  if (input_grad) d.input = empty_comm_buffer(input.sizes(), input.options());
  if (weight_grad) d.weight = at::zeros(weight.sizes(), opmath);
  if (bias_grad) d.bias = at::zeros({width}, opmath);

  std::vector<Pending> pending;
  pending.reserve(count);
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = i * chunk_rows,
                  size = std::min(chunk_rows, rows - begin);  // mutant:linear_loss.chunk
    const auto x = input.narrow(0, begin, size), t = target.narrow(0, begin, size);
    auto logits = logits_buffer.narrow(0, 0, size);
    linear_out(logits, x, weight, bias, /*grad=*/scale.has_value());
    const auto [chunk_loss, log_norm, widths] =
        vocab_ce(logits, t, vocab_start_index, num_classes, ignore_index, smoothing, group, tag);
    loss.narrow(0, begin, size).copy_(chunk_loss);
    if (!scale) continue;
    const auto chunk_scale = scale->narrow(0, begin, size);
    to_gradient_(logits, t, log_norm, chunk_scale, vocab_start_index, smoothing,
                 num_classes);  // mutant:linear_loss.gradient
    if (input_grad) {
      auto slice = d.input.narrow(0, begin, size);               // mutant:linear_loss.slice
      LinearGradients({logits}, x, weight).input_out(slice, 0);  // mutant:linear_loss.gemm
      pending.push_back(channel.all_reduce(slice, i));           // mutant:linear_loss.launch
    }
    if (weight_grad) add_weight_gradient_(d.weight, logits, x);  // mutant:linear_loss.weight
    if (bias_grad)
      d.bias.add_(
          logits.sum(0, /*keepdim=*/false, d.bias.scalar_type()));  // mutant:linear_loss.bias
  }
  for (auto& p : pending) p.wait();  // mutant:linear_loss.wait
  std::vector<at::Tensor> results{loss};
  if (input_grad) results.push_back(d.input);
  if (weight_grad) results.push_back(d.weight.to(weight.scalar_type()));
  if (bias_grad) results.push_back(d.bias.to(weight.scalar_type()));
  return results;
}

static void register_linear_cross_entropy(torch::Library& m) {
  m.impl("vocab_linear_ce", &vocab_linear_ce);
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_linear_cross_entropy(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_linear_cross_entropy(m); }

}  // namespace tpkernels
