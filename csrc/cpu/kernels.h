// The vectorised kernels. Each file of kernels/ is compiled once for each instruction set, into
// that set's namespace (setup.py); what is called is the best one of the machine, or
// ATEN_CPU_CAPABILITY's. Here are only declarations and plain data: whatever a kernel file emits
// outside its namespace could be linked into code for lesser machines.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "../activation.h"

namespace tpkernels {

// Rows of contiguous elements, `stride` elements apart. No data: the tensor is absent.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// "wide" below is the arithmetic's dtype: float for half types, else `dtype`.
struct ActivationArgs {
  c10::ScalarType dtype;
  Activation activation;
  int64_t columns;
  Rows gate, up;  // pre-activations without bias; activation(gate) * up where there is an up
  const void *gate_bias, *up_bias;  // wide [columns]
  Rows out;                         // or its gradient, going backward
  Rows gate_grad, up_grad;
};

struct NormArgs {
  c10::ScalarType dtype;
  bool rms;
  int64_t columns;
  double eps;
  Rows input, residual, sum, out;
  const void *weight, *bias;  // wide [columns]
  void *mean, *rstd;          // wide [rows]
};

struct NormBackwardArgs {
  c10::ScalarType dtype;
  bool rms;
  int64_t columns;
  Rows grad, grad_sum, sum, input_grad;
  const void* weight;       // wide [columns]
  const void *mean, *rstd;  // wide [rows]
};

struct CrossEntropyArgs {
  c10::ScalarType dtype;
  int64_t columns;
  Rows logits;
  const int64_t* target;  // this rank's column; outside [0, columns): another rank's
};

struct DropoutArgs {
  c10::ScalarType dtype;
  int64_t columns;
  Rows input, out;
  uint64_t seed;
  uint32_t threshold;
  double scale;
  int64_t row, column;
};

struct RotaryArgs {
  c10::ScalarType dtype;
  bool interleaved, inverse;
  int64_t steps, heads, features, half;
  const void* input;
  void* out;
  int64_t input_strides[3], out_strides[3];  // batch, step, head
  const void *cos, *sin;                     // wide [batch or 1, steps, half]
  int64_t table_batch_stride;
};

enum class Reduction : uint8_t { sum, mean, min, max };

// Parts of the same shape, summed (or another reduction) in their order, in the wide dtype, and
// rounded once.
struct ReduceArgs {
  c10::ScalarType dtype;
  Reduction reduction;
  int parts;
  const char* const* part;  // contiguous, as is `out`, which may be one of them
  void* out;
  int64_t columns;   // of sum_rows, which adds what there is of these:
  const void* bias;  // [columns]
  Rows residual;
};

#define TPKERNELS_KERNELS                                                                          \
  void activation_forward(const ActivationArgs&, int64_t row, int64_t last);                       \
  /* adds the gradients of the rows to bias_grad, wide [columns of the gate, then of the up half], \
   * where it is given */                                                                          \
  void activation_backward(const ActivationArgs&, int64_t row, int64_t last, void* bias_grad);     \
  void norm_forward(const NormArgs&, int64_t row, int64_t last);                                   \
  /* adds to param_grads, wide [2, columns]: the weight's gradient, the bias' */                   \
  void norm_backward(const NormBackwardArgs&, int64_t row, int64_t last, void* param_grads);       \
  /* stats: wide [4, rows] */                                                                      \
  void cross_entropy_stats(const CrossEntropyArgs&, int64_t row, int64_t last, int64_t rows,       \
                           void* stats);                                                           \
  void cross_entropy_grad(const CrossEntropyArgs&, int64_t row, int64_t last,                      \
                          const void* log_norm, const void* scale, double on_target,               \
                          double everywhere, Rows grad);                                           \
  void dropout(const DropoutArgs&, int64_t row, int64_t last);                                     \
  /* steps of the batches: batch * steps + step */                                                 \
  void rotary(const RotaryArgs&, int64_t step, int64_t last);                                      \
  /* of elements [begin, end); also of integers, but for their mean */                             \
  void reduce_parts(const ReduceArgs&, int64_t begin, int64_t end);                                \
  void sum_rows(const ReduceArgs&, int64_t row, int64_t last);                                     \
  void add_bias_residual(c10::ScalarType, int64_t columns, Rows self, const void* bias,            \
                         Rows residual, int64_t row, int64_t last);

#ifdef CPU_CAPABILITY
namespace CPU_CAPABILITY {
TPKERNELS_KERNELS
}
#else
namespace DEFAULT {
TPKERNELS_KERNELS
}
#ifdef TPKERNELS_X86_KERNELS
namespace AVX2 {
TPKERNELS_KERNELS
}
namespace AVX512 {
TPKERNELS_KERNELS
}
#endif
#endif

}  // namespace tpkernels
