// Linear layers whose GEMM runs in chunks of rows, each chunk's all-reduce under the next chunk's GEMM.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tpkernels {

// sum over ranks of input [..., K/n] @ weight [N, K/n]^T, + bias [N] + residual [..., N]; `grad`: a gradient will follow
at::Tensor row_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual, const std::string& group, int64_t chunks, const std::string& tag,
                      bool grad);

// row_linear and the RMSNorm of its result: (result, result * rsqrt(mean(result^2) + eps) * norm_weight). No gradient is prepared
// for.
std::tuple<at::Tensor, at::Tensor> row_linear_rms_norm(const at::Tensor& input, const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias,
                                                       const std::optional<at::Tensor>& residual, const at::Tensor& norm_weight,
                                                       double eps, const std::string& group, int64_t chunks,
                                                       const std::string& tag);

// Rows of a table split by vocabulary: this rank holds rows first .. first + weight.size(0); others' ids give zeros to the sum.
at::Tensor vocab_embedding(const at::Tensor& ids, const at::Tensor& weight, int64_t first, const std::string& group,
                           const std::string& tag);

// The gradients of y_i = input @ weight_i^T + bias_i, i over layers that read one input: first the sum over ranks and layers of
// grad_output_i @ weight_i if `input_grad`, then the weight gradients asked for, then the bias gradients asked for. `input` is
// needed for weight gradients, `weights` for the input's.
std::vector<at::Tensor> column_linear_backward(at::TensorList grad_outputs, const std::optional<at::Tensor>& input,
                                               at::TensorList weights, bool input_grad, c10::List<bool> weight_grad,
                                               c10::List<bool> bias_grad, const std::string& group, int64_t chunks,
                                               const std::string& tag);

// In-place sum ("sum") or maximum ("max") over the group.
void all_reduce_(at::Tensor& self, const std::string& group, const std::string& op, const std::string& tag);

// [*shape] on every rank -> [n, *shape]
at::Tensor all_gather(const at::Tensor& self, const std::string& group, const std::string& tag);

}  // namespace tpkernels
