// Bias + activation in a few ATen calls, for cpu/activation.cpp where nothing of ours is faster.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace tpkernels::composite {

using Bias = std::optional<at::Tensor>;

at::Tensor bias_act(const at::Tensor& input, const Bias& bias, std::string_view name);
at::Tensor gated_act(const at::Tensor& gate, const at::Tensor& up, const Bias& gate_bias,
                     const Bias& up_bias, std::string_view name);
std::vector<at::Tensor> bias_act_backward(const at::Tensor& grad, const at::Tensor& input,
                                          const Bias& bias, std::string_view name, bool bias_grad);
std::vector<at::Tensor> gated_act_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, const Bias& gate_bias,
                                           const Bias& up_bias, std::string_view name,
                                           bool bias_grad);

}  // namespace tpkernels::composite
