// Checks of the collectives' ops. all_reduce_ makes its own, as C++ calls it without the
// dispatcher.
#include "checks.h"

namespace tpkernels {

namespace {

using at::Tensor;

void check_all_gather(const Tensor& self, const std::string& /*group*/,
                      const std::string& /*tag*/) {
  check_dense({"self", self});
}

void check_empty_comm_buffer(const Tensor& like, at::IntArrayRef size) {
  check_dense({"like", like});
  for (const auto n : size)
    TORCH_CHECK_VALUE(n >= 0, "size must have no negative entry, got ", size);
}

void check_open_peer_memory(const std::string& /*group*/, const Tensor& buffer, int64_t peers,
                            int64_t /*multicast*/, int64_t rank, int64_t size, int64_t slot_bytes,
                            int64_t one_shot_bytes) {
  check_dense({"buffer", buffer});
  TORCH_CHECK_VALUE(peers != 0, "peers must be the address of the ranks' buffers, got 0");
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, "rank must lie in [0, ", size, "), got ", rank);
  TORCH_CHECK_VALUE(slot_bytes >= 0 && one_shot_bytes >= 0,
                    "slot_bytes and one_shot_bytes must not be negative, got ", slot_bytes, " and ",
                    one_shot_bytes);
}

TORCH_LIBRARY_IMPL(tpkernels, BackendSelect, m) {
  check_before<"tpkernels::all_gather", Tensor, check_all_gather>(m);
  check_before<"tpkernels::empty_comm_buffer", Tensor, check_empty_comm_buffer>(m);
  check_before<"tpkernels::open_peer_memory", void, check_open_peer_memory>(m);
}

}  // namespace

}  // namespace tpkernels
