// Bias + activation on any device, in a few ATen calls.
#include "activation.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

#include "../activation.h"
#include "../op.h"

namespace tpkernels {

namespace composite {

namespace {

// input + bias in opmath.
at::Tensor biased(const at::Tensor& input, const Bias& bias) {
  const auto x = input.to(at::toOpMathType(input.scalar_type()));
  return bias ? x + bias->to(x.scalar_type()) : x;
}

at::Tensor apply(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return at::relu(x);
    case Activation::relu2:
      return at::relu(x).square_();
    case Activation::gelu:
      return at::gelu(x, "none");
    case Activation::gelu_tanh:
      return at::gelu(x, "tanh");
    case Activation::silu:
      return at::silu(x);
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor apply_backward(const at::Tensor& grad, const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return at::threshold_backward(grad, x, 0);
    case Activation::relu2:
      return at::relu(x).mul_(2).mul_(grad);
    case Activation::gelu:
      return at::gelu_backward(grad, x, "none");
    case Activation::gelu_tanh:
      return at::gelu_backward(grad, x, "tanh");
    case Activation::silu:
      return at::silu_backward(grad, x);
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor sum_rows(const at::Tensor& t, const at::Tensor& like) {
  return as_rows(t).sum(0).to(like.scalar_type());
}

// The unrounded gradients of the pre-activations of gate and up.
std::array<at::Tensor, 2> gated_backward(const at::Tensor& grad, const at::Tensor& gate,
                                         const at::Tensor& up, Activation activation) {
  const auto dy = grad.to(gate.scalar_type());
  return {apply_backward(dy * up, gate, activation), apply(gate, activation).mul_(dy)};
}

}  // namespace

at::Tensor bias_act(const at::Tensor& input, const Bias& bias, std::string_view name) {
  BelowAutograd guard;
  const auto [activation, gated] = parse_activation(name);
  auto x = biased(input, bias);
  if (!gated) return apply(x, activation).to(input.scalar_type());
  const auto halves = x.chunk(2, -1);
  return apply(halves[0], activation).mul_(halves[1]).to(input.scalar_type());
}

at::Tensor gated_act(const at::Tensor& gate, const at::Tensor& up, const Bias& gate_bias,
                     const Bias& up_bias, std::string_view name) {
  BelowAutograd guard;
  return apply(biased(gate, gate_bias), parse_activation(name).function)
      .mul_(biased(up, up_bias))
      .to(gate.scalar_type());
}

std::vector<at::Tensor> bias_act_backward(const at::Tensor& grad, const at::Tensor& input,
                                          const Bias& bias, std::string_view name, bool bias_grad) {
  BelowAutograd guard;
  const auto [activation, gated] = parse_activation(name);
  const auto x = biased(input, bias);
  at::Tensor dx;
  if (gated) {
    const auto halves = x.chunk(2, -1);
    dx = at::cat(gated_backward(grad, halves[0], halves[1], activation), -1);
  } else {
    dx = apply_backward(grad.to(x.scalar_type()), x, activation);
  }
  std::vector<at::Tensor> grads{dx.to(input.scalar_type())};
  if (bias_grad) grads.push_back(sum_rows(dx, bias ? *bias : input));
  return grads;
}

std::vector<at::Tensor> gated_act_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, const Bias& gate_bias,
                                           const Bias& up_bias, std::string_view name,
                                           bool bias_grad) {
  BelowAutograd guard;
  const auto [dgate, dup] = gated_backward(grad, biased(gate, gate_bias), biased(up, up_bias),
                                           parse_activation(name).function);
  std::vector<at::Tensor> grads{dgate.to(gate.scalar_type()), dup.to(up.scalar_type())};
  if (bias_grad) {
    grads.push_back(sum_rows(dgate, gate_bias ? *gate_bias : gate));
    grads.push_back(sum_rows(dup, up_bias ? *up_bias : up));
  }
  return grads;
}

}  // namespace composite

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("bias_act", &composite::bias_act);
  m.impl("bias_act_backward", &composite::bias_act_backward);
  m.impl("gated_act", &composite::gated_act);
  m.impl("gated_act_backward", &composite::gated_act_backward);
}

}  // namespace tpkernels
