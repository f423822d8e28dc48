// The Python module tpkernels._C: functions that are no ops.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "engine/chunking.h"
#include "engine/collective_log.h"
#include "engine/collectives.h"
#include "engine/nvtx.h"
#include "engine/peer_all_reduce.h"
#include "gemm/gemm.h"
#include "gemm/linear.h"
#include "shm/backend.h"
#include "shm/segments.h"

namespace tpkernels {

namespace {

bool is_plain_tensor(pybind11::handle t) { return THPVariable_CheckExact(t.ptr()); }

// F.linear(input, weight, bias) where neither a check of ours nor machinery of torch's must see the
// call. Otherwise None, and Python goes through the op.
pybind11::object python_linear_fast_path(pybind11::handle input, pybind11::handle weight,
                                         pybind11::handle bias) {
  const bool plain = is_plain_tensor(input) && is_plain_tensor(weight) &&
                     (bias.is_none() || is_plain_tensor(bias));
  if (!plain || at::impl::torch_function_mode_enabled()) return pybind11::none();
  const auto b = bias.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(bias.ptr()));
  const auto &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  at::Tensor out;
  {
    pybind11::gil_scoped_release release;
    out = linear_fast_path(x, w, b);
  }
  if (!out.defined()) return pybind11::none();
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(out)));
}

// The op all_reduce_ and the version's bump, without the dispatcher's time, which is most of a
// small all-reduce's.
void all_reduce_without_dispatch(at::Tensor tensor, const std::string& group) {
  all_reduce_(tensor, group, "sum", "all_reduce");
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

using GemmTuple = std::tuple<GemmLibrary, bool, bool>;  // library, opmath, packed

GemmTuple choose_gemm_tuple(const at::Tensor& weight, int64_t rows, bool constant) {
  const auto gemm = choose_gemm(weight, rows, constant);
  return {gemm.library, gemm.opmath, gemm.packed};
}

void force_gemm_tuple(std::optional<GemmTuple> tuple) {
  if (!tuple) return force_gemm(std::nullopt);
  const auto [library, opmath, packed] = *tuple;
  force_gemm(Gemm{library, opmath, packed});
}

void log_write_entry(std::string op, std::string tag, std::string group, int64_t bytes,
                     int64_t chunk, int64_t chunks) {
  log_write({std::move(op), std::move(tag), std::move(group), bytes, chunk, chunks});
}

using LogTuple = std::tuple<std::string, std::string, std::string, int64_t, int64_t, int64_t>;

std::vector<LogTuple> log_stop_tuples() {
  std::vector<LogTuple> rows;
  for (auto& e : log_stop()) rows.emplace_back(e.op, e.tag, e.group, e.bytes, e.chunk, e.chunks);
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  // Linear layers
  m.def("chunk_bounds", &chunk_bounds, py::arg("rows"), py::arg("chunks"), py::arg("row_bytes"));
  m.def("linear_fast_path", &python_linear_fast_path);
  m.def("packed_bytes", &packed_bytes, py::arg("weight") = std::nullopt);
  py::enum_<GemmLibrary>(m, "Library")
      .value("aten", GemmLibrary::aten)
      .value("mkl", GemmLibrary::mkl)
      .value("onednn", GemmLibrary::onednn);
  m.def("has_library", &has_gemm_library);
  m.def("choose_gemm", &choose_gemm_tuple);
  m.def("force_gemm", &force_gemm_tuple);

  // Collectives
  m.def("all_reduce_", &all_reduce_without_dispatch, without_gil);
  m.def("peer_buffer_bytes", &peer_buffer_bytes, py::arg("slot_bytes"));
  m.def("close_peer_memory", [](const std::string& group) { set_peer_all_reduce(group, nullptr); });
  m.def("shm_backend", &shm_backend, without_gil);
  m.def("shm_host", &shm_host);
  m.def("shm_free_bytes", &shm_free_bytes);
  m.def("shm_least_bytes", &shm_least_bytes);

  // Observation
  m.def("log_start", &log_start);
  m.def("log_enabled", &log_enabled);
  m.def("log_write", &log_write_entry);
  m.def("log_stop", &log_stop_tuples);
  m.def("range_push", &range_push);
  m.def("range_pop", &range_pop);
}

}  // namespace tpkernels
