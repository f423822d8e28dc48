// Shared by the implementations of ops.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstddef>

namespace tpkernels {

// The ops record no graph (an autograd.Function wraps them), and their inputs are cast already.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// An op's name as a template's argument.
template <size_t N>
struct OpName {
  char text[N];
  constexpr OpName(const char (&name)[N]) { std::copy_n(name, N, text); }
};

// The op of this name and C++ signature, looked up once.
template <OpName Name, typename Signature>
const c10::TypedOperatorHandle<Signature>& typed_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(Name.text, "").template typed<Signature>();
  return op;
}

// Bytes from the storage's begin to the end of the last element of `t`, which has some.
inline int64_t spanned_bytes(const at::Tensor& t) {
  int64_t last = t.storage_offset();
  for (int64_t dim = 0; dim < t.dim(); dim++) last += (t.size(dim) - 1) * t.stride(dim);
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

// Rows of `t` as a matrix of its last dimension.
inline int64_t rows_of(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().begin(), t.sizes().end() - 1);
}

// [..., N] -> [M, N]
inline at::Tensor as_rows(const at::Tensor& t) { return t.reshape({rows_of(t), t.size(-1)}); }

}  // namespace tpkernels
