// Cross entropy over logits split by vocabulary, and the output layer before it without the whole logits.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tpkernels {

// logits [M, V_r], this rank's classes first .. first + V_r of num_classes; target [M]. Returns the loss [M] (0 where ignored),
// log(sum over all classes of exp(logit)) [M], and the largest V_r and the smallest, negated.
std::tuple<at::Tensor, at::Tensor, at::Tensor> vocab_ce(const at::Tensor& logits, const at::Tensor& target, int64_t first,
                                                        int64_t num_classes, int64_t ignore_index, double smoothing,
                                                        const std::string& group, const std::string& tag);

// The same for logits = input [M, K] @ weight [V_r, K]^T + bias [V_r], `chunk_rows` rows at a time. With `scale` [M] (the gradient
// of each row's loss) the gradients asked for follow the loss: of the input, summed over the ranks, of the weight, of the bias.
std::vector<at::Tensor> vocab_linear_ce(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                        const at::Tensor& target, const std::optional<at::Tensor>& scale, int64_t first,
                                        int64_t num_classes, int64_t ignore_index, double smoothing, int64_t chunk_rows,
                                        bool input_grad, bool weight_grad, bool bias_grad, const std::string& group,
                                        const std::string& tag);

}  // namespace tpkernels
