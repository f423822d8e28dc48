// The backward of column-parallel linear layers that read one input. The input's gradient is summed
// over the ranks in chunks of rows, each chunk's all-reduce under the next chunk's GEMM and the
// weights' gradients. The forward needs no communication.
#include <ATen/core/List.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../gemm/linear_gradients.h"
#include "../op.h"
#include "channel.h"
#include "chunking.h"
#include "comm_buffer.h"

namespace tpkernels {

namespace {

// The input's gradient, and its chunks' all-reduces in flight.
struct InputGradient {
  std::vector<Pending> pending;
  at::Tensor dx;  // [M, K]
};

// `dy` gives the rows, the dtype and the device.
InputGradient start_input_gradient(LinearGradients& gradients, const at::Tensor& dy, int64_t k,
                                   const std::string& group, int64_t chunks,
                                   const std::string& tag) {
  InputGradient result{{}, empty_comm_buffer({dy.size(0), k}, dy.options())};
  const auto& dx = result.dx;
  const auto bounds = chunk_bounds(dx.size(0), chunks, k * dx.element_size());
  const size_t count = bounds.size() - 1;
  const Channel channel(group, tag, count, "column");
  if (channel.has_fast_path(dx)) {
    all_reduce_fast_path(channel, dx, {}, [&](at::Tensor& term, int64_t begin) {
      gradients.input_out(term, begin);
    });
    return result;
  }
  auto& pending = result.pending;
  pending.reserve(count);
  for (size_t i = 0; i < count; i++) {
    auto slice = slice_rows(dx, bounds, i);
    {
      const auto range = channel.range("gemm", i);
      gradients.input_out(slice, bounds[i]);  // mutant:column.gemm
    }
    pending.push_back(channel.all_reduce(slice, i));  // mutant:column.launch
  }
  return result;
}

}  // namespace

// The gradients of y_i = input @ weight_i^T + bias_i for layers i: first the sum over ranks and
// layers of grad_output_i @ weight_i if `input_grad`, then the weights' gradients asked for, then
// the biases'. `input` is needed for a weight's gradient, `weights` for the input's.
std::vector<at::Tensor> column_linear_backward(at::TensorList grad_outputs,  // [..., N_i/n]
                                               const std::optional<at::Tensor>& input,  // [..., K]
                                               at::TensorList weights,  // [N_i/n, K]
                                               bool input_grad, c10::List<bool> weight_grad,
                                               c10::List<bool> bias_grad, const std::string& group,
                                               int64_t chunks, const std::string& tag) {
  BelowAutograd guard;
  std::vector<at::Tensor> dys, grads;
  for (const auto& dy : grad_outputs) dys.push_back(as_rows(dy));
  LinearGradients gradients(dys, input ? as_rows(*input) : at::Tensor(), weights);

  std::vector<Pending> pending;
  if (input_grad) {
    const int64_t k = weights[0].size(1);
    auto started = start_input_gradient(gradients, dys[0], k, group, chunks, tag);
    pending = std::move(started.pending);
    auto shape = grad_outputs[0].sizes().vec();
    shape.back() = k;
    grads.push_back(started.dx.view(shape));
  }
  {
    const NvtxRange range("column", "wgrad");  // mutant:column.weights
    for (size_t i = 0; i < dys.size(); i++)    // under the last chunks' all-reduces
      if (weight_grad[i]) grads.push_back(gradients.weight(i));
    for (size_t i = 0; i < dys.size(); i++)
      if (bias_grad[i]) grads.push_back(dys[i].sum(0));
  }
  for (auto& p : pending) p.wait();  // mutant:column.wait
  return grads;
}

static void register_column_linear(torch::Library& m) {
  m.impl("column_linear_backward", &column_linear_backward);
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_column_linear(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_column_linear(m); }

}  // namespace tpkernels
