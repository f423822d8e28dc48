#include "tensors.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>

namespace tpkernels {

std::optional<Reduction> reduction_of(const c10d::ReduceOp& op, const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool integer = dtype == at::kLong || dtype == at::kInt || dtype == at::kShort ||
                       dtype == at::kChar || dtype == at::kByte;
  if (!integer && dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf &&
      dtype != at::kDouble)
    return std::nullopt;
  switch (static_cast<c10d::ReduceOp::RedOpType>(op)) {
    case c10d::ReduceOp::SUM:
      return Reduction::sum;
    case c10d::ReduceOp::MIN:
      return Reduction::min;
    case c10d::ReduceOp::MAX:
      return Reduction::max;
    case c10d::ReduceOp::AVG:
      TORCH_CHECK_VALUE(!integer, "ReduceOp.AVG of ", dtype,
                        ": the average of integers is none; take SUM, or a floating point dtype");
      return Reduction::mean;
    default:
      return std::nullopt;
  }
}

std::optional<Reductions> reductions_of(const c10d::ReduceOp& op, const Tensors& tensors) {
  Reductions all;
  for (const auto& t : tensors) {
    const auto reduction = reduction_of(op, t);
    if (!reduction) return std::nullopt;
    all.push_back(*reduction);
  }
  return all;
}

Tensors memory_of(const Memories& memories) {
  Tensors all;
  for (const auto& memory : memories) all.push_back(memory.memory());
  return all;
}

std::vector<int64_t> sizes_in_bytes(const Memories& memories) {
  std::vector<int64_t> all;
  for (const auto& memory : memories) all.push_back(memory.bytes());
  return all;
}

void write_back(const Memories& memories) {
  for (const auto& memory : memories) memory.write_back();
}

void check_readable(const at::Tensor& tensor, const char* op) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.is_cpu() && tensor.layout() == at::kStrided, op,
                    " on the shm transport takes dense CPU tensors, got ",
                    tensor.defined() ? c10::str(tensor.device(), ", ", tensor.layout())
                                     : std::string("an undefined one"));
}

void check_writable(const at::Tensor& tensor, const char* op) {
  check_readable(tensor, op);
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, op,
                    " cannot write a tensor of shape ", tensor.sizes(), " and strides ",
                    tensor.strides(), ", whose elements share memory: pass its clone()");
}

const at::Tensor& only_one(const Tensors& tensors, const char* op) {
  TORCH_CHECK_VALUE(tensors.size() == 1, op, " takes one tensor a rank, got ", tensors.size());
  return tensors[0];
}

bool all_like(const Tensors& tensors, const at::Tensor& like) {
  for (const auto& t : tensors)
    if (t.numel() != like.numel() || t.scalar_type() != like.scalar_type()) return false;
  return true;
}

void check_root(int64_t rank, int64_t tensor, int size, const char* op) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, op, ": invalid root rank: ", rank, ": a group of ",
                    size, " has ranks 0 to ", size - 1);
  TORCH_CHECK_VALUE(tensor == 0, op, ": invalid root tensor: ", tensor,
                    ": each rank passes one tensor, number 0");
}

void check_lists(const std::vector<Tensors>& lists, int size, const char* op, const char* what) {
  TORCH_CHECK_VALUE(lists.size() == 1 && lists[0].size() == static_cast<size_t>(size), op, " over ",
                    size, " ranks takes one list of as many ", what, ", got ", lists.size(),
                    lists.size() == 1 ? " of " : " lists",
                    lists.size() == 1 ? std::to_string(lists[0].size()) : std::string());
}

Tensors list_of_root(const std::vector<Tensors>& lists, bool is_root, const at::Tensor& like,
                     int size, const char* op, const char* what) {
  if (!is_root) {
    TORCH_CHECK_VALUE(lists.empty(), op, ": this rank is not the root, and takes no ", what);
    return {};
  }
  check_lists(lists, size, op, what);
  TORCH_CHECK_VALUE(all_like(lists[0], like), op, "'s ", what, " must have ", like.numel(),
                    " elements of ", like.scalar_type(), " each, as the root's other tensor");
  return lists[0];
}

void check_pairs(const Tensors& outputs, const Tensors& inputs, const char* op) {
  TORCH_CHECK_VALUE(inputs.size() == outputs.size() && !inputs.empty(), op,
                    " takes as many outputs as inputs, got ", outputs.size(), " and ",
                    inputs.size());
  for (const auto& t : inputs) check_readable(t, op);
  for (const auto& t : outputs) check_writable(t, op);
}

void check_whole(const at::Tensor& whole, const at::Tensor& shard, int size, const char* whole_name,
                 const char* shard_name) {
  TORCH_CHECK_VALUE(
      whole.numel() == shard.numel() * size && whole.scalar_type() == shard.scalar_type(),
      whole_name, " must have ", size, " times the ", shard_name, " elements, and its dtype; got ",
      whole.sizes(), " of ", whole.scalar_type(), " for ", shard.sizes(), " of ",
      shard.scalar_type());
}

}  // namespace tpkernels
