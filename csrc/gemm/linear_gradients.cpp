#include "linear_gradients.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "products.h"

namespace tpkernels {

const at::Tensor& LinearGradients::Operand::as(bool opmath) {
  if (!opmath) return own;
  if (!converted.defined()) converted = own.to(at::kFloat);
  return converted;
}

LinearGradients::LinearGradients(const std::vector<at::Tensor>& dys, const at::Tensor& x,
                                 at::TensorList weights)
    : x_{x} {
  const auto dtype = dys[0].scalar_type();
  int64_t elements = 0, k = 0;
  if (x.defined()) {
    k = x.size(1);
  } else if (!weights.empty()) {
    k = weights[0].size(1);
  }
  bool one_dtype = !x.defined() || x.scalar_type() == dtype;
  for (const auto& dy : dys) {
    dys_.push_back({dy});
    elements += dy.size(1) * k;
    one_dtype = one_dtype && dy.scalar_type() == dtype;
  }
  for (const auto& weight : weights) {
    weights_.push_back({weight});
    one_dtype = one_dtype && weight.scalar_type() == dtype;
  }
  if (one_dtype && dys[0].is_cpu()) gemm_ = choose_cpu_gemm(dtype, elements, dys[0].size(0), false);
}

at::Tensor LinearGradients::sum(int64_t begin, int64_t rows) {
  at::Tensor total;
  for (size_t i = 0; i < dys_.size(); i++) {
    const auto dy = dys_[i].as(gemm_.opmath).narrow(0, begin, rows),
               weight = weights_[i].as(gemm_.opmath);
    if (i > 0 && gemm_.library == GemmLibrary::aten) {
      total.addmm_(dy, weight);
      continue;
    }
    const auto product = multiply(dy, weight.t(), std::nullopt, gemm_, /*grad=*/true);
    total = i > 0 ? total.add_(product) : product;
  }
  return total;
}

void LinearGradients::input_out(at::Tensor& out, int64_t begin) {
  const int64_t rows = out.size(0);
  if (!gemm_.is_plain()) {
    out.copy_(sum(begin, rows));
    return;
  }
  at::mm_out(out, dys_[0].own.narrow(0, begin, rows), weights_[0].own);
  for (size_t i = 1; i < dys_.size(); i++)
    out.addmm_(dys_[i].own.narrow(0, begin, rows), weights_[i].own);
}

at::Tensor LinearGradients::input() {
  return sum(0, dys_[0].own.size(0)).to(dys_[0].own.scalar_type());
}

at::Tensor LinearGradients::weight(size_t i) {
  const auto dy = dys_[i].as(gemm_.opmath), x = x_.as(gemm_.opmath);
  return multiply(dy.t(), x.t(), std::nullopt, gemm_, /*grad=*/true).to(dys_[i].own.scalar_type());
}

void add_weight_gradient_(at::Tensor& total, const at::Tensor& dy, const at::Tensor& x) {
  Gemm gemm;
  if (dy.is_cpu() && dy.scalar_type() == x.scalar_type())
    gemm = choose_cpu_gemm(dy.scalar_type(), total.numel(), dy.size(0), false);
  const auto to_opmath = [&](const at::Tensor& t) { return gemm.opmath ? t.to(at::kFloat) : t; };
  const auto a = to_opmath(dy).t(), b = to_opmath(x);
  if (gemm.library == GemmLibrary::aten && total.scalar_type() == a.scalar_type()) {
    total.addmm_(a, b);
  } else {  // a half-precision product is rounded once, by its GEMM
    total.add_(multiply(a, b.t(), std::nullopt, gemm, /*grad=*/true));
  }
}

}  // namespace tpkernels
