// The matrix products of linear layers: at::mm's, computed on CPUs by what is fastest there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "packed.h"

namespace tpkernels {

// How a product is computed; operands of another dtype are converted to float32 and the result back if `wide`.
struct Gemm {
  Library library = Library::aten;
  bool wide = false;
  bool packed = false;
  bool plain() const { return library == Library::aten && !wide; }
  bool operator==(const Gemm& o) const { return library == o.library && wide == o.wide && packed == o.packed; }
};

// For `rows` rows times a weight of that dtype; `constant`: no gradient is wanted, a packed copy of the weight may serve many
// calls.
Gemm choose_gemm(const at::Tensor& weight, int64_t rows, bool constant);

// From now on this one for all that it can compute, whatever the rows; nullopt: the choice again. For tests and measurements.
void force_gemm(std::optional<Gemm> gemm);

// input [..., K] @ weight [N, K]^T + bias. `grad`: a gradient will follow, so the weight is about to change and is not packed.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool grad);

// The same without gradient, if that is all there is to it: CPU tensors that fit, no autocast, no mode, no gradient wanted.
// Undefined otherwise. It is what makes a layer of one row cost little more than F.linear.
at::Tensor linear_now(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// linear of [M, K] into `out` [M, N], which may be memory of any kind.
void linear_out(at::Tensor& out, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                bool grad);

// The gradients of y_j = x @ weight_j^T for layers j that read one x. What is converted for one of them serves the others.
class LinearGrads {
 public:
  // dys: [M, N_j]; x [M, K] is needed for `weight`, weights [N_j, K] for `input`.
  LinearGrads(const std::vector<at::Tensor>& dys, const at::Tensor& x, at::TensorList weights);
  // out [rows, K] = the sum over layers of dy_j @ weight_j for rows begin .. begin + out.size(0); a wide sum is rounded once
  void input_out(at::Tensor& out, int64_t begin);
  at::Tensor input();  // the same of all rows
  // dy_j^T @ x [N_j, K]
  at::Tensor weight(size_t j);

 private:
  struct Operand {
    at::Tensor own, wide = {};
    const at::Tensor& as(bool widened);
  };
  at::Tensor sum(int64_t begin, int64_t rows);
  std::vector<Operand> dys_, weights_;
  Operand x_;
  Gemm gemm_;
};

// total [N, K], float32 at least, += dy [M, N]^T @ x [M, K]
void add_weight_grad_(at::Tensor& total, const at::Tensor& dy, const at::Tensor& x);

// The gradients of row-parallel y = input @ weight^T + bias: the input's if `weight` is given, the weight's if `input` is, the
// bias'.
std::vector<at::Tensor> row_linear_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                                            const std::optional<at::Tensor>& weight, bool bias_grad);

}  // namespace tpkernels
