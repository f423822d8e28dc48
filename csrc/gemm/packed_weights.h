// Weights in the layout that a library's GEMM reads fastest, kept beside the weights for calls
// without gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace tpkernels {

// The libraries that multiply: at::mm, MKL's packed sgemm, or oneDNN's inner product. The last two
// go through torch's own ops, where it has them.
enum class GemmLibrary { aten, mkl, onednn };

bool has_gemm_library(GemmLibrary library);

// The packed copy of `weight` [N, K] for `library`, in float32 if `opmath`. It is undefined unless
// this very content was asked for before: a weight that changes between all calls is never packed.
// The content is taken as unchanged while the storage, the version counter and a sample of the
// bytes are. The sample is one 64-byte line of each row (more where there are fewer rows than lines
// in a row), at columns that move with the row. So every edit of a whole row or column shows,
// through `.data` too, which moves no version.
at::Tensor find_packed(const at::Tensor& weight, GemmLibrary library, bool opmath);

// input [M, K] @ weight [N, K]^T + bias. The weight is packed; oneDNN also takes a plain one.
at::Tensor mkl_linear(const at::Tensor& input, const at::Tensor& packed, int64_t n,
                      const std::optional<at::Tensor>& bias);
at::Tensor onednn_linear(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias);

// Frees the packed copies that share the weight's storage.
void drop_packed(const at::Tensor& weight);

// Bytes of the packed copies that share the weight's storage, or of all.
int64_t packed_bytes(const std::optional<at::Tensor>& weight);

}  // namespace tpkernels
