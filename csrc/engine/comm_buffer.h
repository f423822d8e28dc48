// Memory for collectives.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace tpkernels {

// Every buffer that a collective touches is allocated here, so that a registered memory pool can
// take this function's place.
inline at::Tensor empty_comm_buffer(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

}  // namespace tpkernels
