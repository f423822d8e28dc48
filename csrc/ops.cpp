// The schema of every op. Its implementations are registered in the files that define them.
//
//   op                                      files
//   row_linear, row_linear_rms_norm,
//     row_linear_backward                   engine/row_linear.cpp
//   column_linear_backward                  engine/column_linear.cpp
//   column_linear_act                       composite/column_linear.cpp, Triton
//   linear                                  gemm/linear.cpp, CPU only
//   vocab_embedding                         engine/embedding.cpp
//   vocab_ce                                engine/cross_entropy.cpp
//   vocab_linear_ce                         engine/linear_cross_entropy.cpp
//   vocab_ce_stats, vocab_ce_grad(_)        cross_entropy.cpp of composite/ and cpu/, Triton
//   all_reduce_, all_gather                 engine/collectives.cpp
//   empty_comm_buffer                       engine/collectives.cpp
//   open_peer_memory                        cuda/peer_all_reduce.cu, CUDA only
//   add_bias_residual_                      cpu/add_bias_residual.cpp, cuda/add_bias_residual.cu
//   bias_act, gated_act (and _backward)     activation.cpp of composite/ and cpu/, Triton
//   norm, norm_backward                     norm.cpp of composite/ and cpu/, Triton
//   dropout                                 dropout.cpp of composite/ and cpu/, Triton
//   rotary                                  rotary.cpp of composite/ and cpu/, Triton
//   autocast_to                             composite/autocast.cpp
//
// checks/   each op's checks of its arguments, in front of all of its implementations
// in_place.cpp   version counters of the ops that write to a tensor
// engine/   ops that communicate, on CPUs and GPUs
// composite/   any device, in ATen calls
// cpu/   vectorised; cpu/kernels/ has the loops, a file of the same name
// Triton   tpkernels/kernels/, a file of the same name, for GPUs
#include <torch/library.h>

TORCH_LIBRARY(tpkernels, m) {
  // Linear layers
  m.def(
      "row_linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str group, "
      "int chunks, str tag, bool grad=False) -> Tensor");
  m.def(
      "row_linear_rms_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
      "Tensor norm_weight, float eps, str group, int chunks, str tag) -> (Tensor, Tensor)");
  m.def(
      "row_linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool bias_grad) "
      "-> Tensor[]");
  m.def(
      "column_linear_backward(Tensor[] grad_outputs, Tensor? input, Tensor[] weights, "
      "bool input_grad, bool[] weight_grad, bool[] bias_grad, str group, int chunks, str tag) "
      "-> Tensor[]");
  m.def(
      "column_linear_act(Tensor input, Tensor weight, Tensor? bias, str activation, bool keep) "
      "-> (Tensor, Tensor)");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, bool grad) -> Tensor");
  m.def("add_bias_residual_(Tensor(a!) self, Tensor bias, Tensor residual) -> ()");
  m.def("autocast_to(Tensor(a) self, ScalarType dtype) -> Tensor(a)");

  // Vocabulary
  m.def(
      "vocab_embedding(Tensor ids, Tensor weight, int vocab_start_index, str group, str tag) "
      "-> Tensor");
  m.def(
      "vocab_ce(Tensor logits, Tensor target, int vocab_start_index, int num_classes, "
      "int ignore_index, float smoothing, str group, str tag) -> (Tensor, Tensor, Tensor)");
  m.def(
      "vocab_linear_ce(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? scale, "
      "int vocab_start_index, int num_classes, int ignore_index, float smoothing, int chunk_rows, "
      "bool input_grad, bool weight_grad, bool bias_grad, str group, str tag) -> Tensor[]");
  m.def("vocab_ce_stats(Tensor logits, Tensor target, int vocab_start_index) -> Tensor");
  m.def(
      "vocab_ce_grad(Tensor logits, Tensor target, Tensor log_norm, Tensor scale, "
      "int vocab_start_index, float smoothing, int num_classes) -> Tensor");
  m.def(
      "vocab_ce_grad_(Tensor(a!) logits, Tensor target, Tensor log_norm, Tensor scale, "
      "int vocab_start_index, float smoothing, int num_classes) -> ()");

  // Collectives
  m.def("all_reduce_(Tensor(a!) self, str group, str op, str tag) -> ()");
  m.def("all_gather(Tensor self, str group, str tag) -> Tensor");
  m.def("empty_comm_buffer(Tensor like, int[] size) -> Tensor");
  m.def(
      "open_peer_memory(str group, Tensor buffer, int peers, int multicast, int rank, int size, "
      "int slot_bytes, int one_shot_bytes) -> ()");

  // Memory-bound work, without communication
  m.def("bias_act(Tensor input, Tensor? bias, str activation) -> Tensor");
  m.def(
      "bias_act_backward(Tensor grad, Tensor input, Tensor? bias, str activation, bool bias_grad) "
      "-> Tensor[]");
  m.def(
      "gated_act(Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, str activation) "
      "-> Tensor");
  m.def(
      "gated_act_backward(Tensor grad, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, "
      "str activation, bool bias_grad) -> Tensor[]");
  m.def(
      "norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, "
      "Tensor rstd, bool rms, bool weight_grad, bool bias_grad) -> Tensor[]");
  m.def("dropout(Tensor input, Tensor seed, float p, int row, int column) -> Tensor");
  m.def("rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
}
