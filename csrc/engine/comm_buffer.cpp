#include "comm_buffer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace tpkernels {

at::Tensor empty_comm_buffer(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

namespace {

at::Tensor empty_comm_buffer_like(const at::Tensor& like, at::IntArrayRef size) {
  return empty_comm_buffer(size, like.options());
}

void register_comm_buffer(torch::Library& m) {
  m.impl("empty_comm_buffer", &empty_comm_buffer_like);
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_comm_buffer(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_comm_buffer(m); }

}  // namespace tpkernels
