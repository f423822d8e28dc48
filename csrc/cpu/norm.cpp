// Residual add + LayerNorm or RMSNorm on CPUs.
#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm(const at::Tensor& input,
                                                                const OptionalTensor& residual,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias,
                                                                double eps, bool rms) {
  BelowAutograd guard;
  const auto dtype = input.scalar_type();
  const auto x = strided_rows(input);
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto r = residual ? strided_rows(*residual, dtype) : at::Tensor();
  const auto w = opmath_vector(weight, input), b = opmath_vector(bias, input);
  const auto out = at::empty({rows, columns}, input.options()),
             sum = residual ? at::empty_like(out) : at::empty({0}, input.options());
  const auto mean = at::empty({rms ? 0 : rows}, opmath_options(input)),
             rstd = at::empty({rows}, opmath_options(input));
  if (columns == 0) {  // no kernel runs; the statistics of nothing are NaN, as torch's mean
    mean.fill_(NAN);
    rstd.fill_(NAN);
  }
  NormArgs args{dtype, rms,          columns,    eps,        rows_at(x),      {},
                {},    rows_at(out), data_of(w), data_of(b), mean.data_ptr(), rstd.data_ptr()};
  if (residual) args.residual = rows_at(r), args.sum = rows_at(sum);
  const auto kernel = TPKERNELS_KERNEL(norm_forward);
  for_rows(rows, columns, [&](int64_t row, int64_t last) { kernel(args, row, last); });
  return {out.view(input.sizes()), residual ? sum.view(input.sizes()) : sum, mean, rstd};
}

std::vector<at::Tensor> norm_backward(const at::Tensor& grad, const OptionalTensor& grad_sum,
                                      const at::Tensor& sum, const OptionalTensor& weight,
                                      const at::Tensor& mean, const at::Tensor& rstd, bool rms,
                                      bool weight_grad, bool bias_grad) {
  BelowAutograd guard;
  const auto dtype = sum.scalar_type();
  const auto h = strided_rows(sum), dy = strided_rows(grad, dtype);
  const int64_t rows = h.size(0), columns = h.size(1);
  const auto dsum = grad_sum ? strided_rows(*grad_sum, dtype) : at::Tensor();
  const auto w = opmath_vector(weight, sum);
  const auto row_mean = rms ? at::Tensor() : opmath_vector(mean, sum),
             row_rstd = opmath_vector(rstd, sum);
  const auto dx = at::empty({rows, columns}, sum.options());
  NormBackwardArgs args{dtype,      rms,         columns,    rows_at(dy),       {},
                        rows_at(h), rows_at(dx), data_of(w), data_of(row_mean), data_of(row_rstd)};
  if (grad_sum) args.grad_sum = rows_at(dsum);
  std::vector<at::Tensor> grads{dx.view(sum.sizes())};
  const auto kernel = TPKERNELS_KERNEL(norm_backward);
  if (!weight_grad && !bias_grad) {
    for_rows(rows, columns, [&](int64_t row, int64_t last) { kernel(args, row, last, nullptr); });
    return grads;
  }
  const auto sums = sum_over_rows(
      rows, columns, 2 * columns, opmath_options(sum),
      [&](int64_t row, int64_t last, void* param_grads) { kernel(args, row, last, param_grads); });
  const auto param_dtype = weight ? weight->scalar_type() : dtype;
  if (weight_grad)
    grads.push_back(sums.narrow(0, 0, columns).to(param_dtype, false, /*copy=*/true));
  if (bias_grad)
    grads.push_back(sums.narrow(0, columns, columns).to(param_dtype, false, /*copy=*/true));
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) {
  m.impl("norm", &norm);
  m.impl("norm_backward", &norm_backward);
}

}  // namespace tpkernels
