// The row-parallel linear layer. Its GEMM runs in chunks of rows, each chunk's all-reduce under the
// next chunk's GEMM.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../gemm/linear.h"
#include "../gemm/linear_gradients.h"
#include "../op.h"
#include "channel.h"
#include "chunking.h"
#include "comm_buffer.h"

namespace tpkernels {

namespace {

// The arguments of row_linear on a group of n ranks.
struct RowLinear {
  const at::Tensor& input;                    // [..., K/n]
  const at::Tensor& weight;                   // [N, K/n]
  const std::optional<at::Tensor>& bias;      // [N]
  const std::optional<at::Tensor>& residual;  // [..., N]
  const std::string& group;
  int64_t chunks;
  const std::string& tag;
  bool grad;  // a gradient will follow, so the weight is about to change and is not packed
};

void add_bias_residual_(const at::Tensor& out, const at::Tensor& bias, const at::Tensor& residual) {
  using Signature = void(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  typed_op<"tpkernels::add_bias_residual_", Signature>().call(out, bias, residual);
}

// out + bias + residual, in place.
void add_epilogue_(at::Tensor& out, const std::optional<at::Tensor>& bias,
                   const at::Tensor& residual) {
  if (bias) {
    add_bias_residual_(out, *bias, residual);
  } else {
    out.add_(residual);
  }
}

at::Tensor rms_norm(const at::Tensor& input, const at::Tensor& weight, double eps) {
  using Optional = std::optional<at::Tensor>;
  using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Signature =
      Results(const at::Tensor&, const Optional&, const Optional&, const Optional&, double, bool);
  return std::get<0>(typed_op<"tpkernels::norm", Signature>().call(input, std::nullopt, weight,
                                                                   std::nullopt, eps, true));
}

// The chunked pipeline over c10d: out [M, N] from x [M, K/n].
void run_in_chunks(const RowLinear& layer, const Channel& channel,
                   const std::vector<int64_t>& bounds, const at::Tensor& x, const at::Tensor& out) {
  // Without a residual pass to ride on, the bias enters the sum through the first rank's GEMM.
  const bool gemm_adds_bias = layer.bias && !layer.residual && channel.rank() == 0;
  const auto gemm_bias = gemm_adds_bias ? layer.bias : std::nullopt;
  const size_t count = bounds.size() - 1;
  std::vector<Pending> pending;
  pending.reserve(count);
  for (size_t i = 0; i < count; i++) {
    auto slice = slice_rows(out, bounds, i), x_i = slice_rows(x, bounds, i);
    {
      const auto range = channel.range("gemm", i);
      linear_out(slice, x_i, layer.weight, gemm_bias, layer.grad);  // mutant:row.gemm
    }
    pending.push_back(channel.all_reduce(slice, i));  // mutant:row.launch
  }
  // Every GEMM is issued before the first wait: on a GPU the wait would hold the next GEMM's stream
  // back.
  at::Tensor residual;  // mutant:row.issued
  if (layer.residual) residual = as_rows(*layer.residual);
  for (size_t i = 0; i < count; i++) {
    pending[i].wait();  // mutant:row.wait
    if (!residual.defined()) continue;
    const auto range = channel.range("epilogue", i);
    auto slice = slice_rows(out, bounds, i), residual_i = slice_rows(residual, bounds, i);
    add_epilogue_(slice, layer.bias, residual_i);  // mutant:row.epilogue
  }
}

// Returns the layer's result. Where the fast path takes the epilogue along, `epilogue.normed` is
// written too.
at::Tensor forward(const RowLinear& layer, Epilogue& epilogue) {
  const auto x = as_rows(layer.input);
  const int64_t n = layer.weight.size(0);
  auto shape = layer.input.sizes().vec();
  shape.back() = n;
  auto out = empty_comm_buffer({x.size(0), n}, layer.input.options());
  const auto bounds = chunk_bounds(x.size(0), layer.chunks, n * layer.input.element_size());
  const Channel channel(layer.group, layer.tag, bounds.size() - 1, "row");
  if (!channel.has_fast_path(out)) {
    run_in_chunks(layer, channel, bounds, x, out);
    return out.view(shape);
  }
  if (layer.bias) epilogue.bias = layer.bias->contiguous();  // mutant:peers.bias
  if (layer.residual) {
    const auto whole = layer.residual->expand(shape).reshape(out.sizes());
    epilogue.residual = whole.contiguous();  // mutant:peers.residual
  }
  if (epilogue.weight.defined() && channel.peers->fuses_norm())
    epilogue.normed = at::empty_like(out);  // mutant:peers.norm
  all_reduce_fast_path(channel, out, epilogue, [&](at::Tensor& term, int64_t begin) {
    linear_out(term, x.narrow(0, begin, term.size(0)), layer.weight, std::nullopt,
               layer.grad);  // mutant:peers.linear
  });
  return out.view(shape);
}

}  // namespace

// The sum over ranks of input @ weight^T, + bias + residual: [..., N].
at::Tensor row_linear(const at::Tensor& input,                    // [..., K/n]
                      const at::Tensor& weight,                   // [N, K/n]
                      const std::optional<at::Tensor>& bias,      // [N]
                      const std::optional<at::Tensor>& residual,  // [..., N]
                      const std::string& group, int64_t chunks, const std::string& tag, bool grad) {
  BelowAutograd guard;
  Epilogue epilogue;
  return forward({input, weight, bias, residual, group, chunks, tag, grad}, epilogue);
}

// row_linear and the RMSNorm of its result: (result, result * rsqrt(mean(result^2) + eps) *
// norm_weight). It is for calls without gradient.
std::tuple<at::Tensor, at::Tensor> row_linear_rms_norm(
    const at::Tensor& input,                    // [..., K/n]
    const at::Tensor& weight,                   // [N, K/n]
    const std::optional<at::Tensor>& bias,      // [N]
    const std::optional<at::Tensor>& residual,  // [..., N]
    const at::Tensor& norm_weight,              // [N]
    double eps, const std::string& group, int64_t chunks, const std::string& tag) {
  BelowAutograd guard;
  Epilogue epilogue;
  epilogue.weight = norm_weight.to(weight.scalar_type()).contiguous();  // mutant:norm.weight
  epilogue.eps = eps;                                                   // mutant:norm.eps
  auto sum = forward({input, weight, bias, residual, group, chunks, tag, /*grad=*/false}, epilogue);
  if (epilogue.normed.defined())
    return {sum, epilogue.normed.view(sum.sizes())};  // mutant:norm.fused
  return {sum, rms_norm(sum, norm_weight, eps)};
}

// The gradients of row_linear: the input's if `weight` is given, the weight's if `input` is, the
// bias' if asked for.
std::vector<at::Tensor> row_linear_backward(const at::Tensor& grad_output,            // [..., N]
                                            const std::optional<at::Tensor>& input,   // [..., K/n]
                                            const std::optional<at::Tensor>& weight,  // [N, K/n]
                                            bool bias_grad) {
  BelowAutograd guard;
  const auto dy = as_rows(grad_output);
  const auto x = input ? as_rows(*input) : at::Tensor();
  LinearGradients gradients({dy}, x, weight ? at::TensorList(*weight) : at::TensorList());
  std::vector<at::Tensor> grads;
  if (weight) {
    auto shape = grad_output.sizes().vec();
    shape.back() = weight->size(1);
    grads.push_back(gradients.input().view(shape));
  }
  if (input) grads.push_back(gradients.weight(0));
  if (bias_grad) grads.push_back(dy.sum(0));
  return grads;
}

static void register_row_linear(torch::Library& m) {
  m.impl("row_linear", &row_linear);
  m.impl("row_linear_rms_norm", &row_linear_rms_norm);
  m.impl("row_linear_backward", &row_linear_backward);
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_row_linear(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_row_linear(m); }

}  // namespace tpkernels
