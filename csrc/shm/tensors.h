// The tensors of a collective as contiguous memory, and the checks of its arguments. A check raises
// ValueError, before anything is sent.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "../cpu/kernels.h"

namespace tpkernels {

using Tensors = std::vector<at::Tensor>;
using FewTensors = c10::SmallVector<at::Tensor, 1>;  // mostly one, without an allocation

// A tensor as contiguous memory. write_back() matters where that is a copy.
class ContiguousMemory {
 public:
  explicit ContiguousMemory(const at::Tensor& tensor)
      : tensor_(tensor), memory_(tensor.contiguous()) {}
  const at::Tensor& tensor() const { return tensor_; }
  const at::Tensor& memory() const { return memory_; }
  char* data() const { return static_cast<char*>(memory_.data_ptr()); }
  int64_t bytes() const { return memory_.nbytes(); }
  void write_back() const {
    if (!memory_.is_same(tensor_)) tensor_.copy_(memory_);
  }

 private:
  at::Tensor tensor_, memory_;
};

using Memories = std::vector<ContiguousMemory>;

template <typename T>
std::vector<T> addresses(const Memories& memories) {
  std::vector<T> all;
  for (const auto& memory : memories) all.push_back(memory.data());
  return all;
}

Tensors memory_of(const Memories& memories);
std::vector<int64_t> sizes_in_bytes(const Memories& memories);
void write_back(const Memories& memories);

// One a tensor.
using Reductions = c10::SmallVector<Reduction, 4>;

// The reduction that shm does itself, or nullopt: gloo does it, or says why not.
std::optional<Reduction> reduction_of(const c10d::ReduceOp& op, const at::Tensor& tensor);
// Every tensor's, or nullopt if gloo has to do any of them.
std::optional<Reductions> reductions_of(const c10d::ReduceOp& op, const Tensors& tensors);

void check_readable(const at::Tensor& tensor, const char* op);
void check_writable(const at::Tensor& tensor, const char* op);
const at::Tensor& only_one(const Tensors& tensors, const char* op);
// Returns true if all of `tensors` are as large as `like` and of its dtype.
bool all_like(const Tensors& tensors, const at::Tensor& like);
void check_root(int64_t rank, int64_t tensor, int size, const char* op);
void check_lists(const std::vector<Tensors>& lists, int size, const char* op, const char* what);
// The root's list of one tensor a rank, each like `like`; the other ranks pass none.
Tensors list_of_root(const std::vector<Tensors>& lists, bool is_root, const at::Tensor& like,
                     int size, const char* op, const char* what);
// Takes as many outputs as inputs, each of them usable.
void check_pairs(const Tensors& outputs, const Tensors& inputs, const char* op);
// `whole` has `size` times the elements of `shard`, and its dtype.
void check_whole(const at::Tensor& whole, const at::Tensor& shard, int size, const char* whole_name,
                 const char* shard_name);

}  // namespace tpkernels
