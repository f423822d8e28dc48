// Linear layers' backward products.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "gemm.h"

namespace tpkernels {

// The gradients of y_i = x @ weight_i^T for layers i that read one x. An operand that is converted
// for one of them serves the others.
class LinearGradients {
 public:
  LinearGradients(const std::vector<at::Tensor>& dys,  // [M, N_i]
                  const at::Tensor& x,                 // [M, K], for weight()
                  at::TensorList weights);             // [N_i, K], for input() and input_out()
  // out [rows, K] = the sum over layers of dy_i @ weight_i, for rows begin .. begin + rows. A sum
  // in opmath is rounded once.
  void input_out(at::Tensor& out, int64_t begin);
  // The same for all rows: [M, K].
  at::Tensor input();
  // dy_i^T @ x: [N_i, K].
  at::Tensor weight(size_t i);

 private:
  struct Operand {
    at::Tensor own, converted = {};
    const at::Tensor& as(bool opmath);
  };
  at::Tensor sum(int64_t begin, int64_t rows);
  std::vector<Operand> dys_, weights_;
  Operand x_;
  Gemm gemm_;
};

// total += dy^T @ x
void add_weight_gradient_(at::Tensor& total,     // [N, K], float32 at least
                          const at::Tensor& dy,  // [M, N]
                          const at::Tensor& x);  // [M, K]

}  // namespace tpkernels
