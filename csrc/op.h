// Shared by the implementations of ops.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace tpkernels {

// The ops record no graph (an autograd.Function wraps them), and their inputs are cast already.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Rows of `t` as a matrix of its last dimension.
inline int64_t rows_of(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().begin(), t.sizes().end() - 1);
}

// [..., N] -> [M, N]
inline at::Tensor as_rows(const at::Tensor& t) { return t.reshape({rows_of(t), t.size(-1)}); }

}  // namespace tpkernels
