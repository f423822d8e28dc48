// Linear layers' forward product.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tpkernels {

// input @ weight^T + bias: [..., N]. `grad`: a gradient will follow, so the weight is about to
// change and is not packed.
at::Tensor linear(const at::Tensor& input,                // [..., K]
                  const at::Tensor& weight,               // [N, K]
                  const std::optional<at::Tensor>& bias,  // [N]
                  bool grad);

// The inference fast path for plain CPU tensors: no autocast, no mode, no gradient wanted.
// Undefined where it does not apply. It is what makes a layer of one row cost little more than
// F.linear.
at::Tensor linear_fast_path(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias);

// linear of [M, K] into `out` [M, N], which may be memory of any kind.
void linear_out(at::Tensor& out, const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, bool grad);

}  // namespace tpkernels
