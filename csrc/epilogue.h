// self = self + bias + residual in one pass: what follows a row-parallel layer's all-reduce.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>

namespace tpkernels {

// self [rows, N], bias [N], residual [rows, N]
inline at::TensorIterator bias_residual_iterator(const at::Tensor& self, const at::Tensor& bias, const at::Tensor& residual) {
  return at::TensorIteratorConfig().add_output(self).add_input(self).add_input(bias).add_input(residual).build();
}

}  // namespace tpkernels
