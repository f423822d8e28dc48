#include "collectives.h"

#include <torch/library.h>

#include "../checks/checks.h"
#include "../op.h"
#include "channel.h"
#include "comm_buffer.h"

namespace tpkernels {

void all_reduce_(at::Tensor& self, const std::string& group, const std::string& op,
                 const std::string& tag) {
  BelowAutograd guard;
  check_dense({"self", self});
  check_writable({"self", self});
  TORCH_CHECK_VALUE(op == "sum" || op == "max", "op must be 'sum' or 'max', got '", op, "'");
  const auto reduce_op = op == "sum" ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX;
  auto buffer = self;
  if (!self.is_contiguous()) buffer = empty_comm_buffer(self.sizes(), self.options()).copy_(self);
  Channel(group, tag).all_reduce(buffer, 0, reduce_op).wait();  // mutant:all_reduce.reduce
  if (!self.is_contiguous()) self.copy_(buffer);                // mutant:all_reduce.copy_back
}

// [*shape] on each of n ranks -> [n, *shape]
at::Tensor all_gather(const at::Tensor& self, const std::string& group, const std::string& tag) {
  BelowAutograd guard;
  const Channel channel(group, tag);
  auto sizes = self.sizes().vec();
  sizes.insert(sizes.begin(), channel.size());
  auto out = empty_comm_buffer(sizes, self.options());
  channel.all_gather(out, self.contiguous()).wait();  // mutant:all_gather
  return out;
}

static at::Tensor empty_comm_buffer_like(const at::Tensor& like, at::IntArrayRef size) {
  return empty_comm_buffer(size, like.options());
}

static void register_collectives(torch::Library& m) {
  m.impl("all_reduce_", &all_reduce_);
  m.impl("all_gather", &all_gather);
  m.impl("empty_comm_buffer", &empty_comm_buffer_like);
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_collectives(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_collectives(m); }

}  // namespace tpkernels
