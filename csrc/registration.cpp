// The schema of every op, the device-agnostic implementations, and what Python sees of the collective log.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/gemm.h"
#include "overlap/comm.h"
#include "overlap/linear.h"
#include "overlap/loss.h"
#include "overlap/ranges.h"
#include "shm/backend.h"
#include "shm/segments.h"

// Tensor.to(dtype) that shares autocast's cache of weight casts, as nn.Linear does under autocast.
static at::Tensor autocast_to(const at::Tensor& self, at::ScalarType dtype) {
  return at::autocast::cached_cast(dtype, self, self.device().type());
}

static at::Tensor comm_buffer_like(const at::Tensor& like, at::IntArrayRef size) {
  return tpkernels::empty_comm_buffer(size, like.options());
}

// F.linear(input, weight, bias) where no check of ours and no machinery of torch's has a say; else None, and Python takes the long
// way.
static PyObject* linear_now(pybind11::handle input, pybind11::handle weight, pybind11::handle bias) {
  const auto exact = [](pybind11::handle t) { return THPVariable_CheckExact(t.ptr()); };
  if (exact(input) && exact(weight) && (bias.is_none() || exact(bias)) && !at::impl::torch_function_mode_enabled()) {
    const auto b = bias.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(bias.ptr()));
    const auto &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
    at::Tensor out;
    {
      pybind11::gil_scoped_release release;
      out = tpkernels::linear_now(x, w, b);
    }
    if (out.defined()) return THPVariable_Wrap(std::move(out));
  }
  Py_RETURN_NONE;
}

TORCH_LIBRARY(tpkernels, m) {
  m.def("autocast_to(Tensor(a) self, ScalarType dtype) -> Tensor(a)", &autocast_to);
  m.def("add_bias_residual_(Tensor(a!) self, Tensor bias, Tensor residual) -> ()");
  m.def("all_reduce_(Tensor(a!) self, str group, str op, str tag) -> ()");
  m.def("empty_comm_buffer(Tensor like, int[] size) -> Tensor");
  m.def("vocab_embedding(Tensor ids, Tensor weight, int first, str group, str tag) -> Tensor");
  m.def("all_gather(Tensor self, str group, str tag) -> Tensor");
  m.def(
      "row_linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str group, int chunks, str tag, bool grad=False) "
      "-> Tensor");
  m.def("row_linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool bias_grad) -> Tensor[]");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, bool grad) -> Tensor");
  m.def(
      "row_linear_rms_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor norm_weight, float eps, str group, "
      "int chunks, str tag) -> (Tensor, Tensor)");
  m.def(
      "column_linear_backward(Tensor[] grad_outputs, Tensor? input, Tensor[] weights, bool input_grad, bool[] weight_grad, "
      "bool[] bias_grad, str group, int chunks, str tag) -> Tensor[]");
  m.def(
      "vocab_ce(Tensor logits, Tensor target, int first, int num_classes, int ignore_index, float smoothing, str group, str tag) "
      "-> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "vocab_linear_ce(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? scale, int first, int num_classes, "
      "int ignore_index, float smoothing, int chunk_rows, bool input_grad, bool weight_grad, bool bias_grad, str group, str tag) "
      "-> "
      "Tensor[]");
  m.def(
      "open_peer_memory(str group, Tensor buffer, int peers, int multicast, int rank, int size, int half_bytes, int "
      "one_shot_bytes) "
      "-> ()");
  // Fused memory-bound work, no communication: eager implementations in fused/, vectorised ones in cpu/, Triton's in
  // tpkernels/kernels/.
  m.def("bias_act(Tensor input, Tensor? bias, str activation) -> Tensor");
  m.def("bias_act_backward(Tensor grad, Tensor input, Tensor? bias, str activation, bool bias_grad) -> Tensor[]");
  m.def("gated_act(Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, str activation) -> Tensor");
  m.def(
      "gated_act_backward(Tensor grad, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, str activation, bool bias_grad) "
      "-> Tensor[]");
  m.def("column_linear_act(Tensor input, Tensor weight, Tensor? bias, str activation, bool keep) -> (Tensor, Tensor)");
  m.def(
      "norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, Tensor rstd, bool rms, bool "
      "weight_grad, "
      "bool bias_grad) -> Tensor[]");
  m.def("vocab_ce_stats(Tensor logits, Tensor target, int first) -> Tensor");
  m.def(
      "vocab_ce_grad(Tensor logits, Tensor target, Tensor log_norm, Tensor scale, int first, float on_target, float everywhere) "
      "-> Tensor");
  m.def(
      "vocab_ce_grad_(Tensor(a!) logits, Tensor target, Tensor log_norm, Tensor scale, int first, float on_target, float "
      "everywhere) "
      "-> ()");
  m.def("dropout(Tensor input, Tensor seed, float p, int row, int column) -> Tensor");
  m.def("rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
}

static void register_engine(torch::Library& m) {
  m.impl("all_reduce_", &tpkernels::all_reduce_);
  m.impl("empty_comm_buffer", &comm_buffer_like);
  m.impl("vocab_embedding", &tpkernels::vocab_embedding);
  m.impl("all_gather", &tpkernels::all_gather);
  m.impl("row_linear", &tpkernels::row_linear);
  m.impl("row_linear_rms_norm", &tpkernels::row_linear_rms_norm);
  m.impl("row_linear_backward", &tpkernels::row_linear_backward);
  m.impl("column_linear_backward", &tpkernels::column_linear_backward);
  m.impl("vocab_ce", &tpkernels::vocab_ce);
  m.impl("vocab_linear_ce", &tpkernels::vocab_linear_ce);
}

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) {
  register_engine(m);
  m.impl("linear", &tpkernels::linear);
}
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_engine(m); }

PYBIND11_MODULE(_C, m) {
  m.def("chunk_bounds", &tpkernels::chunk_bounds, pybind11::arg("rows"), pybind11::arg("chunks"), pybind11::arg("row_bytes"));
  m.def("packed_bytes", &tpkernels::packed_bytes, pybind11::arg("weight") = std::nullopt);
  pybind11::enum_<tpkernels::Library>(m, "Library")
      .value("aten", tpkernels::Library::aten)
      .value("mkl", tpkernels::Library::mkl)
      .value("onednn", tpkernels::Library::onednn);
  m.def("choose_gemm", [](const at::Tensor& weight, int64_t rows, bool constant) {
    const auto gemm = tpkernels::choose_gemm(weight, rows, constant);
    return std::tuple(gemm.library, gemm.wide, gemm.packed);
  });
  m.def("linear_now", [](pybind11::handle input, pybind11::handle weight, pybind11::handle bias) {
    return pybind11::reinterpret_steal<pybind11::object>(linear_now(input, weight, bias));
  });
  m.def("has_library", &tpkernels::has_library);
  m.def("force_gemm", [](std::optional<std::tuple<tpkernels::Library, bool, bool>> gemm) {
    tpkernels::force_gemm(gemm ? std::optional(std::make_from_tuple<tpkernels::Gemm>(*gemm)) : std::nullopt);
  });
  m.def("range_push", &tpkernels::range_push);
  m.def("range_pop", &tpkernels::range_pop);
  m.def("peer_buffer_bytes", [](int64_t half_bytes) { return tpkernels::peer_buffer_bytes(half_bytes); });
  m.def("close_peer_memory", [](const std::string& group) { tpkernels::set_peer_memory(group, nullptr); });
  // What the op does, and the version's bump, without the dispatcher's part of the time, which is most of a small message's.
  m.def(
      "all_reduce_",
      [](at::Tensor tensor, const std::string& group) {
        tpkernels::all_reduce_(tensor, group, "sum", "all_reduce");
        if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("shm_backend", &tpkernels::shm_backend, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("shm_host", &tpkernels::shm_host);
  m.def("shm_free_bytes", &tpkernels::shm_free_bytes);
  m.def("shm_least_bytes", &tpkernels::shm_least_bytes);
  m.def("log_start", &tpkernels::log_start);
  m.def("log_enabled", &tpkernels::log_enabled);
  m.def("log_write", [](std::string op, std::string tag, std::string group, int64_t bytes, int64_t chunk, int64_t chunks) {
    tpkernels::log_write({std::move(op), std::move(tag), std::move(group), bytes, chunk, chunks});
  });
  m.def("log_stop", [] {
    std::vector<std::tuple<std::string, std::string, std::string, int64_t, int64_t, int64_t>> rows;
    for (auto& e : tpkernels::log_stop()) rows.emplace_back(e.op, e.tag, e.group, e.bytes, e.chunk, e.chunks);
    return rows;
  });
}
