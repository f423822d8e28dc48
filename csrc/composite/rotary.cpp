// Rotary position embedding on any device, in ATen calls.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../op.h"

namespace tpkernels {

namespace {

at::Tensor rotary(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                  bool interleaved, bool inverse) {
  BelowAutograd guard;
  const auto opmath = at::toOpMathType(input.scalar_type());
  const int64_t half = cos.size(-1), rotated = 2 * half;
  // [T, half] or [B, 1, T, half]
  const auto per_head = [&](const at::Tensor& t) {
    return (t.dim() == 3 ? t.unsqueeze(1) : t).to(opmath);
  };
  const auto c = per_head(cos), s = inverse ? per_head(sin).neg() : per_head(sin);
  const auto first = [&](const at::Tensor& t) {
    return interleaved ? t.slice(-1, 0, rotated, 2) : t.narrow(-1, 0, half);
  };
  const auto second = [&](const at::Tensor& t) {
    return interleaved ? t.slice(-1, 1, rotated, 2) : t.narrow(-1, half, half);
  };
  const auto x1 = first(input).to(opmath), x2 = second(input).to(opmath);
  auto out = at::empty_like(input);
  first(out).copy_(x1 * c - x2 * s);
  second(out).copy_(x2 * c + x1 * s);
  out.slice(-1, rotated).copy_(input.slice(-1, rotated));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) { m.impl("rotary", &rotary); }

}  // namespace tpkernels
