// All-reduces over memory that the ranks share, with what follows them in the same pass, instead of the group's backend: a GPU's
// own kernel over its peers' memory, for small messages, or on CPUs the shm transport.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace tpkernels {

// What follows the sum in the same kernel; tensors may be undefined. `normed` is written where it is defined:
// result * rsqrt(mean(result^2) + eps) * weight.
struct Epilogue {
  at::Tensor bias, residual;            // [N], [M, N]
  at::Tensor normed = {}, weight = {};  // [M, N], [N]
  double eps = 0;
};

// Where a GEMM writes this rank's part of a sum. The memory is this call's while `turn` is held.
struct Staged {
  at::Tensor part;
  std::shared_ptr<void> turn;
};

class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  // Whether it is of `group`, and not of one that is gone and had the same name.
  virtual bool serves(c10d::ProcessGroup& group) const = 0;
  // Whether a contiguous `buffer` [M, N] goes this way: a function of its shape and dtype, so that the ranks agree.
  virtual bool takes(const at::Tensor& buffer) const = 0;
  // The rows of `out` that one stage() takes.
  virtual int64_t rows_at_once(const at::Tensor& out) const { return out.size(0); }
  // Memory of the shape of `out`: `out` itself, unless the sum can be spared a copy.
  virtual Staged stage(const at::Tensor& out) { return {out, nullptr}; }
  // out = sum over ranks of staged.part, + bias + residual, ordered in the current stream; the same bits on every rank. A `staged`
  // that stage() did not make is `out` itself, and there is no epilogue.
  virtual void all_reduce(Staged staged, const at::Tensor& out, const Epilogue& epilogue) = 0;
  // Whether all_reduce writes the epilogue's `normed`.
  virtual bool norms() const { return false; }
  // Whether the group's collectives are the calling core's own work, so that the backend's other thread could only be in its way.
  virtual bool synchronous() const { return false; }
};

// The peer memory under a group's name, if there is any. Opened and closed while no op of the group runs.
std::shared_ptr<PeerMemory> find_peer_memory(const std::string& group);
void set_peer_memory(const std::string& group, std::shared_ptr<PeerMemory> memory);

// Bytes of a rank's symmetric buffer for messages of up to `half_bytes`: two of them and the flags (include/tpkernels/barrier.cuh,
// which only device compilers read; cuda/peer.cu checks that the two agree).
constexpr int64_t peer_buffer_bytes(int64_t half_bytes) { return 2304 + 2 * half_bytes; }

}  // namespace tpkernels
