#include "linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>

#include "../cpu/gemm.h"
#include "../op.h"
#include "comm.h"

namespace tpkernels {

namespace {

at::Tensor slice_rows(const at::Tensor& t, const std::vector<int64_t>& bounds, size_t i) {
  return t.narrow(0, bounds[i], bounds[i + 1] - bounds[i]);
}

void add_bias_residual_(const at::Tensor& out, const at::Tensor& bias, const at::Tensor& residual) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("tpkernels::add_bias_residual_", "")
                       .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  op.call(out, bias, residual);
}

// `out` + bias + residual, in place
void add_rest_(at::Tensor& out, const std::optional<at::Tensor>& bias, const at::Tensor& residual) {
  if (bias) {
    add_bias_residual_(out, *bias, residual);
  } else {
    out.add_(residual);
  }
}

at::Tensor rms_norm(const at::Tensor& input, const at::Tensor& weight, double eps) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("tpkernels::norm", "")
                       .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                           const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                           const std::optional<at::Tensor>&, double, bool)>();
  return std::get<0>(op.call(input, std::nullopt, weight, std::nullopt, eps, true));
}

// out = the sum over ranks of what gemm(part, first row) writes, and the epilogue in the same pass; by blocks of rows where the
// memory that the ranks share is smaller.
template <typename F>
void sum_over_peers(const Channel& channel, const at::Tensor& out, const Epilogue& epilogue, const F& gemm) {
  const int64_t rows = out.size(0), block = channel.peers->rows_at_once(out);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t n = std::min(block, rows - begin);
    const auto slice = out.narrow(0, begin, n);
    auto here = epilogue;
    if (here.residual.defined()) here.residual = here.residual.narrow(0, begin, n);
    if (here.normed.defined()) here.normed = here.normed.narrow(0, begin, n);
    auto staged = channel.peers->stage(slice);
    {
      const auto range = channel.range("gemm");
      gemm(staged.part, begin);  // mutant:peers.gemm
    }
    channel.all_reduce_now(std::move(staged), slice, here);  // mutant:peers.reduce
  }
}

// row_linear; where its all-reduce takes the epilogue along, `normed` of that is written too.
at::Tensor row(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
               const std::optional<at::Tensor>& residual, const std::string& group, int64_t chunks, const std::string& tag,
               bool grad, Epilogue& epilogue) {
  auto x = as_rows(input);
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  auto out = empty_comm_buffer({x.size(0), weight.size(0)}, input.options());
  const auto bounds = chunk_bounds(x.size(0), chunks, weight.size(0) * input.element_size());
  const size_t count = bounds.size() - 1;
  const Channel channel(group, tag, count, "row");
  if (channel.fits_peers(out)) {
    if (bias) epilogue.bias = bias->contiguous();  // mutant:peers.bias
    if (residual) epilogue.residual = residual->expand(shape).reshape(out.sizes()).contiguous();  // mutant:peers.residual
    if (epilogue.weight.defined() && channel.peers->norms()) epilogue.normed = at::empty_like(out);  // mutant:peers.norm
    sum_over_peers(channel, out, epilogue, [&](at::Tensor& part, int64_t begin) {
      linear_out(part, x.narrow(0, begin, part.size(0)), weight, std::nullopt, grad);  // mutant:peers.linear
    });
    return out.view(shape);
  }
  // Without a residual pass to ride on, the bias enters the sum through the first rank's GEMM.
  const bool gemm_adds_bias = bias && !residual && channel.rank() == 0;
  std::vector<Pending> pending;
  pending.reserve(count);
  for (size_t i = 0; i < count; i++) {
    auto slice = slice_rows(out, bounds, i), x_i = slice_rows(x, bounds, i);
    {
      const auto range = channel.range("gemm", i);
      linear_out(slice, x_i, weight, gemm_adds_bias ? bias : std::nullopt, grad);  // mutant:row.gemm
    }
    pending.push_back(channel.all_reduce(slice, i));  // mutant:row.launch
  }
  // Every GEMM is issued before the first wait: on a GPU the wait would hold the next GEMM's stream back.
  const auto rest = residual ? std::optional(as_rows(*residual)) : std::nullopt;
  for (size_t i = 0; i < count; i++) {
    pending[i].wait();  // mutant:row.wait
    if (!rest) continue;
    const auto range = channel.range("epilogue", i);
    auto slice = slice_rows(out, bounds, i), rest_i = slice_rows(*rest, bounds, i);
    add_rest_(slice, bias, rest_i);  // mutant:row.epilogue
  }
  return out.view(shape);  // mutant:row.return
}

}  // namespace

at::Tensor row_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual, const std::string& group, int64_t chunks, const std::string& tag,
                      bool grad) {
  BelowAutograd guard;
  Epilogue epilogue;
  return row(input, weight, bias, residual, group, chunks, tag, grad, epilogue);
}

std::tuple<at::Tensor, at::Tensor> row_linear_rms_norm(const at::Tensor& input, const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias,
                                                       const std::optional<at::Tensor>& residual, const at::Tensor& norm_weight,
                                                       double eps, const std::string& group, int64_t chunks,
                                                       const std::string& tag) {
  BelowAutograd guard;
  Epilogue epilogue;
  epilogue.weight = norm_weight.to(weight.scalar_type()).contiguous();  // mutant:norm.weight
  epilogue.eps = eps;  // mutant:norm.eps
  auto sum = row(input, weight, bias, residual, group, chunks, tag, /*grad=*/false, epilogue);
  if (epilogue.normed.defined()) return {sum, epilogue.normed.view(sum.sizes())};  // mutant:norm.fused
  return {sum, rms_norm(sum, norm_weight, eps)};
}

at::Tensor vocab_embedding(const at::Tensor& ids, const at::Tensor& weight, int64_t first, const std::string& group,
                           const std::string& tag) {
  BelowAutograd guard;
  auto local = ids.flatten() - first;
  const auto outside = (local < 0).logical_or_(local >= weight.size(0));
  auto out = empty_comm_buffer({local.size(0), weight.size(1)}, weight.options());
  if (weight.size(0) == 0) {
    out.zero_();
  } else {
    const Range range(tag, "lookup");
    at::index_select_out(out, weight, 0, local.masked_fill_(outside, 0));
    out.masked_fill_(outside.unsqueeze(1), 0);  // mutant:embedding.mask
  }
  Channel(group, tag).all_reduce(out).wait();  // mutant:embedding.sum
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  return out.view(shape);
}

std::vector<at::Tensor> column_linear_backward(at::TensorList grad_outputs, const std::optional<at::Tensor>& input,
                                               at::TensorList weights, bool input_grad, c10::List<bool> weight_grad,
                                               c10::List<bool> bias_grad, const std::string& group, int64_t chunks,
                                               const std::string& tag) {
  BelowAutograd guard;
  std::vector<at::Tensor> dys, grads;
  for (const auto& dy : grad_outputs) dys.push_back(as_rows(dy));
  LinearGrads gradients(dys, input ? as_rows(*input) : at::Tensor(), weights);

  std::vector<Pending> pending;
  if (input_grad) {
    const int64_t rows = dys[0].size(0), features = weights[0].size(1);
    auto dx = empty_comm_buffer({rows, features}, dys[0].options());
    const auto bounds = chunk_bounds(rows, chunks, features * dx.element_size());
    const size_t count = bounds.size() - 1;
    const Channel channel(group, tag, count, "column");
    if (channel.fits_peers(dx)) {
      sum_over_peers(channel, dx, {}, [&](at::Tensor& part, int64_t begin) { gradients.input_out(part, begin); });
    } else {
      pending.reserve(count);
      for (size_t i = 0; i < count; i++) {
        auto slice = slice_rows(dx, bounds, i);
        {
          const auto range = channel.range("gemm", i);
          gradients.input_out(slice, bounds[i]);  // mutant:column.gemm
        }
        pending.push_back(channel.all_reduce(slice, i));  // mutant:column.launch
      }
    }
    auto shape = grad_outputs[0].sizes().vec();
    shape.back() = features;
    grads.push_back(dx.view(shape));
  }
  {
    const Range range("column", "wgrad");  // mutant:column.weights
    for (size_t j = 0; j < dys.size(); j++)  // under the last chunks' all-reduces
      if (weight_grad[j]) grads.push_back(gradients.weight(j));
    for (size_t j = 0; j < dys.size(); j++)
      if (bias_grad[j]) grads.push_back(dys[j].sum(0));
  }
  for (auto& p : pending) p.wait();  // mutant:column.wait
  return grads;
}

void all_reduce_(at::Tensor& self, const std::string& group, const std::string& op, const std::string& tag) {
  BelowAutograd guard;
  TORCH_CHECK_VALUE(op == "sum" || op == "max", "op must be 'sum' or 'max', got '", op, "'");
  auto buffer = self;
  if (!self.is_contiguous()) buffer = empty_comm_buffer(self.sizes(), self.options()).copy_(self);
  Channel(group, tag).all_reduce(buffer, 0, op == "sum" ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX).wait();  // mutant:all_reduce.sum
  if (!self.is_contiguous()) self.copy_(buffer);  // mutant:all_reduce.copy_back
}

at::Tensor all_gather(const at::Tensor& self, const std::string& group, const std::string& tag) {
  BelowAutograd guard;
  const Channel channel(group, tag);
  auto sizes = self.sizes().vec();
  sizes.insert(sizes.begin(), channel.size());
  auto out = empty_comm_buffer(sizes, self.options());
  channel.all_gather(out, self.contiguous()).wait();  // mutant:all_gather
  return out;
}

}  // namespace tpkernels
