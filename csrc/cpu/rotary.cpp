// Rotary position embedding on CPUs.
#include <torch/library.h>

#include "rows.h"

namespace tpkernels {

namespace {

at::Tensor rotary(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                  bool interleaved, bool inverse) {
  BelowAutograd guard;
  const auto dtype = input.scalar_type();
  const int64_t batch = input.size(0), heads = input.size(1), steps = input.size(2),
                features = input.size(3), half = cos.size(-1);
  auto out = at::empty_like(input);
  const bool in_place_layout = input.stride(3) == 1 && out.stride(3) == 1;
  const auto x = in_place_layout ? input : input.contiguous(),
             y = in_place_layout ? out : at::empty_like(x);
  const auto opmath = at::toOpMathType(dtype);
  const auto c = cos.to(opmath).contiguous(), s = sin.to(opmath).contiguous();
  const RotaryArgs args{dtype,
                        interleaved,
                        inverse,
                        steps,
                        heads,
                        features,
                        half,
                        x.data_ptr(),
                        y.data_ptr(),
                        {x.stride(0), x.stride(2), x.stride(1)},
                        {y.stride(0), y.stride(2), y.stride(1)},
                        c.data_ptr(),
                        s.data_ptr(),
                        cos.dim() == 3 ? steps * half : 0};
  const auto kernel = TPKERNELS_KERNEL(rotary);
  for_rows(batch * steps, heads * features,
           [&](int64_t step, int64_t last) { kernel(args, step, last); });
  return in_place_layout ? y : out.copy_(y);
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { m.impl("rotary", &rotary); }

}  // namespace tpkernels
