// An all-reduce through memory that the ranks share, in place of the group's c10d backend. Small
// buffers on GPUs take the kernels of cuda/peer_all_reduce.cu, CPU tensors the shm transport
// (shm/backend.cpp). The epilogue of a row-parallel layer joins the same pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>
#include <utility>

namespace tpkernels {

// Follows the sum in the same pass. A tensor may be undefined: that step is left out.
struct Epilogue {
  at::Tensor bias;         // [N]
  at::Tensor residual;     // [M, N]
  at::Tensor normed = {};  // [M, N], written: result * rsqrt(mean(result^2) + eps) * weight
  at::Tensor weight = {};  // [N], of the norm
  double eps = 0;
};

// Memory for this rank's term of a sum, written by its GEMM. It belongs to this call while `lock`
// is held.
struct StagedTerm {
  at::Tensor term;  // [M, N]
  std::shared_ptr<void> lock;
};

class PeerAllReduce {
 public:
  virtual ~PeerAllReduce() = default;
  // Tells its own group from a later one that has the same name.
  virtual bool belongs_to(c10d::ProcessGroup& group) const = 0;
  // Decides for a contiguous `buffer` [M, N] by its shape and dtype alone, so that the ranks agree.
  virtual bool supports(const at::Tensor& buffer) const = 0;
  // The most rows of `out` [M, N] that one stage() takes.
  virtual int64_t max_rows(const at::Tensor& out) const { return out.size(0); }
  // Memory of the shape of `out`: `out` itself, unless that would cost the sum a copy.
  virtual StagedTerm stage(const at::Tensor& out) { return {out, nullptr}; }
  // out = sum over ranks of staged.term, + bias + residual. It is ordered in the current stream and
  // gives the same bits on every rank. Where stage() did not make `staged`, that is `out` itself,
  // and there is no epilogue.
  virtual void all_reduce(StagedTerm staged, const at::Tensor& out, const Epilogue& epilogue) = 0;
  // True if all_reduce writes the epilogue's `normed`.
  virtual bool fuses_norm() const { return false; }
  // True if the group's collectives are the calling core's own work, so that the backend's other
  // thread could only be in its way.
  virtual bool synchronous() const { return false; }
};

// The registry, by the group's name. Entries come and go while no op of the group runs.
inline std::mutex peers_mutex;
inline std::unordered_map<std::string, std::shared_ptr<PeerAllReduce>> peers_of_groups;

// Null where there is none.
inline std::shared_ptr<PeerAllReduce> find_peer_all_reduce(const std::string& group) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  const auto found = peers_of_groups.find(group);
  return found == peers_of_groups.end() ? nullptr : found->second;
}

inline void set_peer_all_reduce(const std::string& group, std::shared_ptr<PeerAllReduce> peers) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  if (peers) {
    peers_of_groups[group] = std::move(peers);
  } else {
    peers_of_groups.erase(group);
  }
}

// Bytes of a rank's symmetric buffer for all-reduces of up to `slot_bytes`: flags and two slots,
// as include/tpkernels/barrier.cuh lays them out. Only device compilers read that header;
// cuda/peer_all_reduce.cu checks that the two agree.
constexpr int64_t peer_buffer_bytes(int64_t slot_bytes) { return 2304 + 2 * slot_bytes; }

}  // namespace tpkernels
