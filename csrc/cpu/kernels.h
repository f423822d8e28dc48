// The vectorised kernels: declarations and plain data. Each file of kernels/ is compiled once for
// each instruction set, into that set's namespace (setup.py). The best one of the machine is
// called, or ATEN_CPU_CAPABILITY's. A kernel file must emit nothing outside its namespace: the
// linker could take it into code for lesser machines.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "../activation.h"

namespace tpkernels {

// Rows of contiguous elements, `stride` elements apart. Null data: the tensor is absent.
struct StridedRows {
  void* data = nullptr;
  int64_t stride = 0;
};

// "opmath" below is the dtype of the arithmetic: float for 16-bit types, else `dtype`.
struct ActivationArgs {
  c10::ScalarType dtype;
  Activation activation;
  int64_t columns;
  StridedRows gate, up;  // pre-activations without bias; up is absent for activation(gate)
  const void *gate_bias, *up_bias;  // opmath [columns]
  StridedRows out;                  // activation(gate) * up; its gradient going backward
  StridedRows gate_grad, up_grad;
};

struct NormArgs {
  c10::ScalarType dtype;
  bool rms;
  int64_t columns;
  double eps;
  StridedRows input, residual, sum, out;
  const void *weight, *bias;  // opmath [columns]
  void *mean, *rstd;          // opmath [rows]
};

struct NormBackwardArgs {
  c10::ScalarType dtype;
  bool rms;
  int64_t columns;
  StridedRows grad, grad_sum, sum, input_grad;
  const void* weight;       // opmath [columns]
  const void *mean, *rstd;  // opmath [rows]
};

struct CrossEntropyArgs {
  c10::ScalarType dtype;
  int64_t columns;
  StridedRows logits;
  const int64_t* target;  // this rank's column; outside [0, columns): another rank's
};

struct CrossEntropyGradArgs {
  c10::ScalarType dtype;
  int64_t columns;
  StridedRows logits;
  const int64_t* target;         // as above
  const void *log_norm, *scale;  // opmath [rows]
  double smoothing;
  int64_t num_classes;  // of all ranks
  StridedRows grad;     // may be logits
};

struct DropoutArgs {
  c10::ScalarType dtype;
  int64_t columns;
  StridedRows input, out;
  uint64_t seed;
  uint32_t threshold;
  double scale;
  int64_t row, column;  // of the tensor's first element, globally
};

struct RotaryArgs {
  c10::ScalarType dtype;
  bool interleaved, inverse;
  int64_t steps, heads, features, half;
  const void* input;
  void* out;
  int64_t input_strides[3], out_strides[3];  // batch, step, head
  const void *cos, *sin;                     // opmath [batch or 1, steps, half]
  int64_t table_batch_stride;
};

enum class Reduction : uint8_t { sum, mean, min, max };

// Terms of the same shape, reduced in their order in opmath, and rounded once.
struct ReduceArgs {
  c10::ScalarType dtype;
  Reduction reduction;
  int num_terms;
  const char* const* terms;  // contiguous, as is `out`, which may be one of them
  void* out;
  // Only sum_rows reads the rest. It adds bias and residual where they are there.
  int64_t columns;
  const void* bias;  // [columns]
  StridedRows residual;
};

// Rows row .. last of the arguments; where `last` is missing, elements begin .. end.
#define TPKERNELS_KERNELS                                                                       \
  void activation_forward(const ActivationArgs&, int64_t row, int64_t last);                    \
  /* adds to bias_grad, unless it is null: opmath [columns of gate, then of up] */              \
  void activation_backward(const ActivationArgs&, int64_t row, int64_t last, void* bias_grad);  \
  void add_bias_residual(c10::ScalarType, int64_t columns, StridedRows self, const void* bias,  \
                         StridedRows residual, int64_t row, int64_t last);                      \
  void norm_forward(const NormArgs&, int64_t row, int64_t last);                                \
  /* adds to param_grads, unless it is null: opmath [2, columns], the weight's and the bias' */ \
  void norm_backward(const NormBackwardArgs&, int64_t row, int64_t last, void* param_grads);    \
  /* stats: opmath [4, rows] */                                                                 \
  void cross_entropy_stats(const CrossEntropyArgs&, int64_t row, int64_t last, int64_t rows,    \
                           void* stats);                                                        \
  void cross_entropy_grad(const CrossEntropyGradArgs&, int64_t row, int64_t last);              \
  void dropout(const DropoutArgs&, int64_t row, int64_t last);                                  \
  /* a row is a step of a batch: batch * steps + step */                                        \
  void rotary(const RotaryArgs&, int64_t row, int64_t last);                                    \
  /* also takes integers, but not for their mean */                                             \
  void reduce_terms(const ReduceArgs&, int64_t begin, int64_t end);                             \
  void sum_rows(const ReduceArgs&, int64_t row, int64_t last);

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
