// The choice of a matrix product for a linear layer: at::mm, or on CPUs what is faster there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "packed_weights.h"

namespace tpkernels {

// A way to compute a product. With `opmath`, operands of a 16-bit type are converted to float32 and
// the result back.
struct Gemm {
  GemmLibrary library = GemmLibrary::aten;
  bool opmath = false;
  bool packed = false;
  bool is_plain() const { return library == GemmLibrary::aten && !opmath; }
  bool operator==(const Gemm& o) const {
    return library == o.library && opmath == o.opmath && packed == o.packed;
  }
};

// The choice for m rows times a weight [N, K]. `constant`: no gradient is wanted, so that a packed
// copy of the weight may serve many calls.
Gemm choose_gemm(const at::Tensor& weight, int64_t m, bool constant);

// The same by the weight's dtype and number of elements, on CPUs. `constant` means that the weight
// can be packed, too.
Gemm choose_cpu_gemm(at::ScalarType dtype, int64_t elements, int64_t m, bool constant);

// Makes every later choice this one, as far as it can compute the product, or (nullopt) lifts that.
// Only tests and measurements call it.
void force_gemm(std::optional<Gemm> gemm);

}  // namespace tpkernels
