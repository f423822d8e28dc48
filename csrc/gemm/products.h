// Matrix products by a chosen GEMM.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "gemm.h"

namespace tpkernels {

// a [M, K] @ b_t [N, K]^T + bias [N]. The operands are in the dtype that `gemm` computes in.
// `grad`: a gradient is wanted, so that the sums over K must be as accurate as MKL's.
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b_t,
                    const std::optional<at::Tensor>& bias, const Gemm& gemm, bool grad);

}  // namespace tpkernels
