// Tensor.to(dtype) that shares autocast's cache of weight casts, as nn.Linear does under autocast.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../checks/checks.h"

namespace tpkernels {

namespace {

at::Tensor autocast_to(const at::Tensor& self, at::ScalarType dtype) {
  check_memory({"self", self});
  return at::autocast::cached_cast(dtype, self, self.device().type());
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeImplicitAutograd, m) { m.impl("autocast_to", &autocast_to); }

}  // namespace tpkernels
