// Checks of the ops on a sharded vocabulary.
#include "checks.h"

namespace tpkernels {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_start(int64_t vocab_start_index) {
  TORCH_CHECK_VALUE(vocab_start_index >= 0, "vocab_start_index must not be negative, got ",
                    vocab_start_index);
}

void check_options(int64_t num_classes, double smoothing) {
  // A rank without classes may have counted none: it takes part, so that all raise together.
  TORCH_CHECK_VALUE(num_classes >= 0, "num_classes must not be negative, got ", num_classes);
  TORCH_CHECK_VALUE(smoothing >= 0 && smoothing <= 1, "smoothing must lie in [0, 1], got ",
                    smoothing);
}

void check_matrix(Operand t) {
  check_rows(t);
  check_rank(t, 2);
}

// target [M] beside `first` [M, ...]
void check_target(const Tensor& target, Operand first) {
  check_dense({"target", target});
  check_same_device({"target", target}, first);
  check_integer({"target", target});
  check_shape({"target", target}, {first.tensor.size(0)});
}

void check_vocab_embedding(const Tensor& ids, const Tensor& weight, int64_t vocab_start_index,
                           const std::string& /*group*/, const std::string& /*tag*/) {
  const Operand table{"weight", weight};
  check_matrix(table);
  check_dense({"ids", ids});
  check_same_device({"ids", ids}, table);
  check_integer({"ids", ids});
  check_start(vocab_start_index);
}

void check_vocab_ce_stats(const Tensor& logits, const Tensor& target, int64_t vocab_start_index) {
  check_matrix({"logits", logits});
  check_target(target, {"logits", logits});
  check_start(vocab_start_index);
}

void check_vocab_ce(const Tensor& logits, const Tensor& target, int64_t vocab_start_index,
                    int64_t num_classes, int64_t /*ignore_index*/, double smoothing,
                    const std::string& /*group*/, const std::string& /*tag*/) {
  check_vocab_ce_stats(logits, target, vocab_start_index);
  check_options(num_classes, smoothing);
}

void check_vocab_ce_grad(const Tensor& logits, const Tensor& target, const Tensor& log_norm,
                         const Tensor& scale, int64_t vocab_start_index, double smoothing,
                         int64_t num_classes) {
  const Operand z{"logits", logits};
  check_vocab_ce_stats(logits, target, vocab_start_index);
  check_operand({"log_norm", log_norm}, {logits.size(0)}, z);
  check_operand({"scale", scale}, {logits.size(0)}, z);
  check_options(num_classes, smoothing);
}

void check_vocab_ce_grad_(const Tensor& logits, const Tensor& target, const Tensor& log_norm,
                          const Tensor& scale, int64_t vocab_start_index, double smoothing,
                          int64_t num_classes) {
  const Operand z{"logits", logits};
  check_vocab_ce_grad(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes);
  check_writable(z);
  check_apart({"target", target}, z);
  check_apart({"log_norm", log_norm}, z);
  check_apart({"scale", scale}, z);
}

void check_vocab_linear_ce(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& target, const OptionalTensor& scale,
                           int64_t vocab_start_index, int64_t num_classes, int64_t /*ignore_index*/,
                           double smoothing, int64_t chunk_rows, bool input_grad, bool weight_grad,
                           bool bias_grad, const std::string& /*group*/,
                           const std::string& /*tag*/) {
  const Operand x{"input", input};
  check_matrix(x);
  check_rank({"weight", weight}, 2);
  check_alike({"weight", weight}, {weight.size(0), input.size(1)}, x);
  check_alike("bias", bias, {weight.size(0)}, x);
  check_target(target, x);
  check_operand("scale", scale, {input.size(0)}, x);
  check_start(vocab_start_index);
  check_options(num_classes, smoothing);
  TORCH_CHECK_VALUE(chunk_rows >= 1, "chunk_rows must be at least 1, got ", chunk_rows);
  TORCH_CHECK_VALUE(scale || !(input_grad || weight_grad || bias_grad),
                    "gradients need scale, the gradient of each row's loss, got None");
  TORCH_CHECK_VALUE(bias || !bias_grad, "bias_grad needs bias, got None");
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

TORCH_LIBRARY_IMPL(tpkernels, BackendSelect, m) {
  check_before<"tpkernels::vocab_embedding", Tensor, check_vocab_embedding>(m);
  check_before<"tpkernels::vocab_ce", Three, check_vocab_ce>(m);
  check_before<"tpkernels::vocab_linear_ce", std::vector<Tensor>, check_vocab_linear_ce>(m);
  check_before<"tpkernels::vocab_ce_stats", Tensor, check_vocab_ce_stats>(m);
  check_before<"tpkernels::vocab_ce_grad", Tensor, check_vocab_ce_grad>(m);
  check_before<"tpkernels::vocab_ce_grad_", void, check_vocab_ce_grad_>(m);
}

}  // namespace

}  // namespace tpkernels
