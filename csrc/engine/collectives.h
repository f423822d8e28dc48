// Single collectives as ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace tpkernels {

// Sum (`op` "sum") or maximum ("max") over the group, in place.
void all_reduce_(at::Tensor& self, const std::string& group, const std::string& op,
                 const std::string& tag);

}  // namespace tpkernels
