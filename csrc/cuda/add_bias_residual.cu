// The epilogue of a row-parallel layer's all-reduce, self = self + bias + residual, in one pass.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorIterator.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <ATen/native/cuda/Loops.cuh>

namespace tpkernels {

// self [rows, N], bias [N], residual [rows, N]
static void add_bias_residual_(const at::Tensor& self, const at::Tensor& bias,
                               const at::Tensor& residual) {
  const c10::cuda::CUDAGuard guard(self.device());
  auto iterator = at::TensorIteratorConfig()
                      .add_output(self)
                      .add_input(self)
                      .add_input(bias)
                      .add_input(residual)
                      .build();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, self.scalar_type(), "add_bias_residual_", [&] {
        using opmath = at::opmath_type<scalar_t>;
        at::native::gpu_kernel(
            iterator, [] GPU_LAMBDA(scalar_t y, scalar_t b, scalar_t r) -> scalar_t {
              return static_cast<opmath>(y) + static_cast<opmath>(b) + static_cast<opmath>(r);
            });
      });
}

}  // namespace tpkernels

TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) {
  m.impl("add_bias_residual_", &tpkernels::add_bias_residual_);
}
