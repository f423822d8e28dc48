// Bias + activation on CPUs.
#include "../composite/activation.h"

#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

// True where torch's own kernels, which call SLEEF, are faster than at::vec's functions
// (benchmarks/bench_fused.py): erf without AVX-512, every exponential without AVX2.
bool composite_is_faster(std::string_view name) {
  static const auto capability = at::get_cpu_capability();
  const auto function = parse_activation(name).function;
  if (function == Activation::gelu) return capability != "AVX512";
  return function == Activation::silu && capability != "AVX512" && capability != "AVX2";
}

// Gate and up (undefined if there is none), and the buffers and views that keep them alive.
struct Inputs {
  at::Tensor gate, up, gate_bias, up_bias;

  ActivationArgs args(Activation activation) const {
    ActivationArgs a{gate.scalar_type(), activation, gate.size(1)};
    a.gate = rows_at(gate);
    if (up.defined()) a.up = rows_at(up);
    a.gate_bias = data_of(gate_bias);
    a.up_bias = data_of(up_bias);
    return a;
  }
};

Inputs packed(const at::Tensor& input, const OptionalTensor& bias, bool gated) {
  const auto x = strided_rows(input), b = opmath_vector(bias, input);
  if (!gated) return {x, {}, b, {}};
  const int64_t half = x.size(1) / 2;
  Inputs in{x.narrow(1, 0, half), x.narrow(1, half, half), {}, {}};
  if (b.defined()) in.gate_bias = b.narrow(0, 0, half), in.up_bias = b.narrow(0, half, half);
  return in;
}

Inputs separate(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& gate_bias,
                const OptionalTensor& up_bias) {
  return {strided_rows(gate), strided_rows(up, gate.scalar_type()), opmath_vector(gate_bias, gate),
          opmath_vector(up_bias, gate)};
}

at::Tensor forward(const Inputs& in, at::IntArrayRef leading, Activation activation) {
  auto shape = leading.vec();
  shape.push_back(in.gate.size(1));
  const auto out = at::empty({in.gate.size(0), in.gate.size(1)}, in.gate.options());
  auto args = in.args(activation);
  args.out = rows_at(out);
  const auto kernel = TPKERNELS_KERNEL(activation_forward);
  for_rows(out.size(0), out.size(1), [&](int64_t row, int64_t last) { kernel(args, row, last); });
  return out.view(shape);
}

// Writes the gradients. Returns the biases' in one vector, undefined unless asked for.
at::Tensor backward(const Inputs& in, const at::Tensor& grad, const at::Tensor& gate_grad,
                    const at::Tensor& up_grad, Activation activation, bool bias_grad) {
  auto args = in.args(activation);
  args.out = rows_at(grad);
  args.gate_grad = rows_at(gate_grad);
  if (up_grad.defined()) args.up_grad = rows_at(up_grad);
  const int64_t rows = grad.size(0), columns = grad.size(1);
  const auto kernel = TPKERNELS_KERNEL(activation_backward);
  if (bias_grad)
    return sum_over_rows(
        rows, columns, columns * (up_grad.defined() ? 2 : 1), opmath_options(grad),
        [&](int64_t row, int64_t last, void* sums) { kernel(args, row, last, sums); });
  for_rows(rows, columns, [&](int64_t row, int64_t last) { kernel(args, row, last, nullptr); });
  return {};
}

at::Tensor bias_act(const at::Tensor& input, const OptionalTensor& bias, std::string_view name) {
  BelowAutograd guard;
  if (composite_is_faster(name)) return composite::bias_act(input, bias, name);
  const auto [activation, gated] = parse_activation(name);
  return forward(packed(input, bias, gated), input.sizes().slice(0, input.dim() - 1), activation);
}

at::Tensor gated_act(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& gate_bias,
                     const OptionalTensor& up_bias, std::string_view name) {
  BelowAutograd guard;
  if (composite_is_faster(name)) return composite::gated_act(gate, up, gate_bias, up_bias, name);
  return forward(separate(gate, up, gate_bias, up_bias), gate.sizes().slice(0, gate.dim() - 1),
                 parse_activation(name).function);
}

std::vector<at::Tensor> bias_act_backward(const at::Tensor& grad, const at::Tensor& input,
                                          const OptionalTensor& bias, std::string_view name,
                                          bool bias_grad) {
  BelowAutograd guard;
  if (composite_is_faster(name))
    return composite::bias_act_backward(grad, input, bias, name, bias_grad);
  const auto [activation, gated] = parse_activation(name);
  const auto in = packed(input, bias, gated);
  auto shape = input.sizes().vec();
  shape.back() = in.gate.size(1);
  const auto dy = strided_rows(grad, in.gate.scalar_type());
  const int64_t width = input.size(-1);
  const auto dx = at::empty({dy.size(0), width}, input.options());
  const auto sums = backward(in, dy, dx.narrow(1, 0, shape.back()),
                             gated ? dx.narrow(1, shape.back(), shape.back()) : at::Tensor(),
                             activation, bias_grad);
  std::vector<at::Tensor> grads{dx.view(input.sizes())};
  if (bias_grad) grads.push_back(sums.to((bias ? *bias : input).scalar_type()));
  return grads;
}

std::vector<at::Tensor> gated_act_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, const OptionalTensor& gate_bias,
                                           const OptionalTensor& up_bias, std::string_view name,
                                           bool bias_grad) {
  BelowAutograd guard;
  if (composite_is_faster(name))
    return composite::gated_act_backward(grad, gate, up, gate_bias, up_bias, name, bias_grad);
  const auto in = separate(gate, up, gate_bias, up_bias);
  const auto dy = strided_rows(grad, gate.scalar_type());
  const int64_t columns = dy.size(1);
  const auto dgate = at::empty({dy.size(0), columns}, gate.options()), dup = at::empty_like(dgate);
  const auto sums = backward(in, dy, dgate, dup, parse_activation(name).function, bias_grad);
  std::vector<at::Tensor> grads{dgate.view(gate.sizes()), dup.view(gate.sizes())};
  if (bias_grad) {
    grads.push_back(sums.narrow(0, 0, columns)
                        .to((gate_bias ? *gate_bias : gate).scalar_type(), false, /*copy=*/true));
    grads.push_back(sums.narrow(0, columns, columns)
                        .to((up_bias ? *up_bias : up).scalar_type(), false, /*copy=*/true));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) {
  m.impl("bias_act", &bias_act);
  m.impl("bias_act_backward", &bias_act_backward);
  m.impl("gated_act", &gated_act);
  m.impl("gated_act_backward", &gated_act_backward);
}

}  // namespace tpkernels
