// Residual add + LayerNorm or RMSNorm over the last dimension on any device, in a few ATen calls.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../op.h"

namespace tpkernels {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm(const at::Tensor& input,
                                                                const OptionalTensor& residual,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias,
                                                                double eps, bool rms) {
  BelowAutograd guard;
  const auto dtype = input.scalar_type(), opmath = at::toOpMathType(dtype);
  const auto sum = residual ? input + *residual : input;
  auto h = sum.to(opmath);
  auto mean = at::empty({0}, h.options());
  if (!rms) {
    mean = h.mean(-1, /*keepdim=*/true);
    h = h - mean;
  }
  const auto rstd = h.square().mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
  auto y = h * rstd;
  if (weight) y = y * weight->to(opmath);
  if (bias) y = y + bias->to(opmath);
  return {y.to(dtype), residual ? sum : at::empty({0}, input.options()), mean.flatten(),
          rstd.flatten()};
}

std::vector<at::Tensor> norm_backward(const at::Tensor& grad, const OptionalTensor& grad_sum,
                                      const at::Tensor& sum, const OptionalTensor& weight,
                                      const at::Tensor& mean, const at::Tensor& rstd, bool rms,
                                      bool weight_grad, bool bias_grad) {
  BelowAutograd guard;
  const auto dtype = sum.scalar_type(), opmath = at::toOpMathType(dtype),
             param_dtype = weight ? weight->scalar_type() : dtype;
  const auto dy = as_rows(grad).to(opmath), scale = rstd.unsqueeze(1);
  auto normed = as_rows(sum).to(opmath);
  if (!rms) normed = normed - mean.unsqueeze(1);
  normed = normed * scale;
  const auto dnormed = weight ? dy * weight->to(opmath) : dy;
  auto dx = dnormed - normed * (dnormed * normed).mean(-1, /*keepdim=*/true);
  if (!rms) dx = dx - dnormed.mean(-1, /*keepdim=*/true);
  dx = (dx * scale).view(sum.sizes());
  if (grad_sum) dx = dx + grad_sum->to(opmath);
  std::vector<at::Tensor> grads{dx.to(dtype)};
  if (weight_grad) grads.push_back((dy * normed).sum(0).to(param_dtype));
  if (bias_grad) grads.push_back(dy.sum(0).to(param_dtype));
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("norm", &norm);
  m.impl("norm_backward", &norm_backward);
}

}  // namespace tpkernels
