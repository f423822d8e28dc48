// A column-parallel layer's GEMM and activation on any device, in ATen calls.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../op.h"
#include "activation.h"

namespace tpkernels {

namespace {

// Returns activation(input @ weight^T + bias) and, if `keep`, input @ weight^T (else an empty
// tensor).
std::tuple<at::Tensor, at::Tensor> column_linear_act(
    const at::Tensor& input,                // [..., K]
    const at::Tensor& weight,               // [N/n, K]
    const std::optional<at::Tensor>& bias,  // [N/n]
    std::string_view name, bool keep) {
  BelowAutograd guard;
  const auto& op = typed_op<"tpkernels::bias_act", decltype(composite::bias_act)>();
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  const auto linear = at::mm(as_rows(input), weight.t()).view(shape);
  return {op.call(linear, bias, name), keep ? linear : at::empty({0}, input.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("column_linear_act", &column_linear_act);
}

}  // namespace tpkernels
