// The choice of a matrix product for a linear layer: at::mm, or on CPUs what is faster there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "packed_weights.h"

namespace tpkernels {

// How a product is computed. With `opmath`, operands of a half type are converted to float32 and
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

// From now on chooses this one for all that it can compute, or goes back to the choice. For tests
// and measurements.
void force_gemm(std::optional<Gemm> gemm);

}  // namespace tpkernels
