// Checks of the memory-bound ops without communication.
#include "../activation.h"
#include "checks.h"

namespace tpkernels {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_bias_act(const Tensor& input, const OptionalTensor& bias, std::string_view activation) {
  const Operand x{"input", input};
  check_rows(x);
  const int64_t n = input.size(-1);
  check_operand("bias", bias, {n}, x);
  const bool gated = parse_activation(activation).gated;
  TORCH_CHECK_VALUE(!gated || n % 2 == 0, activation,
                    " takes [gate; up], two halves of one size, got input of shape ",
                    input.sizes());
}

void check_bias_act_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& bias,
                             std::string_view activation, bool /*bias_grad*/) {
  check_bias_act(input, bias, activation);
  const int64_t n = input.size(-1), halves = parse_activation(activation).gated ? 2 : 1;
  check_operand({"grad", grad}, with_last(input.sizes(), n / halves), {"input", input});
}

void check_gated_act(const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias,
                     const OptionalTensor& up_bias, std::string_view activation) {
  const Operand first{"gate", gate};
  check_rows(first);
  check_alike({"up", up}, gate.sizes(), first);
  check_operand("gate_bias", gate_bias, {gate.size(-1)}, first);
  check_operand("up_bias", up_bias, {gate.size(-1)}, first);
  parse_activation(activation);
}

void check_gated_act_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                              const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
                              std::string_view activation, bool /*bias_grad*/) {
  check_gated_act(gate, up, gate_bias, up_bias, activation);
  check_operand({"grad", grad}, gate.sizes(), {"gate", gate});
}

void check_norm(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                const OptionalTensor& bias, double /*eps*/, bool /*rms*/) {
  const Operand x{"input", input};
  check_rows(x);
  check_alike("residual", residual, input.sizes(), x);
  check_operand("weight", weight, {input.size(-1)}, x);
  check_operand("bias", bias, {input.size(-1)}, x);
}

void check_norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& sum,
                         const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
                         bool rms, bool /*weight_grad*/, bool /*bias_grad*/) {
  const Operand h{"sum", sum};
  check_rows(h);
  const int64_t rows = rows_of(sum);
  check_operand({"grad", grad}, sum.sizes(), h);
  check_operand("grad_sum", grad_sum, sum.sizes(), h);
  check_operand("weight", weight, {sum.size(-1)}, h);
  check_same_device({"mean", mean}, h);
  if (!rms) check_operand({"mean", mean}, {rows}, h);
  check_operand({"rstd", rstd}, {rows}, h);
}

void check_dropout(const Tensor& input, const Tensor& seed, double p, int64_t row, int64_t column) {
  const Operand x{"input", input}, key{"seed", seed};
  check_rows(x);
  check_dense(key);
  check_same_device(key, x);
  TORCH_CHECK_VALUE(seed.numel() == 1 && seed.scalar_type() == at::kLong,
                    "seed must be one int64, got ", seed.numel(), " of ", seed.scalar_type());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "p must lie in [0, 1], got ", p);
  TORCH_CHECK_VALUE(row >= 0 && column >= 0, "row and column must not be negative, got ", row,
                    " and ", column);
}

void check_rotary(const Tensor& input, const Tensor& cos, const Tensor& sin, bool /*interleaved*/,
                  bool /*inverse*/) {
  const Operand x{"input", input};
  check_rows(x);
  TORCH_CHECK_VALUE(input.dim() == 4, "input must be of shape [B, H, T, D], got ", input.sizes());
  const bool batched = cos.dim() == 3 && cos.size(0) == input.size(0);
  const bool fits = (batched || cos.dim() == 2) && cos.size(-2) == input.size(2) &&
                    cos.size(-1) <= input.size(3) / 2;
  TORCH_CHECK_VALUE(fits, "cos must be of shape [T, R/2] or [B, T, R/2], R <= D, for input ",
                    input.sizes(), ", got ", cos.sizes());
  check_operand({"cos", cos}, cos.sizes(), x);
  check_operand({"sin", sin}, cos.sizes(), x);
}

TORCH_LIBRARY_IMPL(tpkernels, BackendSelect, m) {
  check_before<"tpkernels::bias_act", Tensor, check_bias_act>(m);
  check_before<"tpkernels::bias_act_backward", std::vector<Tensor>, check_bias_act_backward>(m);
  check_before<"tpkernels::gated_act", Tensor, check_gated_act>(m);
  check_before<"tpkernels::gated_act_backward", std::vector<Tensor>, check_gated_act_backward>(m);
  check_before<"tpkernels::norm", std::tuple<Tensor, Tensor, Tensor, Tensor>, check_norm>(m);
  check_before<"tpkernels::norm_backward", std::vector<Tensor>, check_norm_backward>(m);
  check_before<"tpkernels::dropout", Tensor, check_dropout>(m);
  check_before<"tpkernels::rotary", Tensor, check_rotary>(m);
}

}  // namespace

}  // namespace tpkernels
