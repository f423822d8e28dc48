// Cross entropy over logits that are sharded by vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

namespace tpkernels {

// This rank holds classes vocab_start_index .. vocab_start_index + V/n of num_classes. Returns the
// loss [M] (0 where the target is ignored), the logarithm of the sum over all classes of exp(logit)
// [M], and [2]: the largest V/n of the ranks and the smallest one, negated.
std::tuple<at::Tensor, at::Tensor, at::Tensor> vocab_ce(const at::Tensor& logits,  // [M, V/n]
                                                        const at::Tensor& target,  // [M]
                                                        int64_t vocab_start_index,
                                                        int64_t num_classes, int64_t ignore_index,
                                                        double smoothing, const std::string& group,
                                                        const std::string& tag);

}  // namespace tpkernels
