// Dropout by counter-based random numbers, on CPUs.
#include <torch/library.h>

#include "../philox.h"
#include "rows.h"

namespace tpkernels {

namespace {

at::Tensor dropout(const at::Tensor& input, const at::Tensor& seed, double p, int64_t row,
                   int64_t column) {
  BelowAutograd guard;
  const auto dtype = input.scalar_type();
  const auto threshold = philox::dropout_threshold(p);
  if (threshold > std::numeric_limits<uint32_t>::max())
    return at::zeros(input.sizes(), input.options());
  const auto x = strided_rows(input), out = at::empty({x.size(0), x.size(1)}, input.options());
  const DropoutArgs args{dtype,
                         x.size(1),
                         rows_at(x),
                         rows_at(out),
                         static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
                         static_cast<uint32_t>(threshold),
                         1 / (1 - p),
                         row,
                         column};
  const auto kernel = TPKERNELS_KERNEL(dropout);
  for_rows(x.size(0), x.size(1), [&](int64_t first, int64_t last) { kernel(args, first, last); });
  return out.view(input.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { m.impl("dropout", &dropout); }

}  // namespace tpkernels
