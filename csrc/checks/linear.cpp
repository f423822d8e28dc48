// Checks of the linear layers' ops.
#include <ATen/core/List.h>

#include "../activation.h"
#include "checks.h"

namespace tpkernels {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_weight(Operand weight, Operand input) {
  check_dense(weight);
  check_same_device(weight, input);
  check_same_dtype(weight, input);
  check_rank(weight, 2);
}

void check_chunks(int64_t chunks) {
  TORCH_CHECK_VALUE(chunks >= 1, "chunks must be at least 1, got ", chunks);
}

// input [..., K], weight [N, K], bias [N]
void check_product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Operand x{"input", input};
  check_rows(x);
  check_weight({"weight", weight}, x);
  TORCH_CHECK_VALUE(input.size(-1) == weight.size(1), "input of shape ", input.sizes(),
                    " does not fit weight of shape ", weight.sizes(),
                    ": their last dimensions must be the same");
  check_alike("bias", bias, {weight.size(0)}, x);
}

void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool) {
  check_product(input, weight, bias);
}

void check_row_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, const std::string& /*group*/, int64_t chunks,
                      const std::string& /*tag*/, bool /*grad*/) {
  check_product(input, weight, bias);
  if (residual)
    check_alike({"residual", *residual}, with_last(input.sizes(), weight.size(0)),
                {"input", input});
  check_chunks(chunks);
}

void check_row_linear_rms_norm(const Tensor& input, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               const Tensor& norm_weight, double /*eps*/, const std::string& group,
                               int64_t chunks, const std::string& tag) {
  check_row_linear(input, weight, bias, residual, group, chunks, tag, /*grad=*/false);
  check_operand({"norm_weight", norm_weight}, {weight.size(0)}, {"input", input});
}

void check_row_linear_backward(const Tensor& grad_output, const OptionalTensor& input,
                               const OptionalTensor& weight, bool /*bias_grad*/) {
  const Operand dy{"grad_output", grad_output};
  check_rows(dy);
  const int64_t n = grad_output.size(-1);
  if (weight) {
    check_weight({"weight", *weight}, dy);
    check_shape({"weight", *weight}, {n, weight->size(1)});
  }
  if (!input) return;
  check_rows({"input", *input});
  const int64_t k = weight ? weight->size(1) : input->size(-1);
  check_alike({"input", *input}, with_last(grad_output.sizes(), k), dy);
}

// The sizes that the tensors of a list must share. K is the input's and the weights' last
// dimension.
void check_layer(const Tensor& dy, const Tensor* weight, const Tensor& first_dy, int64_t k) {
  const Operand first{"grad_outputs[0]", first_dy};
  check_rows({"grad_outputs", dy});
  check_alike({"grad_outputs", dy}, with_last(first_dy.sizes(), dy.size(-1)), first);
  if (!weight) return;
  check_weight({"weights", *weight}, first);
  check_shape({"weights", *weight}, {dy.size(-1), k});
}

void check_column_linear_backward(at::TensorList grad_outputs, const OptionalTensor& input,
                                  at::TensorList weights, bool input_grad,
                                  c10::List<bool> weight_grad, c10::List<bool> bias_grad,
                                  const std::string& /*group*/, int64_t chunks,
                                  const std::string& /*tag*/) {
  const size_t count = grad_outputs.size();
  TORCH_CHECK_VALUE(count >= 1, "grad_outputs must have a tensor for each layer, got none");
  TORCH_CHECK_VALUE(weight_grad.size() == count && bias_grad.size() == count,
                    "weight_grad and bias_grad must have an entry for each of the ", count,
                    " grad_outputs, got ", weight_grad.size(), " and ", bias_grad.size());
  TORCH_CHECK_VALUE(weights.size() == count || (weights.empty() && !input_grad),
                    "weights must have a tensor for each of the ", count,
                    " grad_outputs (or none, without input_grad), got ", weights.size());
  const bool any_weight_grad =
      std::any_of(weight_grad.begin(), weight_grad.end(), [](bool wanted) { return wanted; });
  TORCH_CHECK_VALUE(input || !any_weight_grad, "a weight's gradient needs input, got None");
  check_chunks(chunks);

  if (!weights.empty()) check_rank({"weights", weights[0]}, 2);
  if (input) check_rows({"input", *input});
  int64_t k = 0;
  if (!weights.empty()) {
    k = weights[0].size(1);
  } else if (input) {
    k = input->size(-1);
  }
  for (size_t i = 0; i < count; i++)
    check_layer(grad_outputs[i], weights.empty() ? nullptr : &weights[i], grad_outputs[0], k);
  if (input)
    check_alike({"input", *input}, with_last(grad_outputs[0].sizes(), k),
                {"grad_outputs[0]", grad_outputs[0]});
}

void check_column_linear_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                             std::string_view activation, bool /*keep*/) {
  check_product(input, weight, std::nullopt);
  check_operand("bias", bias, {weight.size(0)}, {"input", input});
  const bool gated = parse_activation(activation).gated;
  TORCH_CHECK_VALUE(!gated || weight.size(0) % 2 == 0, activation,
                    " takes [gate; up], two halves of one size, got a weight of ", weight.size(0),
                    " rows");
}

void check_add_bias_residual_(const Tensor& self, const Tensor& bias, const Tensor& residual) {
  const Operand y{"self", self};
  check_rows(y);
  TORCH_CHECK_VALUE(self.is_contiguous(), "self must be contiguous, got strides ", self.strides());
  check_alike({"bias", bias}, {self.size(-1)}, y);
  check_alike({"residual", residual}, self.sizes(), y);
  check_apart({"bias", bias}, y);
  const auto overlap = at::get_overlap_status(residual, self);
  TORCH_CHECK_VALUE(overlap != at::MemOverlapStatus::Partial,
                    "residual shares some memory with self, which is written to: pass a clone");
}

TORCH_LIBRARY_IMPL(tpkernels, BackendSelect, m) {
  check_before<"tpkernels::linear", Tensor, check_linear>(m);
  check_before<"tpkernels::row_linear", Tensor, check_row_linear>(m);
  check_before<"tpkernels::row_linear_rms_norm", std::tuple<Tensor, Tensor>,
               check_row_linear_rms_norm>(m);
  check_before<"tpkernels::row_linear_backward", std::vector<Tensor>, check_row_linear_backward>(m);
  check_before<"tpkernels::column_linear_backward", std::vector<Tensor>,
               check_column_linear_backward>(m);
  check_before<"tpkernels::column_linear_act", std::tuple<Tensor, Tensor>, check_column_linear_act>(
      m);
  check_before<"tpkernels::add_bias_residual_", void, check_add_bias_residual_>(m);
}

}  // namespace

}  // namespace tpkernels
