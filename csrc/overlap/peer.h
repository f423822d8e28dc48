// All-reduces of small messages that a device's own kernel does over its peers' memory, in the stream, instead of the group's
// backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>

namespace tpkernels {

// What follows the sum in the same kernel; tensors may be undefined. `normed` is written where it is defined:
// result * rsqrt(mean(result^2) + eps) * weight.
struct Epilogue {
  at::Tensor bias, residual;            // [N], [M, N]
  at::Tensor normed = {}, weight = {};  // [M, N], [N]
  double eps = 0;
};

class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  // Whether a contiguous `buffer` [M, N] goes this way: a function of its shape and dtype, so that the ranks agree.
  virtual bool takes(const at::Tensor& buffer) const = 0;
  // buffer = sum over ranks of buffer, + bias + residual, ordered in the current stream; the same bits on every rank.
  virtual void all_reduce_(const at::Tensor& buffer, const Epilogue& epilogue) = 0;
};

// The peer memory of a group, if it has any. Opened and closed from Python, while no op of the group runs.
std::shared_ptr<PeerMemory> find_peer_memory(const std::string& group);
void set_peer_memory(const std::string& group, std::shared_ptr<PeerMemory> memory);

// Bytes of a rank's symmetric buffer for messages of up to `half_bytes`: two of them and the flags (include/tpkernels/barrier.cuh,
// which only device compilers read; cuda/peer.cu checks that the two agree).
constexpr int64_t peer_buffer_bytes(int64_t half_bytes) { return 2304 + 2 * half_bytes; }

}  // namespace tpkernels
