// Checks of an op's arguments, and their place in front of the op's implementations. An error names
// the argument, its value and what is taken.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>

#include "../op.h"

namespace tpkernels {

template <OpName Name, typename Result, auto Check>
struct CheckedOp;

template <OpName Name, typename Result, typename... Args, void (*Check)(Args...)>
struct CheckedOp<Name, Result, Check> {
  static Result call(c10::DispatchKeySet keys, Args... args) {
    Check(args...);
    constexpr c10::DispatchKeySet after(c10::DispatchKeySet::FULL_AFTER,
                                        c10::DispatchKey::BackendSelect);
    return typed_op<Name, Result(Args...)>().redispatch(keys & after, args...);
  }
};

// Runs Check before each call of the op, whatever device its tensors are on. The dispatcher comes
// to BackendSelect before every backend: C++, Triton and fake kernels for meta tensors all rely on
// it. Only fake tensors leave the dispatcher earlier.
template <OpName Name, typename Result, auto Check>
void check_before(torch::Library& m) {
  m.impl(Name.text, &CheckedOp<Name, Result, Check>::call);
}

// A tensor and its argument's name.
struct Operand {
  const char* name;
  const at::Tensor& tensor;
};

// Takes a tensor whose storage, if it has one, holds all of its elements. FSDP frees some for a
// while.
inline void check_memory(Operand t) {
  const auto& tensor = t.tensor;
  if (!tensor.has_storage() || tensor.numel() == 0) return;
  const int64_t needed = spanned_bytes(tensor);
  TORCH_CHECK_VALUE(static_cast<int64_t>(tensor.storage().nbytes()) >= needed, t.name, " of shape ",
                    tensor.sizes(), " needs ", needed, " bytes, but its storage has ",
                    tensor.storage().nbytes(), ": was it freed, as FSDP does between uses?");
}

inline void check_dense(Operand t) {
  const bool dense = t.tensor.layout() == at::kStrided && !t.tensor.is_nested();
  TORCH_CHECK_VALUE(dense, t.name, " must be dense, got a ", t.tensor.layout(), " tensor: pass ",
                    t.name, ".to_dense()");
  check_memory(t);
}

inline void check_float(Operand t) {
  const auto dtype = t.tensor.scalar_type();
  const bool known =
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  TORCH_CHECK_TYPE(known, t.name, " must be float16, bfloat16, float32 or float64, got ", dtype,
                   ": cast it first");
}

// Takes indices, as torch's index_select does.
inline void check_integer(Operand t) {
  const auto dtype = t.tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, t.name, " must be int32 or int64, got ",
                   dtype, ": cast it first");
}

inline void check_same_device(Operand t, Operand first) {
  TORCH_CHECK_VALUE(t.tensor.device() == first.tensor.device(), t.name, " is on ",
                    t.tensor.device(), " but ", first.name, " is on ", first.tensor.device(),
                    ": move one of them");
}

inline void check_same_dtype(Operand t, Operand first) {
  TORCH_CHECK_TYPE(t.tensor.scalar_type() == first.tensor.scalar_type(), t.name, " is ",
                   t.tensor.scalar_type(), " but ", first.name, " is ", first.tensor.scalar_type(),
                   ": cast one of them");
}

inline void check_shape(Operand t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.tensor.sizes() == shape, t.name, " must be of shape ", shape, ", got ",
                    t.tensor.sizes());
}

inline void check_rank(Operand t, int64_t rank) {
  TORCH_CHECK_VALUE(t.tensor.dim() == rank, t.name, " must have ", rank, " dimensions, got shape ",
                    t.tensor.sizes());
}

// shape [..., old] -> [..., size]
inline at::DimVector with_last(at::IntArrayRef shape, int64_t size) {
  at::DimVector result(shape.begin(), shape.end());
  result.back() = size;
  return result;
}

// Takes an op's first tensor [..., N], of floating point.
inline void check_rows(Operand t) {
  check_dense(t);
  check_float(t);
  TORCH_CHECK_VALUE(t.tensor.dim() >= 1, t.name,
                    " must have at least one dimension, [..., N], got a scalar");
}

// Takes a further tensor of a floating-point dtype and this shape, beside the first one.
inline void check_operand(Operand t, at::IntArrayRef shape, Operand first) {
  check_dense(t);
  check_same_device(t, first);
  check_float(t);
  check_shape(t, shape);
}

inline void check_operand(const char* name, const std::optional<at::Tensor>& t,
                          at::IntArrayRef shape, Operand first) {
  if (t) check_operand({name, *t}, shape, first);
}

// The same for a tensor that must have the first one's dtype too.
inline void check_alike(Operand t, at::IntArrayRef shape, Operand first) {
  check_operand(t, shape, first);
  check_same_dtype(t, first);
}

inline void check_alike(const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef shape,
                        Operand first) {
  if (t) check_alike({name, *t}, shape, first);
}

// Takes a tensor that an op can write to: no two of its elements share memory.
inline void check_writable(Operand t) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(t.tensor) != at::MemOverlap::Yes, t.name, " of shape ",
                    t.tensor.sizes(), " and strides ", t.tensor.strides(),
                    " has elements that share memory, and is written to: pass a clone");
}

// Takes an input whose memory the op does not write to through `written`.
inline void check_apart(Operand t, Operand written) {
  const auto overlap = at::get_overlap_status(t.tensor, written.tensor);
  TORCH_CHECK_VALUE(
      overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, t.name,
      " shares memory with ", written.name, ", which is written to: pass a clone");
}

}  // namespace tpkernels
