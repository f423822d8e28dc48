#include "linear.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../op.h"
#include "products.h"

namespace tpkernels {

namespace {

// True for a CPU product that at::linear would not refuse.
bool fits(const at::Tensor& input, const at::Tensor& weight,
          const std::optional<at::Tensor>& bias) {
  const auto dtype = weight.scalar_type();
  const bool dense = input.layout() == at::kStrided && weight.layout() == at::kStrided;
  const bool shapes = weight.dim() == 2 && input.dim() > 0 && input.size(-1) == weight.size(1);
  if (!weight.is_cpu() || !input.is_cpu() || input.scalar_type() != dtype || !dense || !shapes)
    return false;
  if (!bias) return true;
  return bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 &&
         bias->size(0) == weight.size(0);
}

// input [M, K] @ weight^T + bias, in float32 where that is chosen. Undefined where at::mm is the
// choice.
at::Tensor product(const at::Tensor& input, int64_t m, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, bool grad) {
  if (!fits(input, weight, bias)) return {};
  if (grad) drop_packed(weight);
  auto gemm = choose_gemm(weight, m, !grad);
  at::Tensor packed;
  if (gemm.packed) {
    packed = find_packed(weight, gemm.library, gemm.opmath);
    if (!packed.defined()) gemm = choose_gemm(weight, m, false);
  }
  if (gemm.is_plain()) return {};
  const auto to_opmath = [&](const at::Tensor& t) { return gemm.opmath ? t.to(at::kFloat) : t; };
  const auto x = to_opmath(as_rows(input));
  const auto b = bias ? std::optional(to_opmath(*bias)) : std::nullopt;
  if (gemm.library == GemmLibrary::mkl) return mkl_linear(x, packed, weight.size(0), b);
  return multiply(x, packed.defined() ? packed : to_opmath(weight), b, gemm, grad);
}

}  // namespace

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, bool grad) {
  BelowAutograd guard;
  const int64_t m = input.dim() ? rows_of(input) : 0;
  const auto out = product(input, m, weight, bias, grad);
  if (!out.defined()) return at::linear(input, weight, bias);
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return out.to(input.scalar_type()).view(shape);
}

at::Tensor linear_fast_path(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
  if (!fits(input, weight, bias) || !at::isFloatingType(input.scalar_type())) return {};
  const bool wants_grad =
      input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
  if (wants_grad && at::GradMode::is_enabled()) return {};
  // Anything that would see or change the call: a mode, a transform, autocast, a wrapper of another
  // kind.
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  auto keys = input.key_set() | weight.key_set() | tls.included_;
  if (bias) keys = keys | bias->key_set();
  if (!tls.excluded_.has(c10::DispatchKey::AutocastCPU)) return {};  // autocast is on
  keys = keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset -
         c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  if (keys.highestPriorityTypeId() != c10::DispatchKey::CPU) return {};
  return linear(input, weight, bias, /*grad=*/false);
}

void linear_out(at::Tensor& out, const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, bool grad) {
  const auto result = product(input, input.size(0), weight, bias, grad);
  if (result.defined()) {
    out.copy_(result);
  } else if (bias) {
    at::addmm_out(out, *bias, input, weight.t());
  } else {
    at::mm_out(out, input, weight.t());
  }
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { m.impl("linear", &linear); }

}  // namespace tpkernels
